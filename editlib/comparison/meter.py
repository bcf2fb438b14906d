"""Measure the cost of a method: time, memory, and the weights that it changed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from transformers import PreTrainedModel

from editlib.models.placement import stored_tensors

EVERY = 0.02  # seconds between two measurements of memory
MIB = 1024 * 1024


@dataclass
class Meter:
    """Holds the cost of a block; filled when the block ends.

    `memory_mb` is the largest observed resident memory of the process in MiB, `more_mb` the same minus the memory at
    the start of the block, `accelerator_mb` the peak allocation on the accelerator (`None`: there is none, or it does
    not report it).
    """

    seconds: float = 0.0
    memory_mb: float = 0.0
    more_mb: float = 0.0
    accelerator_mb: float | None = None


@contextmanager
def measure_resources() -> Iterator[Meter]:
    """Measures the block; a peak shorter than `EVERY` seconds may be missed."""
    process, meter, stop = psutil.Process(), Meter(), threading.Event()
    begun_with = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not stop.wait(EVERY):
            peak = max(peak, process.memory_info().rss)

    api = getattr(torch, "accelerator", None)
    if api is not None and not (api.is_available() and hasattr(api, "max_memory_allocated")):
        api = None
    if api is not None:
        api.reset_peak_memory_stats()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    begun = time.perf_counter()
    try:
        yield meter
    finally:
        meter.seconds = time.perf_counter() - begun
        stop.set()
        watcher.join()
        peak = max(peak, process.memory_info().rss)
        meter.memory_mb, meter.more_mb = peak / MIB, (peak - begun_with) / MIB
        if api is not None:
            meter.accelerator_mb = api.max_memory_allocated() / MIB


@dataclass(frozen=True)
class ChangedWeights:
    """Counts weights of the edited model that differ from the base's: their number, the total, the tensors, their
    bytes."""

    weights: int
    of: int
    tensors: int
    bytes: int


def changed_weights(base: PreTrainedModel, edited: PreTrainedModel) -> ChangedWeights:
    """Compares two models bit for bit; rows that were added (a token's) count. Tied weights count once."""
    before, seen = dict(stored_tensors(base)), set()
    weights = of = tensors = size = 0
    for name, now in stored_tensors(edited):
        place = (now.data_ptr(), now.shape)
        if now.numel() and place in seen:
            continue
        seen.add(place)
        of += now.numel()
        then = before.get(name)
        other = now.numel() if then is None else _differing(then, now)
        weights, tensors, size = weights + other, tensors + bool(other), size + other * now.element_size()
    return ChangedWeights(weights, of, tensors, size)


def _differing(then: torch.Tensor, now: torch.Tensor) -> int:
    if then.shape == now.shape:
        return int((then != now).sum())
    if then.shape[1:] != now.shape[1:]:
        return now.numel()
    rows = min(len(then), len(now))
    return int((then[:rows] != now[:rows]).sum()) + now[rows:].numel()
