"""Solve for an update, as two factors, from keys, residuals and constraints.

`K [d_ff, n]` are the new keys, `R [d_model, n]` the changes of the layer's output at them, `C [d_ff, d_ff]` the
covariance of the keys that ordinary text has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from editlib.algorithms.covariance import Covariance
from editlib.algorithms.dense_system import factor_in_place, solve_factored
from editlib.algorithms.left_metric import LeftMetric
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.null_space import NullSpace
from editlib.errors import EditError


def rome(key: Tensor, plain_key: Tensor, change: Tensor, covariance: Covariance | None) -> LowRank:
    """Solves for the rank-one update that changes the matrix's output at `plain_key` by `change`.

    `Δ = change (C^-1 k)^T / (k*^T C^-1 k)` (ROME, 2202.05262, eq. 2), where as in the published code `k` is the mean
    over context templates and `k*` the key of the plain prompt; `C = I` without a covariance.

    Args:
        key, plain_key: `[d_ff, 1]`.
        change: `v* - W k*`, `[d_model, 1]`.

    Raises:
        EditError: the two keys point away from one another, so that no finite update exists.
    """
    direction = key if covariance is None else covariance.solve(key)  # C^-1 k [d_ff, 1]
    reach = plain_key.T @ direction  # [1, 1]
    # Below the rounding error of the product its sign is random and the update arbitrarily large.
    size = plain_key.norm() * direction.norm()
    if not torch.isfinite(direction).all() or float(reach.abs()) <= torch.finfo(reach.dtype).eps * float(size):
        raise EditError("the key of a request has no part in its own direction; the model is unchanged: rephrase it")
    return LowRank(change, (direction / reach).T.contiguous())


def memit(
    keys: Tensor,
    residual: Tensor,
    covariance: Covariance,
    *,
    weight: float,
    past: Tensor | None = None,
    metric: LeftMetric | None = None,
) -> LowRank:
    """Solves for the least-squares update over new keys, past keys and ordinary text.

    `Δ = R K^T (λ C + K_p K_p^T + K K^T)^-1` (MEMIT, 2210.07229, eq. 14), which the published code solves as one dense
    `d_ff x d_ff` system. With `A = [K_p, K]` (`m` columns) and `S = A^T (λ C)^-1 A` it is
    `Δ = R E^T (I + S)^-1 A^T (λ C)^-1` (Woodbury; `E` selects the new columns), an `m x m` system by Cholesky.

    Args:
        weight: `λ`, the published `mom2_update_weight`.
        past: `K_p [d_ff, p]`, keys of earlier edits (MEMIT_seq).
        metric: `M [d_model, d_model]` (ours): the metric of the cost at ordinary text and past keys, `tr(M Δ (λ C + K_p
            K_p^T) Δ^T)`. `None`: Euclidean, as published.

    Raises:
        EditError: the result is not finite.
    """
    both = keys if past is None else torch.cat([past.to(keys), keys], dim=1)  # A [d_ff, m]
    whitened = covariance.solve(both) / weight  # (λ C)^-1 A [d_ff, m]
    system = both.T @ whitened  # S [m, m]
    if metric is not None:
        past_count = both.shape[1] - keys.shape[1]
        return _checked(metric.solve(residual, *_without_past(system, whitened, past_count)))
    system.diagonal().add_(1)
    # (I + S)^-1 A^T (λ C)^-1; only the rows of the new keys are needed.
    select = _last_columns(both.shape[1], keys)
    return _finite(residual, torch.cholesky_solve(select, torch.linalg.cholesky(system)).T @ whitened.T)


def _without_past(system: Tensor, whitened: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Moves the first `count` columns of `A = [K_p, K]` into the cost, `G = λ C + K_p K_p^T` (Woodbury).

    Args:
        system: `A^T (λ C)^-1 A [m, m]`.
        whitened: `(λ C)^-1 A [d_ff, m]`.

    Returns:
        `K^T G^-1 K [n, n]` and `K^T G^-1 [n, d_ff]`.
    """
    past_past, past_new = system[:count, :count].clone(), system[:count, count:]
    past_past.diagonal().add_(1)
    shared = torch.cholesky_solve(past_new, torch.linalg.cholesky(past_past))  # [p, n]
    return system[count:, count:] - past_new.T @ shared, (whitened[:, count:] - whitened[:, :count] @ shared).T


