"""A weight update as a product of two thin matrices, never multiplied out before it must be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """`W += left @ right` with `left [d_model, r]` and `right [r, d_ff]`."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """The inner dimension; the true rank may be lower."""
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def dense(self) -> Tensor:
        """The update multiplied out, `[d_model, d_ff]`."""
        return self.left @ self.right

    def norm(self) -> float:
        """Frobenius norm, from the two Gram matrices: `tr(L^T L R R^T)`."""
        product = (self.left.T @ self.left) * (self.right @ self.right.T)
        return float(product.sum().clamp_min(0).sqrt())

    def __matmul__(self, keys: Tensor) -> Tensor:
        """What the update adds to the output for `keys [d_ff, n]` -> `[d_model, n]`."""
        return self.left @ (self.right @ keys)

    def __add__(self, other: LowRank) -> LowRank:
        return LowRank(torch.cat([self.left, other.left], dim=1), torch.cat([self.right, other.right], dim=0))

    def add_to(self, weight: Tensor) -> None:
        """Adds the update to `weight [d_model, d_ff]` in place: summed in the factors' dtype, rounded once."""
        weight.copy_(weight.to(self.left.dtype) + self.dense().to(weight.device))
