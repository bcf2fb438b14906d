"""Run the training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from editlib.errors import EditError
from editlib.models.anatomy import Anatomy
from editlib.models.precision import fast_dtype
from editlib.training.checkpoint import Checkpoint
from editlib.training.parts import Part
from editlib.training.reading import passes, read
from editlib.training.settings import TrainSettings

PASS_TOKENS, PASS_LEARNED = 2048, 1024


@dataclass
class TrainResult:
    """Holds the results of a training run. `losses` holds the whole loss before each step, `parts` that of each part,
    unweighted; `parameters` counts the trained numbers, `tokens` the tokens read; `seconds` is the time of this
    process."""

    steps: int
    losses: list[float]
    parts: dict[str, list[float]]
    parameters: int
    tokens: int = 0
    seconds: float = 0.0
    notes: dict[str, object] = field(default_factory=dict)


def train(
    anat: Anatomy,
    parts: Sequence[Part],
    parameters: Mapping[str, Tensor],
    settings: TrainSettings,
    *,
    checkpoint: Checkpoint | None = None,
    watch: Callable[[int], None] | None = None,
    watched: Sequence[int] = (),
    progress: str | None = None,
) -> TrainResult:
    """Changes `parameters` (fp32) in place so that the weighted sum of `parts` falls.

    The same call gives the same bytes on the same machine with the same number of threads, also if it was resumed from
    a checkpoint.

    Args:
        checkpoint: written during the run, and resumed from.
        watch: called with the number of steps done, at each of `watched`.
        progress: a label for a progress bar on stderr; none without it.

    Raises:
        EditError: the loss is not finite. The parameters then keep their last values, and the caller must restore them.
        OutputError: a checkpoint of another job, or one that cannot be written.
    """
    begun = time.perf_counter()
    named = dict(parameters)
    result = TrainResult(0, [], {part.name: [] for part in parts}, sum(p.numel() for p in named.values()))
    dtype = product_dtype(anat, settings)
    with _free(anat, named.values()):
        optimiser = torch.optim.AdamW(
            named.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        if checkpoint is not None:
            result.steps, notes = checkpoint.load(named, optimiser)
            result.losses, result.tokens = notes.get("losses", []), notes.get("tokens", 0)
            result.parts.update(notes.get("parts", {}))
        written = time.perf_counter()
        bar = tqdm(total=settings.steps, initial=result.steps, desc=progress, disable=progress is None, leave=False)
        with bar:
            for step in range(result.steps, settings.steps):
                for group in optimiser.param_groups:
                    group["lr"] = settings.rate(step)
                optimiser.zero_grad()
                loss = _step(anat, parts, settings, step, dtype, result)
                if settings.max_grad_norm is not None:
                    torch.nn.utils.clip_grad_norm_(named.values(), settings.max_grad_norm)
                optimiser.step()
                result.steps = step + 1
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
                if checkpoint is not None and time.perf_counter() - written > checkpoint.seconds:
                    notes = {"losses": result.losses, "parts": result.parts, "tokens": result.tokens}
                    checkpoint.save(named, optimiser, result.steps, notes)
                    written = time.perf_counter()
                if watch is not None and result.steps in watched:
                    optimiser.zero_grad()
                    watch(result.steps)
        optimiser.zero_grad()
    result.seconds = time.perf_counter() - begun
    return result


def _step(
    anat: Anatomy,
    parts: Sequence[Part],
    settings: TrainSettings,
    step: int,
    dtype: torch.dtype | None,
    result: TrainResult,
) -> float:
    """Accumulates the gradient of one step; returns its loss."""
    whole = 0.0
    for part in parts:
        numbers = part.batch(step, settings.batch_size, settings.seed)
        loss = 0.0
        for indices, value in _losses(anat, part, numbers, dtype):
            if not torch.isfinite(value):
                raise EditError(f"the loss ({part.name}) is not finite in step {step + 1}; lower the learning rate")
            (part.weight * value).backward()
            loss += float(value.detach())
            result.tokens += sum(len(row) for i in indices for row in part.items[i])
        result.parts[part.name].append(loss)
        whole += part.weight * loss
    result.losses.append(whole)
    return whole


def _losses(
    anat: Anatomy, part: Part, numbers: Sequence[int], dtype: torch.dtype | None
) -> Iterator[tuple[list[int], Tensor]]:
    """Yields the items of each pass and its term in the batch's mean."""
    learned = sum(row.extra for i in numbers for row in part.items[i])
    divisor = learned if part.per == "token" else len(numbers)
    for indices in passes(part.items, numbers, tokens=PASS_TOKENS, learned=PASS_LEARNED):
        reading = read(anat, [part.items[i] for i in indices], indices, layer=part.layer, dtype=dtype)
        yield indices, part.loss(reading).sum() / divisor


def mean_loss(anat: Anatomy, part: Part, settings: TrainSettings | None = None) -> float:
    """Computes the current model's loss over all items of a part, unweighted."""
    settings = settings or TrainSettings()
    with torch.no_grad():
        losses = _losses(anat, part, range(len(part.items)), product_dtype(anat, settings))
        return float(sum(value for _, value in losses))


def product_dtype(anat: Anatomy, settings: TrainSettings) -> torch.dtype | None:
    """Returns the dtype of a run's matrix products; `None`: that of the weights."""
    if settings.precision == "auto":
        return fast_dtype(anat.model)
    return torch.bfloat16 if settings.precision == "bfloat16" else None


@contextmanager
def _free(anat: Anatomy, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Lets only `parameters` require gradients inside the block, with the model in evaluation mode (without dropout a
    run is reproducible); afterwards everything is restored."""
    wanted: dict[Tensor, bool] = {parameter: parameter.requires_grad for parameter in anat.model.parameters()}
    training = [module for module in anat.model.modules() if module.training]
    mine = list(parameters)
    for parameter in wanted:
        parameter.requires_grad_(False)
    for parameter in mine:
        parameter.requires_grad_(True)
    anat.model.eval()
    try:
        yield
    finally:
        for parameter in mine:
            parameter.requires_grad_(wanted.get(parameter, False))
            parameter.grad = None
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
        for module in training:
            module.training = True
