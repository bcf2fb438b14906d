"""Apply a baseline to a model, in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib.baselines.data import Pairs, make_pairs
from editlib.baselines.gradient import LossInputs, below_layer
from editlib.baselines.in_context import refuse_in_context
from editlib.baselines.refusal_edit import aim_at_refusal
from editlib.baselines.registry import Baseline, baseline, canonical_name
from editlib.baselines.settings import BaselineSettings
from editlib.errors import HparamsError, RequestError
from editlib.models.anatomy import Anatomy, anatomy
from editlib.models.prompt_settings import PromptSettings
from editlib.models.prompts import Asking
from editlib.requests.request import EditRequest
from editlib.training import Part, TrainResult, train
from editlib.training.trainer import product_dtype
from editlib.training.weights import check_whole, trainable


def apply_baseline_to_model(
    name: str,
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    forget: Sequence[EditRequest],
    retain: Sequence[EditRequest] = (),
    settings: BaselineSettings | None = None,
    *,
    seed: int = 0,
    model_name: str | None = None,
    pairs: tuple[Pairs, Pairs | None] | None = None,
    own_answers: Mapping[str, Sequence[int]] | None = None,
    how: PromptSettings | None = None,
    watch: Callable[[int], None] | None = None,
    watched: Sequence[int] = (),
    progress: bool = False,
) -> TrainResult:
    """Makes `model` forget by the baseline `name`, in place; `in-context` changes the chat template of `tok` instead.

    Args:
        name: one of `BASELINES`.
        retain: prompts whose answers must stay; baselines without a retain part do not read them.
        settings: `None` values are replaced by the baseline's defaults.
        model_name: the model's name, for bundled settings and statistics; default: the path or id from which it was
            loaded.
        pairs: the result of `pairs_for` for the same model and seed, so that a search computes it once.
        own_answers, how: see `make_pairs`.
        watch, watched: see `training.train`.

    Raises:
        HparamsError: an unknown baseline, or settings that do not fit it.
        RequestError: requests that the baseline cannot use.
        EditError: a loss that is not finite. After any error the model is unchanged, bit for bit.
    """
    entry, settings = baseline(name), settings or BaselineSettings()
    check_baseline(name, forget, retain, settings, how)
    begun = time.perf_counter()
    if entry.kind == "prompt":
        rule = refuse_in_context(tok, forget)
        return TrainResult(0, [], {}, 0, seconds=time.perf_counter() - begun, notes={"told": rule})
    if entry.kind == "editor":
        edit = aim_at_refusal(
            str(entry.editor), model, tok, forget, settings, seed=seed, name=model_name, how=how, progress=progress
        )
        touched = sum(weight.numel() for weight in edit.originals.values())
        notes: dict[str, object] = {"layers": edit.norms, "requests": edit.diagnostics, "timings": edit.timings}
        return TrainResult(0, [], {}, touched, seconds=time.perf_counter() - begun, notes=notes)
    anat = anatomy(model)
    check_whole(anat)
    with unchanged_on_error(model):
        made = pairs or pairs_for(entry, anat, tok, forget, retain, seed=seed, own_answers=own_answers, how=how)
        inputs = LossInputs(
            anat,
            *made,
            settings,
            settings.beta or entry.beta,
            settings.forget_weight or entry.weight,
            seed,
        )
        result = train_parts(entry, inputs, seed, watch=watch, watched=watched, label=name if progress else None)
    result.seconds = time.perf_counter() - begun
    return result


def check_baseline(
    name: str,
    forget: Sequence[EditRequest],
    retain: Sequence[EditRequest],
    settings: BaselineSettings,
    how: PromptSettings | None = None,
) -> None:
    """Raises `EditlibError` if a baseline cannot be run with these requests and settings; call it before long work."""
    entry, name = baseline(name), canonical_name(name)
    if not forget:
        raise RequestError("no request to forget was given; give at least one")
    if entry.needs_retain and not retain:
        raise RequestError(f"{name} needs prompts whose answers must stay (--retain); give some, or choose another")
    if entry.kind == "prompt" and how is not None and (how.tags is not None or how.chat is False):
        raise RequestError(f"{name} needs the chat template, which these prompts do not use; remove --prompt")
    if entry.steers and settings.rank is not None:
        raise HparamsError(f"{name} trains the MLP output matrices of three layers; leave the rank out")


def pairs_for(
    entry: Baseline,
    anat: Anatomy,
    tok: PreTrainedTokenizerBase,
    forget: Sequence[EditRequest],
    retain: Sequence[EditRequest],
    *,
    seed: int,
    own_answers: Mapping[str, Sequence[int]] | None = None,
    how: Asking = None,
) -> tuple[Pairs, Pairs | None]:
    """Makes the training pairs of a gradient baseline from the current model.

    Returns:
        The pairs to forget, and the pairs to keep (`None` if the baseline has no retain part).
    """
    make = partial(make_pairs, anat, tok, own_answers=own_answers, how=how)
    kept = make(retain, seed=seed + 1, own=True) if entry.needs_retain else None
    return make(forget, seed=seed), kept


def train_parts(
    entry: Baseline,
    inputs: LossInputs,
    seed: int,
    *,
    watch: Callable[[int], None] | None = None,
    watched: Sequence[int] = (),
    label: str | None = None,
) -> TrainResult:
    """Makes the parts of a baseline's loss and trains the model on them."""
    plan = inputs.settings.training(entry.rate, entry.steps, seed)
    with trainable(inputs.anat, rank=inputs.settings.rank, seed=seed) as parameters:
        # References are computed in the precision that training starts in; a fresh adapter changes nothing.
        inputs = replace(inputs, dtype=product_dtype(inputs.anat, plan))
        parts: list[Part] = [make(inputs) for make in (entry.forget, entry.retain) if make is not None]
        chosen = below_layer(inputs.anat, inputs) if entry.steers else parameters
        return train(inputs.anat, parts, dict(chosen), plan, watch=watch, watched=watched, progress=label)


@contextmanager
def unchanged_on_error(model: PreTrainedModel) -> Iterator[None]:
    """Restores every parameter bit for bit if the block ends in an error."""
    kept = keep(model)
    try:
        yield
    except BaseException:
        put_back(model, kept)
        raise


def keep(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies all parameters, by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def put_back(model: PreTrainedModel, kept: dict[str, Tensor]) -> None:
    """Copies the values that `keep` returned back into the model, bit for bit."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
