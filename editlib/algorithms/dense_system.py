"""Factor a symmetric system in place, and solve with it: at `d_ff` 14336 a copy would take 1.6 GB."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

WHOLE = 2048  # rows up to which a system is factored at once
BLOCK = 1024  # rows of a block above


def factor_in_place(gram: Tensor) -> bool:
    """Replaces the lower triangle of a symmetric `gram [m, m]` by its Cholesky factor `L`; `gram = L L^T`.

    The entries above the diagonal are overwritten. Blocks of columns are factored one after another, and each is
    subtracted from the rest (right-looking), so that only one block of columns is held beside the matrix.

    Returns:
        Whether `gram` is positive definite; if not, its content is undefined.
    """
    for begin, end in _blocks(len(gram)):
        factor, failed = torch.linalg.cholesky_ex(gram[begin:end, begin:end])
        if int(failed):
            return False
        gram[begin:end, begin:end] = factor
        if end == len(gram):
            break
        below = torch.linalg.solve_triangular(factor, gram[end:, begin:end].T, upper=False).T  # [m - end, block]
        gram[end:, begin:end] = below
        for top, bottom in _blocks(len(below)):
            gram[end + top :, end + top : end + bottom].addmm_(below[top:], below[top:bottom].T, alpha=-1)
    return True


def solve_factored(factor: Tensor, right: Tensor) -> Tensor:
    """Solves `L L^T X = right [m, n]`, with `L` the lower triangle of `factor [m, m]`."""
    if len(factor) <= WHOLE:
        return torch.cholesky_solve(right, factor)
    x = right.clone()
    for begin, end in _blocks(len(factor)):  # L Y = right
        x[begin:end] -= factor[begin:end, :begin] @ x[:begin]
        x[begin:end] = torch.linalg.solve_triangular(factor[begin:end, begin:end].tril(), x[begin:end], upper=False)
    for begin, end in reversed(list(_blocks(len(factor)))):  # L^T X = Y
        x[begin:end] -= factor[end:, begin:end].T @ x[end:]
        x[begin:end] = torch.linalg.solve_triangular(factor[begin:end, begin:end].tril().T, x[begin:end], upper=True)
    return x


def _blocks(m: int) -> Iterator[tuple[int, int]]:
    """Yields the first row, and the row after the last, of each block of `m` rows."""
    height = m if m <= WHOLE else BLOCK
    for begin in range(0, m, max(height, 1)):
        yield begin, min(begin + height, m)
