"""Choose the trained parameters: all weights of a model, or a LoRA adapter that is merged at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from editlib.errors import ModelError
from editlib.models.anatomy import Anatomy
from editlib.models.lora import lora_adapter
from editlib.models.precision import fp32_params


@contextmanager
def trainable(anat: Anatomy, *, rank: int | None = None, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Yields the parameters to train by their names, in fp32 inside the block.

    Args:
        rank: rank of a LoRA adapter on every linear map of the layers (2106.09685), initialised from `seed` and merged
            into the weights at the end of the block, unless it ends in an error; `None`: train all parameters.

    Raises:
        ModelError: a weight is offloaded, or `peft` is missing for an adapter.
    """
    check_whole(anat)
    with fp32_params(anat.model):
        if rank is None:
            yield dict(anat.model.named_parameters())
            return
        with lora_adapter(anat, rank=rank, seed=seed) as parameters:
            mine = {id(parameter) for parameter in parameters}
            yield {name: p for name, p in anat.model.named_parameters() if id(p) in mine}
            with torch.no_grad():
                updates = {name: _delta_weight(anat, name) for name in linear_maps_inside(anat)}
        with torch.no_grad():
            for name, update in updates.items():
                anat.model.get_parameter(f"{name}.weight").add_(update)


def _delta_weight(anat: Anatomy, name: str) -> Tensor:
    """Returns the update `[d_out, d_in]` that an adapter adds to the linear map `name`."""
    module: Any = anat.model.get_submodule(name)  # PEFT's layer, which torch's types do not know
    return module.get_delta_weight("default")


def linear_maps_inside(anat: Anatomy) -> list[str]:
    """Returns the names of the modules that carry an adapter."""
    return [name for name, module in anat.model.named_modules() if hasattr(module, "get_delta_weight")]


def check_whole(anat: Anatomy) -> None:
    """Raises `ModelError` if a parameter is offloaded and so cannot be trained."""
    for name, parameter in anat.model.named_parameters():
        if parameter.is_meta:
            raise ModelError(
                f"{name} is offloaded and cannot be trained; load the model so that it fits in memory (device_map, or "
                "dtype bfloat16)"
            )
