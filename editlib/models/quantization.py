"""Round a model's weights to few bits inside a block, without losing a bit of the original ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from editlib.errors import ModelError
from editlib.models.anatomy import Anatomy


def linear_maps(anat: Anatomy) -> dict[str, nn.Linear | Conv1D]:
    """Returns the linear maps (`Linear`, `Conv1D`) of the decoder layers by name, each once; not the head."""
    maps: dict[int, tuple[str, nn.Linear | Conv1D]] = {}
    for prefix, layer in zip(anat.layer_names, anat.layers, strict=True):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                maps.setdefault(id(module), (f"{prefix}.{name}", module))
    return dict(maps.values())


def check_in_memory(anat: Anatomy) -> None:
    """Raises `ModelError` if a weight is offloaded, so that it cannot be replaced."""
    for name, module in linear_maps(anat).items():
        if module.weight.is_meta:
            raise ModelError(
                f"{name} is offloaded, so its weight cannot be replaced for an attack; load the model so that it fits "
                "in memory (device_map, or dtype bfloat16), or leave out attacks that change weights"
            )


@contextmanager
def quantized(anat: Anatomy, bits: int) -> Iterator[None]:
    """Quantises every linear map of the decoder layers to `bits` bits inside the block; then the original tensors are
    restored.

    Round to nearest, symmetric, one scale per output channel, without calibration: `scale = max |w| / (2^(bits-1) - 1)`
    over the channel, `w -> scale * round(w / scale)`, the absmax quantisation of arXiv 2208.07339. Computed in fp32 and
    stored in the weight's own dtype; activations, biases, norms, embeddings and head stay as they are.

    Raises:
        ModelError: a weight is offloaded.
    """
    check_in_memory(anat)
    originals: dict[nn.Parameter, Tensor] = {}
    try:
        for module in linear_maps(anat).values():
            weight = cast(nn.Parameter, module.weight)
            if weight not in originals:  # a matrix that layers share is rounded once
                originals[weight] = weight.data
                weight.data = round_channels(weight.data, bits, channel=int(isinstance(module, Conv1D)))
        yield
    finally:
        for parameter, data in originals.items():
            parameter.data = data


def round_channels(weight: Tensor, bits: int, *, channel: int = 0) -> Tensor:
    """Rounds a matrix to `2^bits - 1` levels, with one scale for each index of dimension `channel`."""
    full = weight.float()  # [rows, columns]
    most = 2 ** (bits - 1) - 1
    scale = full.abs().amax(1 - channel, keepdim=True) / most  # [rows, 1] or [1, columns]
    scale = torch.where(scale > 0, scale, 1.0)  # a channel of zeros stays one
    return ((full / scale).round().clamp(-most, most) * scale).to(weight.dtype)
