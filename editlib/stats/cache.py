"""Cache factors and bases computed from layer statistics, in files beside the statistics.

At `d_ff` 14336 the decomposition takes longer than the edit; other libraries repeat it in every run.
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
FORMAT = "1"  # increased when the content of cached files changes


def kept_beside(
    stats: LayerStats, kind: str, compute: Callable[[Tensor], dict[str, Tensor]], device: torch.device | None = None
) -> dict[str, Tensor]:
    """Returns the tensors that `compute` makes from the second moment. They are read from
    `<statistics file>.<kind>.safetensors` if that was made from the same sums, and otherwise computed and written
    there.

    Nothing is cached for statistics without a file, or in a folder that cannot be written.

    Args:
        compute: called with `C [d_ff, d_ff]` in fp64.
        device: where it is computed, if the device has fp64 and enough memory; the result is always on the CPU. Devices
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
        pass  # missing or damaged
    made = make()
    try:
        with atomic_path(path) as temporary:
            save_file({name: value.contiguous() for name, value in made.items()}, temporary, metadata=made_from)
    except OutputError as error:
        log.debug("%s", error)
    return made
