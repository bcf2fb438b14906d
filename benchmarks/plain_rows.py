"""Values from rows by whole passes, one row after the other, to be timed beside ours; no code of editlib.

Every row is run through the whole model at every step, forwards and back, and each step solves the dense system
`δ += A^T (A A^T + ε tr(A A^T) / m I)^-1 b`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from published import hooked
from torch import Tensor, nn


class Row(Protocol):
    """A prompt with the columns of its subject's last token, and what is read where."""

    @property
    def kind(self) -> str: ...
    @property
    def owner(self) -> int: ...
    @property
    def ids(self) -> tuple[int, ...]: ...
    @property
    def places(self) -> tuple[int, ...]: ...
    @property
    def columns(self) -> tuple[int, ...]: ...
    @property
    def targets(self) -> tuple[int, ...]: ...
    @property
    def rivals(self) -> tuple[int, ...]: ...


def read(model: nn.Module, layer: nn.Module, row: Row, change: Tensor) -> tuple[Tensor, Tensor]:
    """What a row reads with `change [d_model]` added after `layer` at its places, and the state at the first."""
    states: list[Tensor] = []

    def add(_, __, output):
        hidden = output[0] if isinstance(output, tuple) else output
        states.append(hidden[0, row.places[0]].detach())
        hidden = hidden.clone()
        hidden[0, list(row.places)] += change
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with hooked(layer, add):
        logits = model(torch.tensor([row.ids], device=change.device), use_cache=False).logits[0, list(row.columns)]
    target = list(row.targets)
    if row.kind == "erase":
        return logits[0, target[0]] - logits[0, list(row.rivals)].logsumexp(0), states[0]
    return logits.log_softmax(1)[range(len(target)), target].sum(), states[0]


def find(
    model: nn.Module,
    layer: nn.Module,
    rows: Sequence[Row],
    wanted: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int = 5,
    step_limit: float = 0.35,
    ridge: float = 3e-3,
) -> Tensor:
    """What all rows read, `[m]`, after so many steps of their subjects' changes.

    Args:
        wanted: of `y [m]` as it is and as it was before any change, the numbers that the rows should have.
    """
    device = next(model.parameters()).device
    width = int(next(layer.parameters()).shape[-1])
    delta = torch.zeros(1 + max(row.owner for row in rows), width, device=device)
    before = y = torch.zeros(len(rows), device=device)
    for step in range(steps + 1):
        read_now, slopes = [], []
        norms: dict[int, Tensor] = {}
        for row in rows:
            change = delta[row.owner].clone().requires_grad_()
            value, state = read(model, layer, row, change)
            norms.setdefault(row.owner, state.norm())
            read_now.append(value.detach())
            if step < steps:
                slopes.append(torch.autograd.grad(value, change)[0])
        y = torch.stack(read_now)
        before = y if step == 0 else before
        if step == steps:
            break
        residual, jacobian = wanted(y, before) - y, torch.stack(slopes)
        for i, norm in norms.items():
            mine = [j for j, row in enumerate(rows) if row.owner == i]
            a = jacobian[mine]
            gram = a @ a.T
            unit = torch.eye(len(mine), device=device)
            move = a.T @ torch.linalg.solve(gram + ridge * gram.trace() / len(mine) * unit, residual[mine])
            delta[i] += move * min(1.0, float(step_limit * norm / move.norm().clamp_min(1e-20)))
    return y
