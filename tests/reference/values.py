"""`compute_z` of MEMIT for one request, straight down: full forward passes, a plain hook, torch's Adam."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Found:
    z: Tensor
    steps: int
    nll: float
    relative_norm: float


def logits_with(
    model: nn.Module, layer: nn.Module, ids: list[int], position: int, delta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Logits `[T, vocab]` with `delta` added to `layer`'s output at `position`, and that output before."""
    seen = []

    def hook(_, __, output):
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append(hidden[0, position].detach().clone())
        if delta is None:
            return None
        change = torch.zeros_like(hidden)
        change[0, position] = 1.0
        changed = hidden + change * delta
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = layer.register_forward_hook(hook)
    try:
        return model(torch.tensor([ids]), use_cache=False).logits[0], seen[0]
    finally:
        handle.remove()


def compute_z(
    model: nn.Module,
    layer: nn.Module,
    contexts: list[tuple[list[int], int]],
    target: list[int],
    *,
    kl_prompts: list[tuple[list[int], int, int]] = (),
    steps: int,
    lr: float,
    weight_decay: float,
    clamp_norm_factor: float,
    kl_factor: float,
    stop_loss: float,
    optimizer: str = "adam",
    unit: Tensor | None = None,
) -> Found:
    """`contexts` (plain prompt first) are `(ids, lookup)`, `kl_prompts` `(ids, lookup, answer tokens among the ids)`;
    the published code has one KL prompt, without an answer. `unit` is the norm that decay and clamp measure in (ROME:
    of the MLP's output); without it that of the state."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    v0 = logits_with(model, layer, *contexts[0], None)[1]
    unit = v0.norm() if unit is None else unit
    delta = torch.zeros_like(v0, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=lr)
    before = {}
    for step in range(steps):
        delta.grad = None
        nll = 0.0
        for prompt, lookup in contexts:
            logits, _ = logits_with(model, layer, [*prompt, *target[:-1]], lookup, delta)
            for j, token in enumerate(target):
                each = -logits[len(prompt) - 1 + j].log_softmax(0)[token]
                nll = nll + each / len(target) / len(contexts)
        kl = 0.0
        for i, (prompt_ids, kl_lookup, extra) in enumerate(kl_prompts):
            now = logits_with(model, layer, prompt_ids, kl_lookup, delta)[0][-1 - extra :].log_softmax(1)
            then = before.setdefault(i, now.detach().clone())
            # The order of the published code: F.kl_div(then, now, log_target=True) is KL(now | then).
            each = F.kl_div(then, now, log_target=True, reduction="sum") / (1 + extra)
            kl = kl + kl_factor * each / len(kl_prompts)
        loss = nll + kl + weight_decay * torch.norm(delta) / unit**2
        # The published code compares the whole loss; ours rests a request by the NLL alone.
        if nll < stop_loss or step == steps - 1:
            break
        loss.backward()
        if optimizer == "adam":
            adam.step()
        else:  # a step of length lr |h| straight down the gradient
            with torch.no_grad():
                delta -= lr * unit * delta.grad / delta.grad.norm()
        longest = clamp_norm_factor * unit
        if delta.norm() > longest:
            with torch.no_grad():
                delta[...] = delta * longest / delta.norm()
    final = delta.detach()
    return Found(v0 + final, step, float(nll), float(final.norm() / unit))
