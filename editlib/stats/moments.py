"""Add up `k k^T`, and keep checkpoints so that a long pass can be interrupted at any time."""

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
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from editlib.distributed import ALONE, Process
from editlib.errors import StatsError
from editlib.files import atomic_path
from editlib.models.anatomy import Anatomy
from editlib.models.precision import exact_bf16_products
from editlib.stats.file import LayerStats, StatsHeader

log = logging.getLogger(__name__)

SLABS = 8  # slabs of rows in which half of a symmetric product is computed
GRAM_SHARE = (1 + 1 / SLABS) / 2  # share of the whole product that is computed
SAVING = 0.05  # share of the time that checkpoints may take: those of wide layers are gigabytes


class MomentSums:
    """Sums `k k^T` for several layers: products in fp32 on the keys' own device, summed in fp64 on the CPU.

    Keys are collected into blocks, so that the product is one large matrix multiplication per layer. With `flush` after
    every batch the blocks, and so the result, depend on the batches alone, not on interruptions or the number of
    processes.

    Only the entries on and above the diagonal are summed; those below it are undefined until `finish` mirrors them.
    """

    def __init__(self, layers: Sequence[int], d_ff: int, *, block: int = 4096) -> None:
        self.sums = {layer: torch.zeros(d_ff, d_ff, dtype=torch.float64) for layer in layers}
        self.tokens = 0
        self._block = block
        self._waiting: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        self._buffers: dict[torch.device, Buffers] = {}

    def add(self, layer: int, keys: Tensor) -> None:
        """Adds `keys [tokens, d_ff]` of one layer, on any device."""
        self._waiting[layer].append(keys)
        if sum(len(k) for k in self._waiting[layer]) >= self._block:
            self.flush(layer)

    def flush(self, *layers: int) -> None:
        """Adds the buffered keys of `layers`; by default, of all."""
        for layer in layers or self._waiting:
            waiting, self._waiting[layer] = self._waiting[layer], []
            if waiting:
                add_gram(self.sums[layer], waiting, self._buffers.setdefault(waiting[0].device, Buffers()))

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


class Buffers:
    """Holds memory that every block reuses: allocating it for each block would take longer than a copy."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def get(self, name: str, rows: int, columns: int, device: torch.device) -> Tensor:
        """Returns a buffer `[rows, columns]` in fp32 that still holds the numbers of its last use."""
        if name not in self._held or self._held[name].numel() < rows * columns:
            self._held[name] = torch.empty(rows * columns, device=device)
        return self._held[name][: rows * columns].view(rows, columns)


def add_gram(total: Tensor, blocks: Sequence[Tensor], buffers: Buffers) -> None:
    """Adds `Σ k k^T` of the keys `[tokens, d_ff]` of all `blocks` to `total [d_ff, d_ff]`, on and above the diagonal.

    The sum is symmetric, so this takes little more than half the operations of the whole product.
    """
    device, d_ff = blocks[0].device, len(total)
    keys = buffers.get("keys", sum(map(len, blocks)), d_ff, device)
    at = 0
    for block in blocks:
        keys[at : at + len(block)] = block  # widened to fp32
        at += len(block)
    with exact_bf16_products(blocks[0].dtype):
        for top, bottom in slabs(d_ff):
            product = buffers.get("product", bottom - top, d_ff - top, device)
            torch.mm(keys[:, top:bottom].T, keys[:, top:], out=product)
            total[top:bottom, top:] += product.cpu()


def mirror(total: Tensor) -> None:
    """Copies what lies above the diagonal of `total [d_ff, d_ff]` to below it, in place."""
    for top, bottom in slabs(len(total)):
        block = total[top:bottom, top:bottom]
        block.copy_(block.triu() + block.triu(1).T)
        total[bottom:, top:bottom] = total[top:bottom, bottom:].T


def slabs(d_ff: int, pieces: int = SLABS) -> list[tuple[int, int]]:
    """Cuts `d_ff` rows into slabs of about equal height: (first row, row after the last) of each."""
    borders = [d_ff * piece // pieces for piece in range(pieces + 1)]
    return list(pairwise(borders))


def finish(sums: MomentSums, anat: Anatomy, header: StatsHeader, documents: int) -> dict[int, LayerStats]:
    """Turns running sums into one `LayerStats` per layer, each with its own header; consumes the sums to save
    memory."""
    done = {}
    for layer in list(sums.sums):
        total = sums.sums.pop(layer)
        mirror(total)
        layer_header = replace(header, module=anat.mlp_output_names[layer], tokens=sums.tokens, documents=documents)
        done[layer] = LayerStats(total.to(torch.float32), sums.tokens, documents, layer_header)
    return done


class MomentCheckpoint:
    """Keeps the sums of one job in a file while its pass runs; without a path, nothing is saved.

    Args:
        job: all that determines the order of the work in addition to the header; only an equal job resumes a
            checkpoint.
        seconds: interval after which `due` is true; longer if saving takes more than a twentieth of the time.
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
        self.path.parent.mkdir(parents=True, exist_ok=True)
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
            with np.load(self.path, allow_pickle=False) as archive:
                state = json.loads(str(archive["state"]))
                same = state["job"] == self._job and {f"sum.{layer}" for layer in self._sums.sums} | {"state"} == set(
                    archive.files
                )
                if same:
                    totals = {layer: torch.from_numpy(archive[f"sum.{layer}"]) for layer in self._sums.sums}
                    if any(totals[layer].shape != total.shape for layer, total in self._sums.sums.items()):
                        raise ValueError("sums of another shape")
                    tokens, at, documents = int(state["tokens"]), int(state["batch"]), int(state["documents"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zlib.error, zipfile.BadZipFile):
            # This costs time, never correctness.
            log.warning("%s is damaged or of another version: starting from the beginning", self.path)
            return 0, 0
        if not same:
            raise StatsError(
                f"{self.path} is the checkpoint of another job (other model, corpus, layers or options); remove it"
            )
        self._sums.sums.update(totals)
        self._sums.tokens = tokens
        log.info("resuming after %d tokens (%s)", tokens, self.path)
        return at, documents


def drop_checkpoint(path: Path, shard: Process = ALONE) -> None:
    """Removes this process's checkpoint at `path`."""
    shard.own(path).unlink(missing_ok=True)


@contextmanager
def held_interrupts() -> Iterator[Callable[[], bool]]:
    """Makes Ctrl-C wait inside the block until the caller asks for it, so that sums are never saved half added.

    Yields a function that returns whether Ctrl-C was pressed; a second Ctrl-C acts at once. If the block ends without a
    call of the function, the interruption is raised then.
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
