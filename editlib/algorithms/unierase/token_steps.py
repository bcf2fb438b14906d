"""Take steps of Adam on a token's rows, with the guard solved in each step instead of added to the gradient.

The refusals' NLL is expensive and sampled; the guard's penalty is cheap, convex and known in full. So a step minimises
the sum of Adam's model of the first and a quadratic bound of the second. With the output row `r`, Adam's mean gradient
`m` and scale `D = diag(sqrt(v)) / lr`, and the bound's gradient `g` and curvature `H` at `r`:

    r <- r - (D + w H)^-1 (m + w g)

A separate input row (untied embeddings) has no guard: `r <- r - D^-1 m`, plain Adam.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from editlib.algorithms.unierase.token_guard import LogitGapGuard
from editlib.models.precision import wide_dtype

MEAN, EPS = 0.9, 1e-8  # Adam's first beta and epsilon
LAST_RATE = 0.05  # of the learning rate, in the last step


class GuardedAdam:
    """Holds Adam's running means for the rows of a token, the last of which is the guarded output row.

    Attributes:
        rows: `[d_model]` each, changed in place by `step`.
        guard, weight: the guard and the weight of its penalty.
        answer_gap, min_gap: see `LogitGapGuard.penalty`.
    """

    def __init__(
        self,
        rows: Sequence[Tensor],
        guard: LogitGapGuard,
        *,
        weight: float,
        answer_gap: float,
        min_gap: float,
        memory: float,
    ) -> None:
        self.rows, self.guard, self.weight, self.answer_gap, self.min_gap = rows, guard, weight, answer_gap, min_gap
        self.memory = memory
        self.means = [torch.zeros_like(row) for row in rows]  # m
        self.squares = [torch.zeros_like(row) for row in rows]  # v
        self.taken = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        """Moves the rows by one step along `gradients`, `[d_model]` each, of the sampled loss."""
        self.taken += 1
        for i, (row, gradient) in enumerate(zip(self.rows, gradients, strict=True)):
            mean = self.means[i].mul_(MEAN).add_(gradient, alpha=1 - MEAN)
            square = self.squares[i].mul_(self.memory).addcmul_(gradient, gradient, value=1 - self.memory)
            # Both start at zero and are scaled to be unbiased.
            scale = ((square / (1 - self.memory**self.taken)).sqrt() + EPS) / lr
            slope = mean / (1 - MEAN**self.taken)
            row.sub_(self._guarded(row, slope, scale) if row is self.rows[-1] and self.weight else slope / scale)

    def _guarded(self, row: Tensor, slope: Tensor, scale: Tensor) -> Tensor:
        """Returns the step `[d_model]` of the output row."""
        wide = wide_dtype(row.device)
        gradient, curvature = self.guard.bound(row, self.answer_gap, self.min_gap)
        total = torch.diag(scale.to(wide)) + self.weight * curvature.to(wide)  # [d_model, d_model]
        move: Tensor = torch.linalg.solve(total, (slope + self.weight * gradient).to(wide))  # [d_model]
        return move.to(row)


def rate(lr: float, step: int, steps: int) -> float:
    """Returns the learning rate of a step: a half cosine from `lr` down to `LAST_RATE` of it."""
    return lr * (LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * step / steps)) / 2)
