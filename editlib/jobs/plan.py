"""Estimate time and memory of each step of an edit, from a model's configuration and a few seconds of measuring."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from editlib import data
from editlib.algorithms import costs
from editlib.algorithms.machine import Machine, measure
from editlib.algorithms.unierase.proportion import FEWEST_ANCHORS, share_of
from editlib.algorithms.unierase.token_learning import TokenHyperParams
from editlib.algorithms.work import Rate, Step
from editlib.errors import ModelError
from editlib.hparams import (
    ClosedFormHyperParams,
    HyperParams,
    ModelShape,
    UniEraseHyperParams,
    find_hparams,
    finds_values,
    load_hparams,
    takes_retain,
)
from editlib.hparams.derive import DESCENT, ROWS
from editlib.models.loading import DTYPES, check_device
from editlib.models.size import ModelSize, config_of, model_size
from editlib.stats.store import model_slug

STATS_TOKENS, STATS_TOKENS_UNLEARN = 100_000, 20_000
GENERAL_STEP = 4  # every fourth bundled question is answered before refusal tokens are fitted
MIB = 1024 * 1024


@dataclass(frozen=True)
class Plan:
    """Holds the steps of a job on a machine, its settings, and the bytes of the weights."""

    settings: HyperParams
    size: ModelSize
    machine: Machine
    weights: int
    steps: list[Step]

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """Yields head, steps and total as a table: time, MiB beyond the weights, and what bounds the time."""
        yield "step", "time", "MiB beyond the weights", "bound by"
        for step in self.steps:
            seconds = step.seconds(self.machine)
            yield step.name, readable(seconds), f"{step.held / MIB:.0f}", step.bound(self.machine)
        seconds = sum(step.seconds(self.machine) for step in self.steps)
        yield "all", readable(seconds), f"{max(step.held for step in self.steps) / MIB:.0f}", ""


def readable(seconds: float) -> str:
    """Formats a duration with its unit, to about two digits, since an estimate is not more precise."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 99.5 else f"{minutes / 60:.1f} h"


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
    """Plans an edit of `requests` without reading weights; assumes that values take all of their steps.

    Args:
        model: a packaged model, a folder, a Hugging Face id, or a configuration in a JSON file.
        algorithm, hparams: as for `editlib edit`; default: as `editlib unlearn` finds them for requests with answers.
        stats_tokens: tokens of the statistics; `None`: the default of the algorithm's command.
        prompt_tokens: tokens of a question as the model is asked, chat template included.
        dtype: dtype of the weights; `None`: as stored.
        device: the device whose rates are measured.
        flops, bandwidth: rates of another machine; see `Machine.scaled`.

    Raises:
        EditlibError: no such model, or settings that do not fit it.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if device == "auto":
        raise ModelError('device "auto": a plan uses the rates of one device; expected one, such as cpu or cuda')
    check_device(device)
    config = config_of(model)
    size, shape = model_size(config, model), ModelShape.of(config, model_slug(model))
    if hparams:
        settings = load_hparams(hparams, algorithm)
    else:  # as `editlib unlearn` finds them for requests with answers, and `editlib edit` by its --algorithm
        settings = find_hparams(algorithm or "UniErase", shape, values=DESCENT if algorithm else ROWS)
    settings.check_depth(size.n_layers)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    kind = stored if dtype is None else DTYPES[dtype]
    machine = measure(config, kind, torch.device(device)).scaled(flops, bandwidth)
    tokens = stats_tokens or (STATS_TOKENS if settings.has_target else STATS_TOKENS_UNLEARN)
    steps = _steps(settings, size, requests, prompt_tokens, tokens, kind.itemsize)
    if kind == torch.float32:
        steps = [costs.with_copy(step, size) for step in steps]
    steps.append(costs.save(size, kind.itemsize))
    return Plan(settings, size, machine, size.bytes(kind.itemsize), steps)


def _steps(
    settings: HyperParams, size: ModelSize, requests: int, prompt_tokens: int, stats_tokens: int, itemsize: int
) -> list[Step]:
    """Lists the steps of an edit with these settings, except saving the model."""
    steps = []
    if settings.uses_statistics:
        steps.append(costs.statistics(size, settings.statistics_layers, stats_tokens, settings.decomposition))
    if settings.uses_token:
        steps.append(_token(size, prompt_tokens))
    if settings.trained_steps:
        steps.append(costs.descent(size, requests, prompt_tokens, settings.trained_steps))
    if not finds_values(settings):
        return steps
    job = settings_job(settings, requests, prompt_tokens, size)
    edited = _edit_steps(settings, size, job, itemsize)
    if settings.uses_statistics:
        edited = [costs.with_statistics(step, size) for step in edited]
    return [*steps, *edited]


def _edit_steps(settings: ClosedFormHyperParams, size: ModelSize, job: costs.Job, itemsize: int) -> list[Step]:
    """Lists the steps from the retain prompts' answers to the refusal tokens."""
    solve = costs.solve(size, job, itemsize=itemsize)
    if takes_retain(settings) and settings.neurons:
        solve = costs.neurons(size, job, itemsize=itemsize)
    if not takes_retain(settings) or not settings.values_from_rows:
        held = [costs.anchors(size, job)] if job.anchors else []
        return [*held, costs.values(size, job), solve]
    others, said = (settings.other_subjects, settings.token_wordings) if settings.say else (0, None)
    # If tokens are fitted, retain prompts are answered in the rows' dtype.
    held = [costs.anchors(size, job, job.v_rate if settings.say else "model")] if job.anchors else []
    steps = [*held, costs.row_values(size, job, others=others, said=said), solve]
    if settings.say:
        # Values are written, moved for the tokens, and written again.
        steps[-1] = replace(solve, work=[*solve.work, *solve.work])
        general = len(data.questions("train")) // GENERAL_STEP
        tokens = costs.refusal_tokens(
            size,
            job,
            steps=settings.token_steps,
            wordings=settings.token_wordings,
            general=general,
            others=others,
        )
        steps.append(tokens)
    return steps


