"""AlphaEdit as its authors' code and EasyEdit run it, written down to be timed beside ours; no code of editlib.

One request after the other for the values, its contexts in one padded batch, every step a pass through the whole model
with logits at every position; keys and states by whole passes; one dense `d_ff x d_ff` solve a layer (AlphaEdit,
2410.02355, eq. 14). The stored projector and the sum of earlier keys are dense, too. Statistics take one pass a layer,
stopped after it, as in ROME's code. No weight gets a gradient.

One thing is not as published: the authors stop a request when its whole loss is small, editlib when the NLL of its
target is. Here both do the latter, so that the two sides take the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Asked:
    """One request as token ids: its contexts and where the subject ends in each, the plain one first; the target; and
    the KL prompt, whose next token must stay."""

    contexts: Sequence[tuple[list[int], int]]
    target: list[int]
    about: tuple[list[int], int]


@dataclass(frozen=True)
class Settings:
    """The published keys."""

    layers: Sequence[int]
    steps: int = 25
    lr: float = 0.5
    weight_decay: float = 1e-3
    clamp_norm_factor: float = 4.0
    kl_factor: float = 0.0625
    stop_loss: float = 0.05
    l2: float = 10.0


@contextmanager
def hooked(module: nn.Module, hook):
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def padded(rows: Sequence[list[int]], device: torch.device) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def compute_z(model: PreTrainedModel, layer: nn.Module, asked: Asked, settings: Settings) -> tuple[Tensor, int]:
    """`z [d_model]` of one request, and the steps that it took."""
    device = next(model.parameters()).device
    rows = [[*ids, *asked.target[:-1]] for ids, _ in asked.contexts] + [asked.about[0]]
    at = torch.tensor([place for _, place in asked.contexts] + [asked.about[1]], device=device)
    each, batch = torch.arange(len(rows), device=device), padded(rows, device)
    n = len(asked.contexts)
    ends = torch.tensor([[len(ids) - 1 + j for j in range(len(asked.target))] for ids, _ in asked.contexts])
    target = torch.tensor(asked.target, device=device)
    delta = torch.zeros(model.config.hidden_size, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=settings.lr)
    start: list[Tensor] = []
    before = None

    def add(_, __, output):
        hidden = output[0] if isinstance(output, tuple) else output
        if not start:
            start.append(hidden[0, at[0]].detach().float())
        hidden = hidden.clone()
        hidden[each, at] += delta.to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    taken = 0
    for step in range(settings.steps):
        with hooked(layer, add):
            logits = model(**batch, use_cache=False).logits
        log_probs = logits[:n].float().log_softmax(-1)
        nll = -log_probs[each[:n, None], ends.to(device), target].mean()
        now = logits[n, asked.about[1]].float().log_softmax(-1)
        before = now.detach().clone() if before is None else before
        kl = settings.kl_factor * F.kl_div(before, now, log_target=True, reduction="sum")
        loss = nll + kl + settings.weight_decay * delta.norm() / start[0].norm() ** 2
        if float(nll.detach()) < settings.stop_loss or step == settings.steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        taken += 1
        largest = settings.clamp_norm_factor * start[0].norm()
        if delta.norm() > largest:
            with torch.no_grad():
                delta.mul_(largest / delta.norm())
    return start[0] + delta.detach(), taken


@torch.no_grad()
def look(model: nn.Module, module: nn.Module, prompts: Sequence[tuple[list[int], int]], inputs: bool) -> Tensor:
    """Inputs or outputs of `module` at a place of each prompt, `[n, d]`, by whole passes over at most 64 prompts."""
    device, found = next(model.parameters()).device, []
    for i in range(0, len(prompts), 64):
        some = prompts[i : i + 64]
        seen: list[Tensor] = []

        def take(_, args, output, seen=seen):
            seen.append(args[0] if inputs else output[0] if isinstance(output, tuple) else output)

        with hooked(module, take):
            model(**padded([ids for ids, _ in some], device), use_cache=False)
        at = torch.tensor([place for _, place in some], device=device)
        found.append(seen[0][torch.arange(len(some), device=device), at].float())
    return torch.cat(found)


def compute_ks(model: nn.Module, matrix: nn.Module, asked: Sequence[Asked]) -> Tensor:
    """`K [d_ff, n]`: half the plain prompt's key, half the mean over its context templates."""
    every = look(model, matrix, [context for one in asked for context in one.contexts], True)
    keys = every.view(len(asked), len(asked[0].contexts), -1)
    return ((keys[:, 0] + keys[:, 1:].mean(1)) / 2).T if keys.shape[1] > 1 else keys[:, 0].T


