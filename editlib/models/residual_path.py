"""How what an MLP output matrix writes reaches the residual stream.

MEMIT (2210.07229, alg. 1) takes for granted that a change of the matrix's output is the same change of the
layer's output. That does not hold where a norm stands behind the MLP (Gemma 2 and 3, OLMo 2), where its branch is
scaled (Granite) or where the sum is normalised (OPT-350m). What stands there is seen by changing the output in one
small pass and following the change, not known from names.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from editlib.errors import ModelError
from editlib.models.anatomy import Anatomy
from editlib.models.freezing import frozen
from editlib.models.inversion import nearest
from editlib.models.passes import run
from editlib.models.placement import in_memory
from editlib.models.precision import wide_dtype
from editlib.models.tracing import Call, calls, edit_output, unwatched

TOKENS = 3


@dataclass(frozen=True)
class Writing:
    """A change `x` of the matrix's output changes the layer's output by `scale * (post(c + gain x) - post(c))`.

    `post` is a module of the layer and `c` what it reads, mostly the matrix's own output `W k + b`; without `post` the
    change is `scale * x`.
    """

    post: nn.Module | None = None
    scale: float = 1.0
    gain: float = 1.0

    @property
    def plain(self) -> bool:
        """The layer's output changes by exactly what the matrix's output changes."""
        return self.post is None and self.scale == 1.0


def writing_of(anat: Anatomy, layer: int) -> Writing:
    """What stands between the MLP output matrix of `layer` and the residual stream; costs two passes of 3 tokens, once
    a model.

    Raises:
        ModelError: something else than a factor or one module stands there (a gate, two norms).
    """
    name = f"writing {layer}"
    if name not in anat.tried:
        anat.tried[name] = _find_writing(anat, layer)
    return anat.tried[name]


def _find_writing(anat: Anatomy, layer: int) -> Writing:
    matrix, module = anat.mlp_output(layer), anat.layers[layer]
    generator = torch.Generator().manual_seed(0)
    base = _observe(anat, layer, lambda output: output)
    # Large, so that little of it is rounded away in the sums behind it.
    size = 4 * max(_rms(call.output) for call in base if call.module in (matrix, module))
    noise = size * torch.randn(TOKENS, anat.d_model, generator=generator)
    pushes: list[Tensor] = []

    def push(output: Tensor) -> Tensor:
        moved = output + noise.to(output).reshape(output.shape)
        pushes.append(_difference(moved, output))
        return moved

    moved = _observe(anat, layer, push)
    unit = torch.finfo(base[0].output.dtype).eps
    total = _difference(moved[0].output, base[0].output)
    factor = _factor(total, pushes[0], unit)
    if factor is not None:
        return Writing(scale=factor)
    begun = next(i for i, call in enumerate(base) if call.module is matrix)
    for before, after in zip(base[begun + 1 :], moved[begun + 1 :], strict=True):
        if before.input is None or before.output is None:
            continue
        read, written = _difference(after.input, before.input), _difference(after.output, before.output)
        gain, scale = _factor(read, pushes[0], unit), _factor(total, written, unit)
        # A module that hands the change on as it is (dropout) is not the one that bends it.
        if gain is not None and scale is not None and _factor(written, pushes[0], unit) is None:
            return Writing(before.module, scale, gain)
    raise ModelError(
        f"{anat.mlp_output_names[layer]}: what it writes reaches the residual stream neither as it is, nor times a "
        "factor, nor through one norm, so no update can be aimed at a state; choose another layer, or another model"
    )


def needed(writing: Writing, current: Tensor, wanted: Tensor) -> Tensor:
    """The change of the matrix's output that changes the layer's output by `wanted`.

    A norm fixes the length of what it returns, so that not every change can be had: the result is then the one that
    comes nearest in the least-squares sense (`inversion.nearest`); `effect` tells how near. Solved per column, in fp64
    where there is such a thing; deterministic.

    Args:
        current: `[d_model, n]`, what `writing.post` reads at these places today (its first input; `W k + b` for a norm
            that stands right behind the MLP). Not looked at without `post`.
        wanted: `[d_model, n]`.

    Returns:
        `[d_model, n]` on the device of `wanted` and in its dtype; `wanted` itself when the writing is plain.
    """
    if writing.plain:
        return wanted
    if writing.post is None:
        return wanted / writing.scale
    post, dtype = _precise(writing.post, wanted.device)
    base = current.T.to(wanted.device, dtype)
    target = post(base) + wanted.T.to(dtype) / writing.scale
    return (nearest(post, base, target) / writing.gain).T.to(wanted.dtype)


def effect(writing: Writing, current: Tensor, change: Tensor) -> Tensor:
    """How the layer's output changes when the matrix's output does by `change [d_model, n]`; the inverse of `needed`.

    Args:
        current: as for `needed`.
    """
    if writing.post is None:
        return change * writing.scale
    post, dtype = _precise(writing.post, change.device)
    base = current.T.to(change.device, dtype)
    moved = post(base + writing.gain * change.T.to(dtype)) - post(base)
    return (writing.scale * moved).T.to(change.dtype)


@torch.no_grad()
def _observe(anat: Anatomy, layer: int, change: Callable[[Tensor], Tensor]) -> list[Call]:
    """All calls inside `layer`, its own first, in a pass in which always the same random states enter it and the
    output of its MLP output matrix is changed. (In a real text those of the first token may be so large that a change
    drowns in rounding.)"""
    device, dtype = anat.device, anat.embedding.weight.dtype
    ids = torch.arange(1, TOKENS + 1, device=device)[None]
    states = torch.randn(1, TOKENS, anat.d_model, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    made: list[Call] = []
    with (
        unwatched(anat.model),
        frozen(anat.model),
        calls(anat.layers[layer].modules(), made),
        edit_output(anat.mlp_output(layer), lambda _, output: change(output)),
    ):
        # The layers before run too, for a layer that reads more of them than these states.
        run(anat, ids, torch.ones_like(ids), start=layer, stop=layer + 1, hidden=states, skip=False)
    begun = next(i for i, call in enumerate(made) if call.module is anat.layers[layer])
    return made[begun:]  # a module that layers share (an activation) was called before


def _rms(x: Tensor) -> float:
    return float(x.cpu().double().square().mean().sqrt())


def _difference(moved: Tensor, base: Tensor) -> Tensor:
    """`[tokens, d]`; fp64 on the CPU, but no more precise than what it is computed from."""
    return (moved.cpu().double() - base.cpu().double()).reshape(-1, moved.shape[-1])


def _factor(found: Tensor, given: Tensor, unit: float) -> float | None:
    """`s` where `found = s * given` up to rounding by `unit`, exactly 1.0 where rounding alone speaks against it."""
    if found.shape != given.shape or not bool(given.any()):
        return None
    s = float((found * given).sum() / given.square().sum())
    if s == 0 or float((found - s * given).norm()) > 16 * unit * float(found.norm()):
        return None
    return 1.0 if abs(s - 1) < max(unit, 1e-5) else s


def _precise(module: nn.Module, device: torch.device) -> tuple[nn.Module, torch.dtype]:
    """A twin of a small module with its parameters in fp64 (fp32 where there is none), without anyone's hooks."""
    dtype = wide_dtype(device)
    twin = copy.copy(module)
    for name in ("forward", "_hf_hook", "_old_forward"):  # what accelerate puts on an instance
        twin.__dict__.pop(name, None)
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        setattr(twin, name, OrderedDict())
    twin._parameters = {
        name: None if p is None else nn.Parameter(_data(module, name).to(device, dtype), requires_grad=False)
        for name, p in module._parameters.items()
    }
    twin._buffers = {name: None if b is None else b.to(device) for name, b in module._buffers.items()}
    twin._modules = {name: _precise(child, device)[0] for name, child in module._modules.items()}
    return twin.eval(), dtype


def _data(module: nn.Module, name: str) -> Tensor:
    data = in_memory(module, name)
    if data is None:
        raise ModelError(f"{type(module).__name__}.{name} is offloaded to disk; load the model into memory to edit it")
    return data
