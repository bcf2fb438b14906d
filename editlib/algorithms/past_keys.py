"""The keys of earlier edits, which later ones must leave in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PastKeys:
    """`block [d_ff, m]` with the Gram matrix `K_p K_p^T` of all `count` keys so far, and `m <= d_ff` columns.

    A later solve needs no more of them than their Gram matrix (AlphaEdit, 2410.02355, eq. 13; UniErase, 2505.15674,
    eq. 13), and a matrix of at most `d_ff` columns has it whatever their number: up to there the block is the keys
    themselves, beyond it the triangular factor of their QR decomposition. The cost of a further edit stays flat.
    """

    block: Tensor
    count: int

    def with_keys(self, keys: Tensor) -> PastKeys:
        """These and `keys [d_ff, n]`."""
        block = torch.cat([self.block, keys.to(self.block)], dim=1)
        d_ff, columns = block.shape
        if columns > d_ff:
            block = torch.linalg.qr(block.T, mode="r").R.T.contiguous()
        return PastKeys(block, self.count + keys.shape[1])

    @classmethod
    def none(cls, d_ff: int, *, dtype: torch.dtype = torch.float64, device: torch.device | None = None) -> PastKeys:
        """Before the first edit."""
        return cls(torch.zeros(d_ff, 0, dtype=dtype, device=device), 0)
