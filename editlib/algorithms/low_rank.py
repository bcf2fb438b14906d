"""Represent a weight update as a product of two thin matrices, multiplied out only when it is added."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from editlib.errors import EditError

SLAB = 2**23  # entries of an update that are multiplied out at once when it is added


@dataclass(frozen=True)
class LowRank:
    """Represents the update `W += left @ right` of a matrix `W [d_model, d_ff]`.

    Args:
        left: `[d_model, r]`.
        right: `[r, d_ff]`.

    Raises:
        EditError: factors that are not matrices, or whose inner sizes differ.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[0]:
            raise EditError(
                f"an update has the factors {list(self.left.shape)} and {list(self.right.shape)}; expected "
                "[d_model, r] and [r, d_ff]; give factors with one inner size"
            )

    @property
    def rank(self) -> int:
        """The inner size; the true rank may be lower."""
        return self.left.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix that the update is for, `(d_model, d_ff)`."""
        return self.left.shape[0], self.right.shape[1]

    @classmethod
    def full(cls, dense: Tensor) -> LowRank:
        """Wraps a full-rank update `[d_model, d_ff]` (fine-tuning, RECT), as `I @ dense`."""
        return cls(torch.eye(len(dense), dtype=dense.dtype, device=dense.device), dense)

    def dense(self) -> Tensor:
        """Returns the update as one matrix, `[d_model, d_ff]`."""
        return self.left @ self.right

    def norm(self) -> float:
        """Returns the Frobenius norm, from the two Gram matrices: `tr(L^T L R R^T)`."""
        product = (self.left.T @ self.left) * (self.right @ self.right.T)  # [r, r]
        # Rounding may make a sum of cancelling parts negative.
        return float(product.sum().clamp_min(0).sqrt())

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `U [d_model, k]`, `s [k]` and `V^T [k, d_ff]` with `U diag(s) V^T` the update, `k` at most the rank.

        The QR of both factors leaves an `r x r` matrix to decompose; the update is never multiplied out.
        """
        q_left, r_left = torch.linalg.qr(self.left)  # [d_model, k], [k, r]
        q_right, r_right = torch.linalg.qr(self.right.T)  # [d_ff, k], [k, r]
        u, s, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        return q_left @ u, s, v @ q_right.T

    def truncated(self, rank: int | None = None) -> tuple[LowRank, float]:
        """Returns the nearest update of at most `rank` and its distance, as a share of this one's norm.

        The singular values are shared evenly between its factors. `None` keeps the true rank, at least 1.
        """
        u, s, v = self.svd()
        # Singular values below the level of rounding count as zero: the true rank is lower.
        noise = float(s[0]) * max(self.shape) * torch.finfo(s.dtype).eps
        true = max(1, int((s > noise).sum()))
        kept = true if rank is None else min(rank, true)
        lost = float(s[kept:true].norm() / s.norm()) if kept < true else 0.0
        root = s[:kept].sqrt()  # half of each singular value to either factor
        return LowRank(u[:, :kept] * root, root[:, None] * v[:kept]), lost

    def __matmul__(self, keys: Tensor) -> Tensor:
        """Returns the change of the output for `keys [d_ff, n]`, `[d_model, n]`."""
        return self.left @ (self.right @ keys)

    def __add__(self, other: LowRank) -> LowRank:
        """Sums two updates by joining their factors, so that the inner sizes add up."""
        return LowRank(torch.cat([self.left, other.left], dim=1), torch.cat([self.right, other.right], dim=0))

    def add_to(self, weight: Tensor) -> None:
        """Adds the update to `weight [d_model, d_ff]` in place: summed in the factors' dtype, rounded once."""
        # In slabs of rows: the whole update in a wider dtype would take more memory than a large weight itself.
        height = max(1, SLAB // self.right.shape[1])
        for top in range(0, len(self.left), height):
            slab = weight[top : top + height]
            update = self.left[top : top + height] @ self.right
            slab.copy_(slab.to(update.dtype) + update.to(weight.device))
