"""The published formulas, dense and straight down; no code of editlib."""

from __future__ import annotations

import torch
from torch import Tensor


def moment(keys: Tensor) -> Tensor:
    """`C = E[k k^T]` of `keys [d_ff, tokens]`, one outer product after the other."""
    total = torch.zeros(len(keys), len(keys), dtype=torch.float64)
    for key in keys.T.double():
        total += torch.outer(key, key)
    return total / keys.shape[1]


def projector(c: Tensor, threshold: float) -> Tensor:
    """AlphaEdit's `get_project`: `P = U U^T` over singular vectors with a value under the threshold."""
    u, s, _ = torch.linalg.svd(c.double(), full_matrices=False)
    small = u[:, s < threshold]
    return small @ small.T


def alphaedit(keys: Tensor, residual: Tensor, p: Tensor, l2: float, held: Tensor | None = None) -> Tensor:
    """AlphaEdit_main.py: `solve(P (K K^T + K_p K_p^T) + L2 I, P K R^T)^T`, `[d_model, d_ff]`."""
    gram = keys @ keys.T
    if held is not None:
        gram = gram + held @ held.T
    return torch.linalg.solve(p @ gram + l2 * torch.eye(len(p), dtype=p.dtype), p @ keys @ residual.T).T