def _token(size: ModelSize, prompt_tokens: int) -> Step:
    """Estimates the unlearning token, as the command learns it."""
    learned = TokenHyperParams()
    return costs.token(
        size,
        steps=learned.steps,
        batch=learned.batch,
        questions=min(learned.questions, len(data.questions("train"))),
        guard_prompts=learned.guard_prompts,
        question_tokens=prompt_tokens,
        answer_tokens=learned.guard_tokens,
    )


def settings_job(settings: ClosedFormHyperParams, requests: int, prompt_tokens: int, size: ModelSize) -> costs.Job:
    """Derives the sizes of an edit from its settings. Assumes that a null space by threshold excludes a quarter of the
    directions, and that anchors are the default ones without retain prompts."""
    v_rate: Rate = "fast" if settings.v_precision == "fast" else "model"
    if not takes_retain(settings):
        return costs.Job(
            layers=settings.layers,
            requests=requests,
            contexts=len(settings.context_templates or ()) or 6,
            prompt_tokens=prompt_tokens,
            kl_prompts=int(settings.kl_factor > 0),
            steps=settings.v_num_grad_steps,
            kept_out=size.d_ff // 4,
            v_rate=v_rate,
        )
    from_rows = settings.values_from_rows
    anchors = _anchors(settings, requests) if settings.anchors else 0
    return costs.Job(
        layers=settings.layers,
        requests=requests,
        contexts=len(settings.context_templates) * (1 + settings.wordings),
        prompt_tokens=prompt_tokens,
        target_tokens=1,
        kl_prompts=(1 + settings.kl_subject_prompts) if settings.kl_factor > 0 else 0,
        kl_tokens=max(1, settings.kl_answer_tokens),
        steps=settings.row_steps if from_rows else settings.v_num_grad_steps,
        anchors=anchors,
        kept_out=size.d_ff // 4,
        v_rate=v_rate,
        dense=settings.text_weight > 0,
        wordings=settings.wordings,
        siblings=settings.siblings,
        examples=min(settings.example_wordings, 1 + settings.wordings),
        left_metric=from_rows and settings.left_weight > 0,
    )


def _anchors(settings: UniEraseHyperParams, requests: int) -> int:
    """Counts the anchors of an edit without given retain prompts."""
    bundled = len(data.retain_prompts([]))
    usual = share_of(bundled, requests, fewest=FEWEST_ANCHORS) if settings.values_from_rows else bundled
    return usual if settings.max_anchors is None else min(usual, settings.max_anchors)