def emmet(
    keys: Tensor,
    residual: Tensor,
    covariance: Covariance,
    *,
    weight: float,
    ridge: float,
    metric: LeftMetric | None = None,
) -> LowRank:
    """Solves for the update of least cost on ordinary text that maps `keys` to `residual`, exactly if `ridge` is zero.

    `Δ = R (K^T C'^-1 K + ridge I)^-1 K^T C'^-1` with `C' = weight C` (EMMET, 2403.14236, eq. 9).

    Args:
        metric: as for `memit`. It has no effect without a ridge, since the residual is then met exactly.

    Raises:
        EditError: repeated keys without a ridge, or a result that is not finite.
    """
    whitened = covariance.solve(keys) / weight  # C'^-1 K [d_ff, n]
    system = keys.T @ whitened  # [n, n]
    if metric is not None and ridge > 0:
        return _checked(metric.solve(residual, system, whitened.T, ridge=ridge))
    system.diagonal().add_(ridge)
    return _finite(residual, torch.cholesky_solve(whitened.T, _cholesky(system)))


def alphaedit(
    keys: Tensor,
    residual: Tensor,
    null_space: NullSpace,
    *,
    l2: float,
    constraints: Sequence[Tensor] = (),
    moment: Tensor | None = None,
    metric: LeftMetric | None = None,
) -> LowRank:
    """Solves for the update that maps `keys` to `residual` and `constraints` to zero, inside the null space.

    Minimises `|Δ P K - R|^2 + |Δ P K_c|^2 + L2 |Δ|^2` over `Δ = Δ P` (AlphaEdit 2410.02355 eq. 11-14; UniErase
    2505.15674 eq. 11 and 13), which the published code writes as the dense system
    `(P (K K^T + K_c K_c^T) + L2 I) X = P K R^T`, `Δ = X^T`. A `moment` `M` adds `tr(Δ P M P Δ^T)`.

    With `A = P [K_c, K]` (`m` columns) it is solved as an `m x m` system when `m < d_ff` and as a `d_ff x d_ff`
    system otherwise, both by Cholesky.

    Args:
        constraints: key blocks `[d_ff, m_i]` whose output must not move (past edits, anchors times their weight's
            square root).
        moment: `M [d_ff, d_ff]`, a second moment times its weight: a penalty on output changes at these keys (MEMIT's
            `λ C`), where the null space allows none at all. The system is built and factored in its memory, which
            overwrites it.
        metric: `M_l [d_model, d_model]` (ours): the metric of all costs but that of the residual, `tr(M_l Δ (L2 I + P
            (K_c K_c^T + M) P) Δ^T)`. `None`: Euclidean, as published.

    Raises:
        EditError: the system is not positive definite (L2 of zero with dependent keys) or the result not finite.
    """
    null_space = null_space.like(keys)
    new = null_space.project(keys)  # P K [d_ff, n]
    blocks = [null_space.project(block) for block in constraints if block.shape[1]]
    held = torch.cat(blocks, dim=1) if blocks else new[:, :0]  # P K_c [d_ff, m_c]
    if moment is not None:
        moment = null_space.project_both(moment)  # P M P
    if metric is not None:
        whitened = _cost_inverse(new, held, l2, moment)
        return _checked(metric.solve(residual, new.T @ whitened, whitened.T))
    if moment is None and held.shape[1] + new.shape[1] <= len(new):
        both = torch.cat([held, new], dim=1)  # A [d_ff, m]
        gram = both.T @ both
        gram.diagonal().add_(l2)
        # E selects the rows of the new keys: the constraints have no residual.
        right = both @ torch.cholesky_solve(_last_columns(both.shape[1], new), _cholesky(gram))
    else:
        # With d_ff keys or more, their sum of outer products is the smaller system.
        gram = _cost(held, l2, moment).addmm_(new, new.T)
        right = solve_factored(_factored(gram), new)
    if l2 == 0 and bool((new.norm(dim=0) < 1e-7 * keys.norm(dim=0)).any()):
        raise EditError(
            "a key has no part in the null space; the model is unchanged: raise `nullspace_threshold`, or `L2`"
        )
    return _finite(residual, right.T)


def _cost_inverse(new: Tensor, held: Tensor, l2: float, moment: Tensor | None) -> Tensor:
    """Returns `G^-1 K [d_ff, n]` with `G = L2 I + K_c K_c^T + M`, all inside the null space.

    Args:
        new: `K [d_ff, n]`. `held`: `K_c [d_ff, m]`. `moment`: `M [d_ff, d_ff]`.
    """
    if moment is None and l2 > 0 and held.shape[1] < len(held):
        gram = held.T @ held  # [m, m]
        gram.diagonal().add_(l2)
        # Woodbury: (L2 I + K_c K_c^T)^-1 = (I - K_c (L2 I + K_c^T K_c)^-1 K_c^T) / L2
        inner = torch.cholesky_solve(held.T @ new, _cholesky(gram)) if held.shape[1] else held.T @ new
        return (new - held @ inner) / l2
    return solve_factored(_factored(_cost(held, l2, moment)), new)


