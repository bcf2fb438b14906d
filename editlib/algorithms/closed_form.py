"""Keys, residuals and constraints -> the update, as factors.

`K [d_ff, n]` are the new keys, `R [d_model, n]` what the layer must add at them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.null_space import NullSpace
from editlib.errors import EditError


def alphaedit(
    keys: Tensor,
    residual: Tensor,
    null_space: NullSpace,
    *,
    l2: float,
    constraints: Sequence[Tensor] = (),
) -> LowRank:
    """The update that maps `keys` to `residual` and `constraints` to zero, inside the null space.

    Minimises `|Δ P K - R|^2 + |Δ P K_c|^2 + L2 |Δ|^2` over `Δ = Δ P` (AlphaEdit 2410.02355 eq. 11-14; UniErase
    2505.15674 eq. 11 and 13), which the published code writes as the dense system
    `(P (K K^T + K_c K_c^T) + L2 I) X = P K R^T`, `Δ = X^T`.

    With `A = P [K_c, K]` (`m` columns) it is solved as an `m x m` system when `m < d_ff` and as a `d_ff x d_ff`
    system otherwise, both by Cholesky.

    Args:
        constraints: key blocks `[d_ff, m_i]` whose output must not move (past edits, anchors times their weight's
            square root).

    Raises:
        EditError: the system is not positive definite (L2 of zero with dependent keys) or the result not finite.
    """
    new = null_space.project(keys)
    blocks = [null_space.project(block) for block in constraints if block.shape[1]]
    kept_out = torch.cat(blocks, dim=1) if blocks else new[:, :0]
    d_ff, n = new.shape
    if kept_out.shape[1] + n <= d_ff:
        both = torch.cat([kept_out, new], dim=1)
        gram = both.T @ both
        gram.diagonal().add_(l2)
        select = torch.zeros(both.shape[1], n, dtype=gram.dtype, device=gram.device)
        select[kept_out.shape[1] :] = torch.eye(n, dtype=gram.dtype, device=gram.device)
        right = both @ torch.cholesky_solve(select, _cholesky(gram))
    else:
        gram = new @ new.T + kept_out @ kept_out.T
        gram.diagonal().add_(l2)
        right = torch.cholesky_solve(new, _cholesky(gram))
    if l2 == 0 and bool((new.norm(dim=0) < 1e-7 * keys.norm(dim=0)).any()):
        raise EditError(
            "a key has no part in the null space; the model is unchanged: raise `nullspace_threshold`, or `L2`"
        )
    if not torch.isfinite(right).all():
        raise EditError("the solve gave values that are not finite; the model is unchanged: raise `L2`")
    return LowRank(residual.to(right.dtype), right.T.contiguous())


def exact(delta: LowRank, keys: Tensor) -> LowRank:
    """Rescales an update so that it maps `keys [d_ff, n]` to its residual exactly, within the directions it has.

    The ridge and the constraints leave each key short of its residual by a different amount. With
    `M = right @ keys [n, n]`, `Δ = R M^-1 right` is the update of least cost among those with `Δ K = R`: the equality
    constraint of EMMET (2403.14236, eq. 9) with the constraints' keys in place of the covariance.

    Raises:
        EditError: keys too much alike to be given different outputs.
    """
    short = delta.right @ keys
    sizes = torch.linalg.svdvals(short) if torch.isfinite(short).all() else short.new_zeros(1)
    if float(sizes.min()) <= len(short) * torch.finfo(short.dtype).eps * float(sizes.max()):
        raise EditError('two requests have the same key; the model is unchanged: remove one, or set `solve` to "ridge"')
    return LowRank(torch.linalg.solve(short, delta.left, left=False), delta.right)


def _cholesky(gram: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal()
    resolution = len(gram) * torch.finfo(gram.dtype).eps
    if (
        int(info)
        or not torch.isfinite(factor).all()
        or float(pivots.min()) ** 2 <= resolution * float(pivots.max()) ** 2
    ):
        raise EditError(
            f"the {len(gram)} x {len(gram)} system of the closed form is not positive definite; the model is "
            "unchanged: raise `L2`, or remove repeated requests"
        )
    return factor
