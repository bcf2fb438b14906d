"""Cache what is computed from layer statistics, beside their file: factors and bases.

Peers decompose the same matrices in every run; at `d_ff` 14336 that takes longer than the edit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from editlib.errors import OutputError
from editlib.files import atomic_path
from editlib.models.precision import wide_dtype
from editlib.stats.file import LayerStats

log = logging.getLogger(__name__)

OUT_OF_MEMORY = getattr(torch, "OutOfMemoryError", MemoryError)  # since torch 2.5
FORMAT = "1"  # raised when the content of kept files changes


def kept_beside(
    stats: LayerStats, kind: str, compute: Callable[[Tensor], dict[str, Tensor]], device: torch.device | None = None
) -> dict[str, Tensor]:
    """Returns the tensors that `compute` makes from the second moment, read from `<statistics file>.<kind>.safetensors`
    when they were made from these very sums before, and written there otherwise.

    Statistics that lie in no file are computed from each time. A folder that cannot be written costs time only.

    Args:
        compute: given `C [d_ff, d_ff]` in fp64.
        device: where it is computed, if it has fp64 and room; the result is on the CPU in any case. Devices
            differ in the last bits; whichever result is cached first is used by all later edits.
    """

    def make() -> dict[str, Tensor]:
        if device is not None and wide_dtype(device) == torch.float64:
            try:
                return {name: value.cpu() for name, value in compute(stats.moment().to(device)).items()}
            except OUT_OF_MEMORY:
                log.info("the device has no memory left for the statistics: decomposing them on the CPU")
        return compute(stats.moment())

    if stats.path is None:
        return make()
    path = stats.path.with_name(f"{stats.path.stem}.{kind}.safetensors")
    made_from = {"sums": stats.sha256(), "format": FORMAT}
    try:
        with safe_open(path, "pt") as file:
            if file.metadata() == made_from:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        pass  # none there, or one that was damaged
    made = make()
    try:
        with atomic_path(path) as temporary:
            save_file({name: value.contiguous() for name, value in made.items()}, temporary, metadata=made_from)
    except OutputError as error:
        log.debug("%s", error)
    return made
