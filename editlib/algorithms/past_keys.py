"""Keep the keys of earlier edits, whose outputs later edits must preserve."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PastKeys:
    """Holds the keys of earlier edits, as `block [d_ff, m]` with the sum `K_p K_p^T` of all `count` keys and `m <=
    d_ff`.

    A later solve needs only that sum (AlphaEdit, 2410.02355, eq. 13; UniErase, 2505.15674, eq. 13). Up to `d_ff` keys
    the block is the keys themselves; beyond that it is the triangular factor of their QR decomposition, which has the
    same sum. So the cost of a further edit does not grow.
    """

    block: Tensor  # [d_ff, m], m <= d_ff
    count: int  # all keys so far

    def with_keys(self, keys: Tensor) -> PastKeys:
        """Returns these keys and `keys [d_ff, n]` together."""
        block = torch.cat([self.block, keys.to(self.block)], dim=1)
        d_ff, columns = block.shape
        if columns > d_ff:
            # B^T = Q R gives B B^T = R^T R: the sum stays, the columns are d_ff again.
            block = torch.linalg.qr(block.T, mode="r").R.T.contiguous()
        return PastKeys(block, self.count + keys.shape[1])

    @classmethod
    def none(cls, d_ff: int, *, dtype: torch.dtype = torch.float64, device: torch.device | None = None) -> PastKeys:
        """Returns the past keys before the first edit: none."""
        return cls(torch.zeros(d_ff, 0, dtype=dtype, device=device), 0)
