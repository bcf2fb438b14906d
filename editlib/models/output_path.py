"""Convert changes of an MLP output matrix's output to changes of the residual stream, and back."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from editlib.errors import ModelError
from editlib.models.inversion import nearest
from editlib.models.placement import in_memory
from editlib.models.precision import wide_dtype


@dataclass(frozen=True)
class OutputPath:
    """Describes how the output of an MLP output matrix reaches the residual stream.

    A change `x` of the matrix's output changes the layer's output by `scale * (post(c + gain x) - post(c))`. `post` is
    a module of the layer (a norm after the MLP) and `c` its input, mostly the matrix's own output `W k + b`; without
    `post` the change is `scale * x`.
    """

    post: nn.Module | None = None
    scale: float = 1.0
    gain: float = 1.0

    @property
    def plain(self) -> bool:
        """Whether the layer's output changes by exactly what the matrix's output changes."""
        return self.post is None and self.scale == 1.0

    def invert(self, current: Tensor, wanted: Tensor) -> Tensor:
        """Returns the change of the matrix's output that changes the layer's output by `wanted`.

        A norm fixes the length of its output, so not every change can be reached: the result is then the nearest in the
        least-squares sense (`inversion.nearest`), and `apply` gives the change it really makes. Each column is solved
        by itself, in fp64 where the device has it; deterministic.

        Args:
            current: `[d_model, n]`, the current input of `post` at these positions (`W k + b` for a norm right after
                the MLP). Not read without `post`.
            wanted: `[d_model, n]`.

        Returns:
            `[d_model, n]` on the device of `wanted` and in its dtype; `wanted` itself for a plain path.

        Raises:
            ModelError: the parameters of `post` are offloaded to disk.
        """
        if self.plain:
            return wanted
        if self.post is None:
            return wanted / self.scale
        post, dtype = _precise(self.post, wanted.device)
        base = current.T.to(wanted.device, dtype)  # [n, d_model]: modules read rows
        target = post(base) + wanted.T.to(dtype) / self.scale
        return (nearest(post, base, target) / self.gain).T.to(wanted.dtype)  # [d_model, n]

    def apply(self, current: Tensor, change: Tensor) -> Tensor:
        """Returns the change of the layer's output, `[d_model, n]`, when the matrix's output changes by `change`.

        Args:
            current: `[d_model, n]`, as for `invert`.
            change: `[d_model, n]`.

        Raises:
            ModelError: the parameters of `post` are offloaded to disk.
        """
        if self.post is None:
            return change * self.scale
        post, dtype = _precise(self.post, change.device)
        base = current.T.to(change.device, dtype)  # [n, d_model]
        # Rounding in the module's own dtype could exceed a small change: both values are computed in fp64.
        moved: Tensor = post(base + self.gain * change.T.to(dtype)) - post(base)
        return (self.scale * moved).T.to(change.dtype)  # [d_model, n]


def _precise(module: nn.Module, device: torch.device) -> tuple[nn.Module, torch.dtype]:
    """Returns a copy of a small module with its parameters in fp64 (fp32 if the device lacks it), without hooks."""
    dtype = wide_dtype(device)
    twin = copy.copy(module)  # shallow: the dictionaries below are replaced, not changed
    for name in ("forward", "_hf_hook", "_old_forward"):  # what accelerate puts on an instance
        twin.__dict__.pop(name, None)
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        setattr(twin, name, OrderedDict())
    twin._parameters = {
        name: None if p is None else nn.Parameter(_data(module, name).to(device, dtype), requires_grad=False)
        for name, p in module._parameters.items()
    }
    twin._buffers = {name: None if b is None else b.to(device) for name, b in module._buffers.items()}
    twin._modules = {
        name: None if child is None else _precise(child, device)[0] for name, child in module._modules.items()
    }
    return twin.eval(), dtype


def _data(module: nn.Module, name: str) -> Tensor:
    """Returns the data of a parameter; raises `ModelError` if it is on disk."""
    data = in_memory(module, name)
    if data is None:
        raise ModelError(f"{type(module).__name__}.{name} is offloaded to disk; load the model into memory to edit it")
    return data