def _cost(held: Tensor, l2: float, moment: Tensor | None) -> Tensor:
    """Returns `G = L2 I + K_c K_c^T + M [d_ff, d_ff]` for `held`, `K_c [d_ff, m]`, in the memory of `moment`, `M`."""
    gram = held @ held.T if moment is None else moment.addmm_(held, held.T)
    gram.diagonal().add_(l2)
    return gram


def exact(delta: LowRank, keys: Tensor, *, floor: float = 0.0) -> LowRank:
    """Scales an update so that it maps `keys [d_ff, n]` to its residual exactly, within the directions it has.

    The ridge and the constraints leave each key short of its residual by a different amount. With
    `M = right @ keys [n, n]`, `Δ = R M^-1 right` is the update of least cost among those with `Δ K = R`: the equality
    constraint of EMMET (2403.14236, eq. 9) with the constraints' keys in place of the covariance.

    Args:
        floor: no direction of `M` is scaled up by more than `1 / floor`. The singular values of an update by
            `alphaedit` say which share of a residual it reaches, and they are small only where requests differ less
            than the constraints allow for: two questions about one subject have nearly the same key. Telling these
            apart would take the largest changes and gain nothing, so they get the mean of their residuals.

    Raises:
        EditError: keys too similar for different outputs, with a floor of zero; numbers that are not finite.
    """
    short = delta.right @ keys  # M [n, n], how much of each residual the update reaches
    if not floor:
        sizes = torch.linalg.svdvals(short) if torch.isfinite(short).all() else short.new_zeros(1)
        if float(sizes.min()) <= len(short) * torch.finfo(short.dtype).eps * float(sizes.max()):
            raise EditError(
                "two requests (or two of their relations, in the answer gate) have the same key; the model is "
                "unchanged: remove or rephrase one, or raise `exact_floor`"
            )
        return LowRank(torch.linalg.solve(short, delta.left, left=False), delta.right)
    if not torch.isfinite(short).all():
        raise EditError("the solve gave values that are not finite; the model is unchanged: raise `L2`")
    u, sizes, vh = torch.linalg.svd(short)
    # M^-1 with its singular values bounded from above.
    return LowRank(delta.left @ (vh.T / sizes.clamp_min(floor)) @ u.T, delta.right)


def _last_columns(m: int, keys: Tensor) -> Tensor:
    """Returns `E [m, n]`: the last `n` unit vectors, as many as `keys [d_ff, n]` has columns."""
    n = keys.shape[1]
    chosen = torch.zeros(m, n, dtype=keys.dtype, device=keys.device)
    chosen[m - n :] = torch.eye(n, dtype=keys.dtype, device=keys.device)
    return chosen


def _finite(residual: Tensor, right: Tensor) -> LowRank:
    """Returns the update `residual [d_model, n] @ right [n, d_ff]`, refused unless `right` is finite."""
    return _checked(LowRank(residual.to(right.dtype), right))


def _checked(delta: LowRank) -> LowRank:
    """Returns `delta`, with `right` contiguous; raises `EditError` unless the solve gave finite numbers."""
    if not torch.isfinite(delta.right).all():
        raise EditError(
            "the solve gave values that are not finite; the model is unchanged: raise `L2` or `mom2_update_weight`"
        )
    return LowRank(delta.left, delta.right.contiguous())


def _cholesky(gram: Tensor) -> Tensor:
    """Factors `gram [m, m]`; raises `EditError` unless it is positive definite beyond rounding."""
    factor, info = torch.linalg.cholesky_ex(gram)
    return _checked_factor(factor, not int(info))


def _factored(gram: Tensor) -> Tensor:
    """Factors `gram [m, m]` in its own memory: the factor is the lower triangle of what is returned. Raises as
    `_cholesky` does."""
    return _checked_factor(gram, factor_in_place(gram))


def _checked_factor(factor: Tensor, definite: bool) -> Tensor:
    """Returns `factor [m, m]`, or raises `EditError` unless its system is positive definite beyond rounding."""
    pivots = factor.diagonal()
    resolution = len(factor) * torch.finfo(factor.dtype).eps
    # A pivot at the level of rounding counts as zero: a solve with it gives noise.
    if (
        not definite
        or not torch.isfinite(pivots).all()
        or float(pivots.min()) ** 2 <= resolution * float(pivots.max()) ** 2
    ):
        raise EditError(
            f"the {len(factor)} x {len(factor)} system of the closed form is not positive definite; the model is "
            "unchanged: raise `L2` (`emmet_lambda`), or remove repeated requests"
        )
    return factor
