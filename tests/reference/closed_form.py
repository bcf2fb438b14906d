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


def memit(keys: Tensor, residual: Tensor, c: Tensor, weight: float, past: Tensor | None = None) -> Tensor:
    """memit_main.py: `solve(λ C + K K^T, K)`, then `R adj^T`; memit_seq adds the sum of past `K K^T`."""
    gram = weight * c + keys @ keys.T
    if past is not None:
        for key in past.T:
            gram = gram + torch.outer(key, key)
    return residual @ torch.linalg.solve(gram, keys).T


def emmet(keys: Tensor, residual: Tensor, c: Tensor, weight: float, ridge: float) -> Tensor:
    """emmet_main.py: `R (K^T C^-1 K + e I)^-1 K^T C^-1`, with an explicit inverse as it has."""
    inverse = torch.linalg.inv(weight * c)
    d = keys.T @ inverse @ keys + ridge * torch.eye(keys.shape[1], dtype=keys.dtype)
    return residual @ torch.linalg.inv(d) @ keys.T @ inverse


def rome(key: Tensor, plain_key: Tensor, wanted: Tensor, weight: Tensor, c: Tensor | None) -> Tensor:
    """rome_main.py, compute_u.py, compute_v.py for one fact, all vectors 1-d: `[d_model, d_ff]`."""
    u = key if c is None else torch.linalg.inv(c) @ key
    u = u / u.norm()
    right = (wanted - weight @ plain_key) / torch.dot(plain_key, u)
    return torch.outer(right, u)


def rect(delta: Tensor, weight: Tensor, percent: float) -> Tensor:
    """The mask of MEMIT_rect_main.py, entry by entry: the `percent` relatively largest are kept."""
    relative = (delta / (weight + 1e-8)).abs()
    order = sorted(relative.flatten().tolist(), reverse=True)
    least = order[max(1, round(percent / 100 * len(order))) - 1]
    return torch.where(relative >= least, delta, torch.zeros_like(delta))


def prune(total: Tensor, weight: Tensor) -> Tensor:
    """MEMIT_prune_main.py: singular values of the whole update above the weight's largest go up by their logarithm."""
    largest = torch.linalg.svdvals(weight)[0]
    u, s, v = torch.linalg.svd(total, full_matrices=False)
    for i in range(len(s)):
        if s[i] > largest:
            s[i] = torch.log(s[i]) - torch.log(largest) + largest
    return u @ torch.diag(s) @ v


def two_sided(keys: Tensor, residual: Tensor, left: Tensor, cost: Tensor, ridge: float = 1.0) -> Tensor:
    """The `Δ` with `ridge M Δ G + Δ K K^T = R K^T`, as one dense system in all its entries, `[d_model, d_ff]`."""
    d_model, d_ff = len(residual), len(keys)
    eye = torch.eye(d_model, dtype=keys.dtype)
    # vec(M Δ G) = (M ⊗ G) vec(Δ) for rows one after the other and a symmetric G.
    system = ridge * torch.kron(left, cost) + torch.kron(eye, keys @ keys.T)
    return torch.linalg.solve(system, (residual @ keys.T).flatten()).view(d_model, d_ff)