def alphaedit(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    matrices: Sequence[nn.Linear],
    asked: Sequence[Asked],
    settings: Settings,
    projectors: dict[int, Tensor],
) -> int:
    """Edits the model in place; returns the steps that the values took.

    `layers` are the decoder layers, `matrices` their MLP output matrices, `projectors` the dense `P [d_ff, d_ff]`, kept
    on the CPU and moved a layer at a time.
    """
    model.requires_grad_(False)
    found = [compute_z(model, layers[settings.layers[-1]], one, settings) for one in asked]
    write(model, layers, matrices, asked, settings, projectors, torch.stack([z for z, _ in found], 1))
    return sum(taken for _, taken in found)


def write(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    matrices: Sequence[nn.Linear],
    asked: Sequence[Asked],
    settings: Settings,
    projectors: dict[int, Tensor],
    targets: Tensor,
) -> None:
    """Spreads the way to the values `targets [d_model, n]` over the layers, and adds the new keys to the past ones."""
    top = layers[settings.layers[-1]]
    plain = [one.contexts[0] for one in asked]
    past = {layer: torch.zeros_like(projector) for layer, projector in projectors.items()}
    for i, layer in enumerate(settings.layers):
        p, matrix = projectors[layer].to(targets.device), matrices[layer]
        keys = compute_ks(model, matrix, asked)
        residual = (targets - look(model, top, plain, False).T) / (len(settings.layers) - i)
        update = solve(keys, residual, p, past[layer].to(targets.device), settings.l2)
        with torch.no_grad():
            matrix.weight += update.to(matrix.weight.dtype)
    for layer in settings.layers:
        new = compute_ks(model, matrices[layer], asked)
        past[layer] += (new @ new.T).cpu()


def solve(keys: Tensor, residual: Tensor, p: Tensor, past: Tensor, l2: float) -> Tensor:
    """`Δ [d_model, d_ff]` of `(P (K K^T + C) + L2 I) Δ^T = P K R^T`, with `C = past` the sum over earlier keys."""
    gram = keys @ keys.T + past
    unit = torch.eye(len(p), dtype=p.dtype, device=p.device)
    return torch.linalg.solve(p @ gram + l2 * unit, p @ keys @ residual.T).T


@torch.no_grad()
def layer_stats(
    model: nn.Module, layer: nn.Module, matrix: nn.Module, batches: Sequence[Sequence[list[int]]]
) -> Tensor:
    """The second moment `[d_ff, d_ff]`, not divided by the number of tokens, of one layer's keys over texts."""
    device, total = next(model.parameters()).device, torch.zeros(())
    for rows in batches:
        inputs = padded(rows, device)
        seen: list[Tensor] = []
        with hooked(matrix, lambda _, args, __, seen=seen: seen.append(args[0])), hooked(layer, stop), suppress(_Stop):
            model(**inputs, use_cache=False)
        keys = seen[0][inputs["attention_mask"].bool()].float()
        total = total + (keys.T @ keys).cpu()
    return total


class _Stop(Exception):
    """Ends a pass after the layer whose keys were wanted."""


def stop(*_: object) -> None:
    raise _Stop
