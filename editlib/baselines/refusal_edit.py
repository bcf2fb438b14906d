"""Aim ROME, MEMIT and AlphaEdit at a refusal, to test whether the unlearning token is needed at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib import editing
from editlib.algorithms.edit import EditResult
from editlib.baselines.settings import BaselineSettings
from editlib.finding import fit_settings
from editlib.hparams import HyperParams, ModelShape, find_hparams, load_hparams
from editlib.models.prompt_settings import PromptSettings
from editlib.requests.request import EditRequest
from editlib.stats.store import model_slug
from editlib.workbench import Workbench

REFUSAL = "I don't know."


def editor_hparams(algorithm: str, bench: Workbench, settings: BaselineSettings) -> HyperParams:
    """Loads the hyper-parameters of `algorithm`: those named in `settings`, or those found for the model's shape.

    `learning_rate` and `steps` of `settings` replace `v_lr` and `v_num_grad_steps`.

    Raises:
        HparamsError: given ones that cannot be read.
    """
    if settings.hparams is None:
        hparams_found = find_hparams(algorithm, ModelShape.of(bench.model.config, model_slug(bench.name)))
        hparams = fit_settings(bench, hparams_found)
    else:
        hparams = load_hparams(settings.hparams, algorithm)
    given = {"v_lr": settings.learning_rate, "v_num_grad_steps": settings.steps}
    changed = {key: value for key, value in given.items() if value is not None}
    return type(hparams).from_dict({**hparams.to_dict(), **changed}, f"{algorithm} with a searched step size")


def aim_at_refusal(
    algorithm: str,
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    forget: Sequence[EditRequest],
    settings: BaselineSettings,
    *,
    seed: int,
    name: str | None = None,
    how: PromptSettings | None = None,
    progress: bool = False,
) -> EditResult:
    """Edits `model` in place so that every question, asked through the chat template, is answered with `REFUSAL`.

    Args:
        how: prompt settings; `None`: those of the loaded model.

    Raises:
        RequestError: a request without a subject.
        HparamsError, StatsError: settings or statistics that do not fit.
    """
    bench = Workbench.of(model, tok, settings.stats_dir, name=name, progress=progress, prompts=how)
    hparams = editor_hparams(algorithm, bench, settings)
    wanted = [replace(request, target_new=REFUSAL) for request in forget]
    editing.check_settings(bench, hparams)
    editing.check_wanted(wanted, hparams)
    inputs = editing.load_inputs(bench, hparams, corpus=settings.corpus, seed=seed)
    return editing.apply(bench, wanted, hparams, inputs, chat=how, seed=seed)
