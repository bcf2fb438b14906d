"""Invert a small module: find the input whose output is nearest to a target.

A norm is inverted directly (its outputs lie on an ellipsoid, so the nearest point solves a secular equation). The
result, or zero for any other smooth module, is then refined by Levenberg-Marquardt: Gauss-Newton steps whose damping
falls after a step that helps and rises after one that does not. Each step solves `(J^T J + damping) p = -J^T gap` by
conjugate gradients, which need products with the Jacobian `J` only, never `J` itself. All rows are solved at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

ROUNDS, INNER = 40, 16  # steps of Gauss-Newton, and of conjugate gradients in each
PROBES = 8  # random signs that the diagonal of a Jacobian is estimated from
PRECISION = 1e-5  # a row is done when its gap is below this share of the wanted change
TINY = 1e-30  # keeps a division by zero finite


def nearest(post: nn.Module, base: Tensor, target: Tensor) -> Tensor:
    """Returns `y [n, d]` that minimises `|post(base + y) - target|` for each row of `base [n, d]`; deterministic.

    For an RMS or layer norm it is the global minimum, and the shortest of the many `y` with the same result. For
    another module it is the local minimum that Levenberg-Marquardt reaches from `y = 0`.
    """
    with torch.enable_grad():  # `no_grad` switches off forward derivatives too
        return _refine(post, base, target, _on_the_sphere(post, base, target)).detach()


def _on_the_sphere(post: nn.Module, base: Tensor, target: Tensor) -> Tensor:
    """Solves `nearest` for a norm, `post(v) = w * u + b` with `u` = `v` (centred or not) scaled to `|u|^2 = d`.

    Least squares of `w * u - t`, `t = target - b`, on a sphere: `u = w t / (w^2 + λ)`, where `λ` makes its length right
    (a secular equation, Golub and Van Loan, Matrix Computations, 6.2.1). Zeros for a module that is not a norm.
    """
    norm = _as_norm(post, base)
    if norm is None:
        return torch.zeros_like(base)
    weight, bias, centred = norm  # [1, d], [1, d]
    goal, squares = weight * (target - bias), weight.square()  # [n, d], [1, d]

    def solution(ridge: Tensor) -> Tensor:
        share = 1 / (squares + ridge).clamp_min(TINY)  # [n, d]
        # A layer norm's u has mean zero: the multiplier of that constraint, [n, 1].
        middle = (goal * share).sum(1, keepdim=True) / share.sum(1, keepdim=True) if centred else 0.0
        return (goal - middle) * share

    # The length falls with the ridge above -min(w^2), so bisection finds the ridge of the right length.
    width = base.shape[1]
    low = -squares.min() * (1 - 1e-6) * torch.ones_like(base[:, :1])  # [n, 1]: the solution is too long, if any is
    high = goal.norm(dim=1, keepdim=True) / width**0.5  # [n, 1]: it is too short
    for _ in range(100):
        middle = (low + high) / 2
        long = solution(middle).square().sum(1, keepdim=True) > width
        low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    unit = solution((low + high) / 2)
    unit = unit * (width / unit.square().sum(1, keepdim=True).clamp_min(TINY)).sqrt()
    mean = base.mean(1, keepdim=True) if centred else torch.zeros_like(base[:, :1])  # [n, 1]
    # A norm ignores the length of its input: take the one nearest to the current input, but not near zero.
    rms = (base - mean).square().mean(1, keepdim=True).sqrt()
    length = ((base - mean) * unit).mean(1, keepdim=True)  # of the projection of base onto unit
    return torch.maximum(length, rms / 10) * unit + mean - base


def _as_norm(post: nn.Module, base: Tensor) -> tuple[Tensor, Tensor, bool] | None:
    """Returns weight, bias and whether it centres, of a module that acts as a norm on a few inputs; `None` for
    others."""
    generator = torch.Generator().manual_seed(0)
    tries = torch.randn(2, base.shape[1], generator=generator).to(base)
    tries[0] = tries[0].sign() * (1 + tries[0].abs() / 4)  # no entry near zero, since this row is a divisor
    # Large inputs, so that the norm's epsilon does not count.
    tries = 100 * torch.cat([tries, base / base.square().mean(1, keepdim=True).sqrt().clamp_min(TINY)])  # [2 + n, d]
    with torch.no_grad():
        bias, got = post(torch.zeros_like(base[:1])), post(tries)
    if not bool(torch.isfinite(got).all()):
        return None
    # The first row gives the weight; a norm then predicts the outputs of all other rows.
    for centred in (False, True):
        read = tries - tries.mean(1, keepdim=True) if centred else tries
        read = read / read.square().mean(1, keepdim=True).sqrt().clamp_min(TINY)
        weight = (got[:1] - bias) / read[:1]
        if float((weight * read + bias - got).norm()) < 1e-4 * float(got.norm()):
            return weight, bias, centred
    return None


def _refine(post: nn.Module, base: Tensor, target: Tensor, y: Tensor) -> Tensor:
    """Runs Levenberg-Marquardt from `y [n, d]`, each row with its own damping; steps by conjugate gradients."""
    wanted = (post(base) - target).norm(dim=1, keepdim=True)  # [n, 1]
    gap = post(base + y) - target  # [n, d]
    size = gap.norm(dim=1, keepdim=True)
    unit = _diagonal(post, base)  # [n, d]
    damping = torch.full_like(wanted, 1e-3)
    done = size <= PRECISION * wanted  # [n, 1]
    for _ in range(ROUNDS):
        if bool(done.all()):
            break
        back: Callable[..., tuple[Tensor]] = torch.func.vjp(post, base + y)[1]  # v -> J^T v

        def curvature(
            p: Tensor, at: Tensor = base + y, back: Callable[..., tuple[Tensor]] = back, damping: Tensor = damping
        ) -> Tensor:
            """Computes `(J^T J + damping) p` in the units of `_diagonal`, in which rows of different weights converge
            alike."""
            moved: Tensor = torch.func.jvp(post, (at,), (p / unit,))[1]  # J p, [n, d]
            return back(moved)[0] / unit + damping * p

        step = _conjugate_gradients(curvature, -back(gap)[0] / unit) / unit
        tried = post(base + y + step) - target
        new = tried.norm(dim=1, keepdim=True)
        better = ~done & (new < (1 - PRECISION) * size)  # a smaller gain is rounding
        done |= (better & (new <= PRECISION * wanted)) | (damping > 1e3)  # reached, or no step helps any more
        # A row takes the step only if it helps; otherwise it tries a shorter one in the next round.
        y, gap, size = torch.where(better, y + step, y), torch.where(better, tried, gap), torch.where(better, new, size)
        damping = torch.where(better, damping / 10, damping * 10)
    return y


def _diagonal(post: nn.Module, base: Tensor) -> Tensor:
    """Estimates the absolute diagonal of the Jacobian of `post` at each row of `base`, `[n, d]`.

    The Jacobian of a norm is diagonal plus a term of rank one or two. In units of the diagonal, conjugate gradients
    need only a few products, however much the norm's weights differ.
    """
    generator = torch.Generator().manual_seed(0)
    diagonal = torch.zeros_like(base)
    for _ in range(PROBES):  # Hutchinson: E[z * Jz] over random signs
        signs = torch.randint(0, 2, base.shape, generator=generator).to(base) * 2 - 1
        diagonal += signs * torch.func.jvp(post, (base,), (signs,))[1]
    diagonal = diagonal.abs() / PROBES
    # The estimate is noisy: an entry near zero would make the step explode.
    return diagonal.clamp_min(1e-3 * diagonal.mean(dim=1, keepdim=True)).clamp_min(TINY)


def _conjugate_gradients(matrix: Callable[[Tensor], Tensor], right: Tensor) -> Tensor:
    """Solves `matrix(x) = right [n, d]` for each row by itself; `matrix` is symmetric and positive definite."""
    x, residual, direction = torch.zeros_like(right), right, right
    size = first = residual.square().sum(1, keepdim=True)  # [n, 1]
    for _ in range(INNER):
        image = matrix(direction)
        length = size / (direction * image).sum(1, keepdim=True).clamp_min(TINY)
        x, residual = x + length * direction, residual - length * image
        size, last = residual.square().sum(1, keepdim=True), size
        if bool((size <= 1e-8 * first).all()):  # 1e-4 of the norm: the outer step is inexact anyway
            break
        direction = residual + size / last.clamp_min(TINY) * direction
    return x
