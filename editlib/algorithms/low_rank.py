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

    @classmethod
    def full(cls, dense: Tensor) -> LowRank:
        """An update `[d_model, d_ff]` of no low rank (fine-tuning, RECT), as `I @ dense`."""
        return cls(torch.eye(len(dense), dtype=dense.dtype, device=dense.device), dense)

    def dense(self) -> Tensor:
        """The update multiplied out, `[d_model, d_ff]`."""
        return self.left @ self.right

    def norm(self) -> float:
        """Frobenius norm, from the two Gram matrices: `tr(L^T L R R^T)`."""
        product = (self.left.T @ self.left) * (self.right @ self.right.T)
        return float(product.sum().clamp_min(0).sqrt())

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """`U [d_model, k]`, singular values `[k]` and `V^T [k, d_ff]` with `U diag(s) V^T` the update, `k` at most the
        rank: from the QR of both factors, never multiplied out."""
        q_left, r_left = torch.linalg.qr(self.left)
        q_right, r_right = torch.linalg.qr(self.right.T)
        u, s, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        return q_left @ u, s, v @ q_right.T

    def truncated(self, rank: int | None = None) -> tuple[LowRank, float]:
        """The nearest update of at most `rank` (`None`: of its true rank, at least 1), its weight shared evenly between
        the factors, and its distance from this one as a share of this one's norm."""
        u, s, v = self.svd()
        noise = float(s[0]) * max(self.shape) * torch.finfo(s.dtype).eps
        true = max(1, int((s > noise).sum()))
        kept = true if rank is None else min(rank, true)
        lost = float(s[kept:true].norm() / s.norm()) if kept < true else 0.0
        root = s[:kept].sqrt()
        return LowRank(u[:, :kept] * root, root[:, None] * v[:kept]), lost

    def __matmul__(self, keys: Tensor) -> Tensor:
        """What the update adds to the output for `keys [d_ff, n]` -> `[d_model, n]`."""
        return self.left @ (self.right @ keys)

    def __add__(self, other: LowRank) -> LowRank:
        return LowRank(torch.cat([self.left, other.left], dim=1), torch.cat([self.right, other.right], dim=0))

    def add_to(self, weight: Tensor) -> None:
        """Adds the update to `weight [d_model, d_ff]` in place: summed in the factors' dtype, rounded once."""
        weight.copy_(weight.to(self.left.dtype) + self.dense().to(weight.device))
