"""ROME, MEMIT and AlphaEdit from end to end, straight down: dense, full forward passes, one prompt at a time.

A request is `(contexts, target)`: contexts `(ids, lookup)` with the plain prompt first, target token ids; `kl` its
`(ids, lookup)`. No code of editlib but for the model's own module names, which are passed in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from reference import closed_form as dense
from reference.values import compute_z
from torch import Tensor, nn


@torch.no_grad()
def observe(model: nn.Module, module: nn.Module, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Input and output of a module for every token of one prompt."""
    seen = []
    hook = module.register_forward_hook(
        lambda _, args, out: seen.append((args[0][0].clone(), (out[0] if isinstance(out, tuple) else out)[0].clone()))
    )
    try:
        model(torch.tensor([list(ids)]), use_cache=False)
    finally:
        hook.remove()
    return seen[0]


def key_of(model: nn.Module, module: nn.Module, contexts: list, plain_share: float | None) -> Tensor:
    """`compute_ks`: the plain prompt's key averaged with the mean over the others; `None`: the mean over all."""
    keys = torch.stack([observe(model, module, ids)[0][at] for ids, at in contexts]).double()
    if plain_share is None or len(keys) == 1:
        return keys.mean(0)
    return plain_share * keys[0] + (1 - plain_share) * keys[1:].mean(0)


def add(module: nn.Module, delta: Tensor) -> None:
    """Adds `delta [d_model, d_ff]` to a `Linear` or a transposed `Conv1D`."""
    with torch.no_grad():
        turned = delta if isinstance(module, nn.Linear) else delta.T
        module.weight.copy_((module.weight.double() + turned).to(module.weight.dtype))


def edit_at_once(
    model: nn.Module,
    layers: list[int],
    layer_of: Callable[[int], nn.Module],
    matrix_of: Callable[[int], nn.Module],
    requests: list[tuple],
    formula: Callable[[int, Tensor, Tensor], Tensor],
    z_options: dict,
) -> dict[int, Tensor]:
    """memit_main.py / AlphaEdit_main.py: all z first, then layer by layer; `formula(layer, K, R)` is the update.
    Returns the keys of each layer, with all updates written, as `cache_c` has them."""
    top = layer_of(layers[-1])
    zs = [
        compute_z(model, top, contexts, list(target), kl_prompts=[(list(kl[0]), kl[1], 0)] if kl else [], **z_options).z
        for contexts, target, kl in requests
    ]
    for i, layer in enumerate(layers):
        module = matrix_of(layer)
        keys = torch.stack([key_of(model, module, contexts, 0.5) for contexts, _, _ in requests], 1)
        now = torch.stack([observe(model, top, contexts[0][0])[1][contexts[0][1]] for contexts, _, _ in requests], 1)
        residual = (torch.stack(zs, 1) - now).double() / (len(layers) - i)
        add(module, formula(layer, keys, residual))
    return {
        layer: torch.stack([key_of(model, matrix_of(layer), contexts, 0.5) for contexts, _, _ in requests], 1)
        for layer in layers
    }


def rome(
    model: nn.Module, layer: int, layer_of: Callable, matrix_of: Callable, requests: list, c: Tensor | None, z_options
) -> None:
    """rome_main.py: one request after the other; the change is measured in norms of the MLP's output."""
    module = matrix_of(layer)
    for contexts, target, kl in requests:
        ids, at = contexts[0]
        plain, output = (some[at] for some in observe(model, module, ids))
        found = compute_z(
            model,
            layer_of(layer),
            contexts,
            list(target),
            kl_prompts=[(list(kl[0]), kl[1], 0)] if kl else [],
            unit=output.norm(),
            **z_options,
        )
        before = observe(model, layer_of(layer), ids)[1][at]
        wanted = (output + (found.z - before)).double()
        weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
        bias = 0 if module.bias is None else module.bias.double()
        mean = key_of(model, module, contexts, None)
        add(module, dense.rome(mean, plain.double(), wanted - bias, weight.detach().double(), c))
