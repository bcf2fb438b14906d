"""Running sums of `k k^T`, and the checkpoints that let a long pass be interrupted at any time."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from editlib.distributed import ALONE, Process
from editlib.errors import StatsError
from editlib.files import atomic_path
from editlib.models.anatomy import Anatomy
from editlib.stats.file import LayerStats, StatsHeader

log = logging.getLogger(__name__)

SAVING = 0.05  # share of the time that checkpoints may take: those of wide layers are gigabytes


class MomentSums:
    """Sums `k k^T` for several layers: fp32 products on the keys' own device, added up in fp64 on the CPU.

    Keys are collected into blocks, so that the product is one large matrix multiplication a layer. `flush` after
    every batch makes the blocks, and with them the result, those of the batches, however often a pass was
    interrupted and on however many processes it ran.
    """

    def __init__(self, layers: Sequence[int], d_ff: int, *, block: int = 4096) -> None:
        self.sums = {layer: torch.zeros(d_ff, d_ff, dtype=torch.float64) for layer in layers}
        self.tokens = 0
        self._block = block
        self._waiting: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def add(self, layer: int, keys: Tensor) -> None:
        """Adds `keys [tokens, d_ff]` of one layer, on any device."""
        self._waiting[layer].append(keys.to(torch.float32))
        if sum(len(k) for k in self._waiting[layer]) >= self._block:
            self._flush(layer)

    def _flush(self, layer: int) -> None:
        if self._waiting[layer]:
            keys = torch.cat(self._waiting[layer])
            self.sums[layer] += gram(keys).cpu()
            self._waiting[layer] = []

    def flush(self) -> None:
        """Adds everything that still waits."""
        for layer in self._waiting:
            self._flush(layer)

    def clear(self) -> None:
        """Sets all sums and counts back to zero."""
        for total in self.sums.values():
            total.zero_()
        self.tokens = 0

    def add_up(self, shard: Process) -> None:
        """Replaces the sums of this process by those of all."""
        self.flush()
        for layer in sorted(self.sums):
            shard.add_up(self.sums[layer])
        self.tokens = sum(shard.gather(self.tokens))


def gram(keys: Tensor, pieces: int = 8) -> Tensor:
    """Computes `Σ k k^T [d_ff, d_ff]` of `keys [tokens, d_ff]`, which is symmetric: what lies on and above the diagonal
    is computed, in slabs of rows, and mirrored. That is little more than half the operations of the whole product."""
    d_ff = keys.shape[1]
    total = keys.new_empty(d_ff, d_ff)
    for piece in range(pieces):
        top, bottom = d_ff * piece // pieces, d_ff * (piece + 1) // pieces
        slab = keys[:, top:bottom].T @ keys[:, top:]
        total[top:bottom, top:] = slab
        total[bottom:, top:bottom] = slab[:, bottom - top :].T
    return total


def finish(sums: MomentSums, anat: Anatomy, header: StatsHeader, documents: int) -> dict[int, LayerStats]:
    """Turns running sums into one `LayerStats` a layer, each with its own header; uses them up, for their memory."""
    done = {}
    for layer in list(sums.sums):
        total = sums.sums.pop(layer)
        own = replace(header, module=anat.mlp_output_names[layer], tokens=sums.tokens, documents=documents)
        done[layer] = LayerStats(total.to(torch.float32), sums.tokens, documents, own)
    return done


class Checkpoint:
    """Keeps the sums of one job in a file while its pass runs; without a path, nothing is kept.

    Args:
        job: what else decides the order of the work, beside the header: a checkpoint is continued only by the same.
        seconds: how often `due` says so; less often when saving takes more than a twentieth of the time.
    """

    def __init__(
        self, path: Path | None, header: StatsHeader, sums: MomentSums, *, job: Mapping[str, Any], seconds: float
    ) -> None:
        self.path = path
        self._sums = sums
        self._job = {"header": asdict(header), **job}
        self._seconds = seconds
        self._due = time.monotonic() + seconds

    @property
    def due(self) -> bool:
        return self.path is not None and time.monotonic() > self._due

    def save(self, at: int, documents: int) -> None:
        """Writes the sums so far; `at` is the next batch."""
        if self.path is None:
            return
        started = time.monotonic()
        self._sums.flush()
        arrays: dict[str, Any] = {f"sum.{layer}": total.numpy() for layer, total in self._sums.sums.items()}
        state = {"job": self._job, "batch": at, "tokens": self._sums.tokens, "documents": documents}
        with atomic_path(self.path) as temporary, temporary.open("wb") as out:
            np.savez(out, state=np.array(json.dumps(state)), **arrays)
        ended = time.monotonic()
        self._due = ended + max(self._seconds, (ended - started) / SAVING)

    def resume(self) -> tuple[int, int]:
        """Fills the sums from the file; (next batch, documents begun), both 0 when there is none or it is damaged.

        Raises:
            StatsError: the checkpoint of another job.
        """
        if self.path is None or not self.path.exists():
            return 0, 0
        try:
            with np.load(self.path, allow_pickle=False) as found:
                state = json.loads(str(found["state"]))
                same = state["job"] == self._job and {f"sum.{layer}" for layer in self._sums.sums} | {"state"} == set(
                    found.files
                )
                if same:
                    totals = {layer: torch.from_numpy(found[f"sum.{layer}"]) for layer in self._sums.sums}
                    if any(totals[layer].shape != total.shape for layer, total in self._sums.sums.items()):
                        raise ValueError("sums of another shape")
                    tokens, at, documents = int(state["tokens"]), int(state["batch"]), int(state["documents"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zlib.error, zipfile.BadZipFile):
            # It costs time, never correctness.
            log.warning("%s is damaged or of another version: starting from the beginning", self.path)
            return 0, 0
        if not same:
            raise StatsError(
                f"{self.path} is the checkpoint of another job (other model, corpus, layers or options); remove it"
            )
        self._sums.sums.update(totals)
        self._sums.tokens = tokens
        log.info("going on after %d tokens (%s)", tokens, self.path)
        return at, documents


def drop_checkpoint(path: Path, shard: Process = ALONE) -> None:
    """Removes what this process kept at `path`."""
    shard.own(path).unlink(missing_ok=True)


@contextmanager
def held_interrupts() -> Iterator[Callable[[], bool]]:
    """Makes Ctrl-C wait inside the block until the caller asks for it, so that sums are never saved half added.

    Yields a function that says whether Ctrl-C was pressed; a second one acts at once. Whoever leaves the block
    without having asked is interrupted then.
    """
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield lambda: False
        return
    pressed: list[int] = []

    def note(number: int, frame: Any) -> None:
        if pressed:
            usual(number, frame)
        pressed.append(number)
        log.warning("stopping after this batch; Ctrl-C again stops at once")

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, usual)
    if pressed:
        raise KeyboardInterrupt
