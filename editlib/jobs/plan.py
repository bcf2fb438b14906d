"""Estimate time and memory of each step of an edit, from a model's configuration and a few seconds of measuring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from editlib import data
from editlib.algorithms import costs
from editlib.algorithms.machine import Machine, measure
from editlib.algorithms.unierase.token import TokenHyperParams
from editlib.errors import ModelError
from editlib.hparams import ClosedFormHyperParams, HyperParams, ModelShape, find_hparams, finds_values, load_hparams
from editlib.models.loading import DTYPES, check_device
from editlib.models.size import ModelSize, config_of, model_size
from editlib.stats.store import model_slug

STATS_TOKENS, STATS_TOKENS_UNLEARN = 100_000, 20_000
MIB = 1024 * 1024


@dataclass(frozen=True)
class Plan:
    """Holds the steps of a job on a machine, the settings that they follow from, and the bytes of the weights."""

    settings: HyperParams
    size: ModelSize
    machine: Machine
    weights: int
    steps: list[costs.Step]

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """Yields head, steps and total as a table: seconds, MiB beyond the weights, and what bounds the time."""
        yield "step", "seconds", "MiB beyond the weights", "bound by"
        for step in self.steps:
            seconds = step.seconds(self.machine)
            yield step.name, f"{seconds:.3g}", f"{step.held / MIB:.0f}", step.bound(self.machine)
        seconds = sum(step.seconds(self.machine) for step in self.steps)
        yield "all", f"{seconds:.3g}", f"{max(step.held for step in self.steps) / MIB:.0f}", ""


def plan(
    model: str,
    requests: int,
    *,
    algorithm: str | None = None,
    hparams: str | Path | None = None,
    stats_tokens: int | None = None,
    prompt_tokens: int = 16,
    dtype: str | None = None,
    device: str = "cpu",
    flops: float | None = None,
    bandwidth: float | None = None,
) -> Plan:
    """Plans an edit of `requests` without reading a weight; values are planned with all of their steps.

    Args:
        model: a packaged model, a folder, a Hugging Face id, or a configuration in a JSON file.
        algorithm, hparams: as for `editlib edit`; default: UniErase with the settings found for the model.
        stats_tokens: of the statistics; `None`: those that the algorithm's command takes.
        prompt_tokens: of a question as the model is asked, chat template included.
        dtype: of the weights; `None`: as stored.
        device: whose rates are measured.
        flops, bandwidth: those of another machine; see `Machine.scaled`.

    Raises:
        EditlibError: no such model, or settings that do not fit it.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if device == "auto":
        raise ModelError('device "auto": a plan is made of the rates of one device; expected one, such as cpu or cuda')
    check_device(device)
    config = config_of(model)
    size, shape = model_size(config, model), ModelShape.of(config, model_slug(model))
    settings = load_hparams(hparams, algorithm) if hparams else find_hparams(algorithm or "UniErase", shape)
    settings.check_depth(size.n_layers)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    kind = stored if dtype is None else DTYPES[dtype]
    machine = measure(config, kind, torch.device(device)).scaled(flops, bandwidth)
    tokens = stats_tokens or (STATS_TOKENS if settings.has_target else STATS_TOKENS_UNLEARN)
    steps = []
    if settings.uses_statistics:
        steps.append(costs.statistics(size, settings.layers, tokens))
    if settings.uses_token:
        learned = TokenHyperParams()
        steps.append(
            costs.token(
                size,
                steps=learned.steps,
                batch=learned.batch,
                questions=min(learned.questions, len(data.questions("train"))),
                guard_prompts=learned.guard_prompts,
                question_tokens=prompt_tokens,
                answer_tokens=learned.guard_tokens,
            )
        )
    if finds_values(settings):
        job = _job(settings, requests, prompt_tokens, size)
        steps += [costs.values(size, job), costs.solve(size, job)]
    steps.append(costs.save(size, kind.itemsize))
    return Plan(settings, size, machine, size.bytes(kind.itemsize), steps)


def _job(settings: ClosedFormHyperParams, requests: int, prompt_tokens: int, size: ModelSize) -> costs.Job:
    """Collects the numbers that the settings give. A null space by threshold is taken to keep out a quarter of the
    directions, and anchors to be as many as the bundled ones."""
    contexts = len(settings.context_templates or ()) or 6
    subjects = getattr(settings, "kl_subject_prompts", 0)
    return costs.Job(
        layers=settings.layers,
        requests=requests,
        contexts=contexts,
        prompt_tokens=prompt_tokens,
        target_tokens=3 if settings.has_target else 1,
        kl_prompts=(1 + subjects) if settings.kl_factor > 0 else 0,
        kl_tokens=max(1, getattr(settings, "kl_answer_tokens", 0)),
        steps=settings.v_num_grad_steps,
        kept_out=size.d_ff // 4,
        v_rate="fast" if settings.v_precision == "fast" else "model",
    )
