"""Find how the output of an MLP output matrix reaches the residual stream.

MEMIT (2210.07229, alg. 1) assumes that a change of the matrix's output changes the layer's output by the same amount.
That fails if a norm follows the MLP (Gemma 2 and 3, OLMo 2), if its branch is scaled (Granite), or if the sum is
normalised (OPT-350m). The path is found by changing the output in one small pass and following the change, not from
module names.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from editlib.errors import ModelError
from editlib.models.anatomy import Anatomy
from editlib.models.freezing import no_param_grad
from editlib.models.output_path import OutputPath
from editlib.models.passes import run
from editlib.models.tracing import Call, calls, edit_output, unwatched

TOKENS = 3  # of a probe


def output_path(anat: Anatomy, layer: int) -> OutputPath:
    """Finds what lies between the MLP output matrix of `layer` and the residual stream.

    Costs two passes of 3 tokens, once per anatomy.

    Raises:
        ModelError: there is more than a factor and one module between them (a gate, two norms).
    """
    paths = anat.probe_cache.paths
    if layer not in paths:
        paths[layer] = _find_path(anat, layer)
    return paths[layer]


def _find_path(anat: Anatomy, layer: int) -> OutputPath:
    """Finds the path of one layer, from a pass as it is and a pass with noise on the matrix's output."""
    matrix, module = anat.mlp_output(layer), anat.layers[layer]
    generator = torch.Generator().manual_seed(0)
    base = _observe(anat, layer, lambda output: output)
    # Large noise, so that it is not lost in the rounding of later sums.
    size = 4 * max(_rms(call.hidden) for call in base if call.module in (matrix, module))
    noise = size * torch.randn(TOKENS, anat.d_model, generator=generator)  # [tokens, d_model]
    pushes: list[Tensor] = []  # the noise as the model's dtype rounds it

    def push(output: Tensor) -> Tensor:
        moved = output + noise.to(output).reshape(output.shape)
        pushes.append(_difference(moved, output))
        return moved

    moved = _observe(anat, layer, push)
    # 1. The change arrives as it is, or times one factor: there is no module between.
    unit = torch.finfo(base[0].hidden.dtype).eps  # relative rounding error
    total = _difference(moved[0].hidden, base[0].hidden)
    factor = _factor(total, pushes[0], unit)
    if factor is not None:
        return OutputPath(scale=factor)
    # 2. Otherwise look for one module whose input is the change times `gain`, and whose output, times `scale`, is the
    #    change of the layer's output.
    begun = next(i for i, call in enumerate(base) if call.module is matrix)
    for before, after in zip(base[begun + 1 :], moved[begun + 1 :], strict=True):
        if before.input is None or after.input is None or before.output is None:
            continue
        read, written = _difference(after.input, before.input), _difference(after.hidden, before.hidden)
        gain, scale = _factor(read, pushes[0], unit), _factor(total, written, unit)
        # A module that passes the change on unchanged (dropout) is not the nonlinear one.
        if gain is not None and scale is not None and _factor(written, pushes[0], unit) is None:
            return OutputPath(before.module, scale, gain)
    raise ModelError(
        f"{anat.mlp_output_names[layer]}: its output reaches the residual stream neither unchanged, nor times a "
        "factor, nor through one norm, so no update can reach a wanted state; choose another layer, or another model"
    )


@torch.no_grad()
def _observe(anat: Anatomy, layer: int, change: Callable[[Tensor], Tensor]) -> list[Call]:
    """Runs `layer` on fixed random states, with `change` applied to the output of its MLP output matrix.

    Returns all calls inside the layer, its own first. The states are random, since those of a real text's first token
    may be so large that rounding hides the change.
    """
    device, dtype = anat.device, anat.embedding.weight.dtype
    ids = torch.arange(1, TOKENS + 1, device=device)[None]
    states = torch.randn(1, TOKENS, anat.d_model, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    made: list[Call] = []
    with (
        unwatched(anat.model),
        no_param_grad(anat.model),
        calls(anat.layers[layer].modules(), made),
        edit_output(anat.mlp_output(layer), lambda _, output: change(output)),
    ):
        # The layers before run too, for a layer that reads more from them than these states.
        run(anat, ids, torch.ones_like(ids), start=layer, stop=layer + 1, hidden=states, skip=False)
    begun = next(i for i, call in enumerate(made) if call.module is anat.layers[layer])
    return made[begun:]  # a module that layers share (an activation) was called in earlier layers too


def _rms(x: Tensor) -> float:
    return float(x.cpu().double().square().mean().sqrt())


def _difference(moved: Tensor, base: Tensor) -> Tensor:
    """Returns `moved - base` as `[tokens, d]`, in fp64 on the CPU, so that the subtraction adds no rounding."""
    return (moved.cpu().double() - base.cpu().double()).reshape(-1, moved.shape[-1])


def _factor(after: Tensor, before: Tensor, unit: float) -> float | None:
    """Returns the factor with `after = factor * before`, or `None` if there is none, up to rounding by `unit`.

    A factor that is 1 up to rounding is returned as exactly 1.0.
    """
    if after.shape != before.shape or not bool(before.any()):
        return None
    factor = float((after * before).sum() / before.square().sum())  # least squares
    if factor == 0 or float((after - factor * before).norm()) > 16 * unit * float(after.norm()):
        return None
    return 1.0 if abs(factor - 1) < max(unit, 1e-5) else factor
