"""Split one job among several processes, as started by `torchrun`: share the work, add up sums, share errors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from editlib.errors import EditlibError

T = TypeVar("T")
PIECE = 2**23  # numbers added up at a time: 64 MiB of fp64, to leave memory on an accelerator


@dataclass(frozen=True)
class Process:
    """Describes one of `world` processes that share a job; by default the only one.

    `device` is this process's own accelerator; `None`: it works on the CPU, where sums are exchanged too.
    """

    rank: int = 0
    world: int = 1
    device: torch.device | None = None

    @property
    def first(self) -> bool:
        """True for the one process that writes files and prints."""
        return self.rank == 0

    def label(self, work: str) -> str:
        """Returns the label of a progress bar over this process's part of some work."""
        return work if self.world == 1 else f"{work} (1 of {self.world} processes)"

    def share(self, items: Iterable[T]) -> Iterator[T]:
        """Returns every `world`-th of `items`, from the `rank`-th on: together the processes see each item once."""
        return islice(items, self.rank, None, self.world)

    def own(self, path: Path) -> Path:
        """Returns `path` for the only process, a distinct name for each of several."""
        return path if self.world == 1 else path.with_name(f"{path.stem}.{self.rank}-of-{self.world}{path.suffix}")

    def gather(self, value: T) -> list[T]:
        """Gathers the value of every process, by rank. All must call it."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def add_up(self, total: Tensor) -> None:
        """Replaces `total [rows, ...]`, on the CPU, by its sum over all processes, in its own dtype."""
        if self.world == 1:
            return
        for piece in total.split(max(1, PIECE // max(total[0].numel(), 1))):
            moved = piece.to(self.device or piece.device)
            dist.all_reduce(moved)
            piece.copy_(moved)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raises a user's mistake in all processes if any of them meets it in the block, so that none waits.

        No process may call `gather` or `add_up` inside it.
        """
        mine: EditlibError | None = None
        try:
            yield
        except EditlibError as error:
            mine = error
        errors = [error for error in self.gather(mine) if error is not None]
        if errors:
            raise mine or errors[0]


ALONE = Process()


@contextmanager
def processes(*, accelerators: bool = True) -> Iterator[Process]:
    """Yields this process's share of a job started by `torchrun` (or `accelerate launch`); without these, the whole
    job.

    An existing process group is used and not closed.

    Args:
        accelerators: give each process its own accelerator, if the machine has enough of them.

    Raises:
        EditlibError: the processes do not find each other.
    """
    if not dist.is_available() or not (dist.is_initialized() or _launched()):
        yield ALONE
        return
    if dist.is_initialized():
        on_host = "cpu:" in str(dist.get_backend_config())
        yield Process(dist.get_rank(), dist.get_world_size(), None if on_host else _own_accelerator())
        return
    device = _own_accelerator() if accelerators else None
    try:
        dist.init_process_group(backend(device.type if device else "cpu"))
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise EditlibError(f"the processes cannot reach each other ({reason}); start them with torchrun") from None
    try:
        yield Process(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def backend(kind: str) -> str:
    """Returns the backends of a job whose models run on devices of this kind: gloo for the CPU, and the kind's own."""
    device_backend = dist.Backend.default_device_backend_map.get(kind, "gloo")
    return "gloo" if device_backend == "gloo" else f"cpu:gloo,{kind}:{device_backend}"


def _launched() -> bool:
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in needed) and os.environ["WORLD_SIZE"] != "1"


def _own_accelerator() -> torch.device | None:
    """Returns the accelerator for this process's local rank; `None` if there are too few."""
    api = getattr(torch, "accelerator", None)  # since torch 2.6
    place, here = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if api is None or not api.is_available() or api.device_count() < here:
        return None
    api.set_device_index(place)
    return torch.device(api.current_accelerator().type, place)
