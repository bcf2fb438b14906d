"""What a small module must read to return what is wanted: exact for norms, by Gauss-Newton for anything smooth."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

ROUNDS, INNER = 40, 16  # of Gauss-Newton, and of conjugate gradients in each
PROBES = 8
PRECISION = 1e-5  # of what is wanted
TINY = 1e-30


def nearest(post: nn.Module, base: Tensor, target: Tensor) -> Tensor:
    """`y [n, d]` of the smallest `|post(base + y) - target|` for each row of `base [n, d]`; deterministic.

    Of an RMS or layer norm it is the nearest of all, and of the many `y` with one result the shortest; of another
    module it is the one that Levenberg-Marquardt comes to from `y = 0`.
    """
    with torch.enable_grad():  # inside `no_grad` forward derivatives are not taken
        return _refine(post, base, target, _on_the_sphere(post, base, target)).detach()


def _on_the_sphere(post: nn.Module, base: Tensor, target: Tensor) -> Tensor:
    """`nearest` for a norm, `post(v) = w * u + b` with `u` = `v` (centred or not) scaled to `|u|^2 = d`; else zeros.

    The least squares of `w * u - (target - b)` on a sphere: `u = w t / (w^2 + λ)`, where `λ` makes its length right
    (a secular equation, Golub and Van Loan, Matrix Computations, 6.2.1).
    """
    found = _as_norm(post, base)
    if found is None:
        return torch.zeros_like(base)
    weight, bias, centred = found
    goal, squares = weight * (target - bias), weight.square()

    def solution(ridge: Tensor) -> Tensor:
        share = 1 / (squares + ridge).clamp_min(TINY)
        middle = (goal * share).sum(1, keepdim=True) / share.sum(1, keepdim=True) if centred else 0.0
        return (goal - middle) * share

    width = base.shape[1]
    low = -squares.min() * (1 - 1e-6) * torch.ones_like(base[:, :1])  # too long a solution, if there is one
    high = goal.norm(dim=1, keepdim=True) / width**0.5  # too short a one
    for _ in range(100):
        middle = (low + high) / 2
        long = solution(middle).square().sum(1, keepdim=True) > width
        low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    unit = solution((low + high) / 2)
    unit = unit * (width / unit.square().sum(1, keepdim=True).clamp_min(TINY)).sqrt()
    mean = base.mean(1, keepdim=True) if centred else torch.zeros_like(base[:, :1])
    # Any length gives the same: the one nearest to what is read today, and not almost nothing.
    rms = (base - mean).square().mean(1, keepdim=True).sqrt()
    length = ((base - mean) * unit).mean(1, keepdim=True)
    return torch.maximum(length, rms / 10) * unit + mean - base


def _as_norm(post: nn.Module, base: Tensor) -> tuple[Tensor, Tensor, bool] | None:
    """(weight, bias, centred) of a module that proves to be a norm on what it is tried on; `None` for others."""
    generator = torch.Generator().manual_seed(0)
    tries = torch.randn(2, base.shape[1], generator=generator).to(base)
    tries[0] = tries[0].sign() * (1 + tries[0].abs() / 4)  # nowhere near zero: this one is divided by
    tries = 100 * torch.cat([tries, base / base.square().mean(1, keepdim=True).sqrt().clamp_min(TINY)])
    with torch.no_grad():
        bias, got = post(torch.zeros_like(base[:1])), post(tries)
    if not bool(torch.isfinite(got).all()):
        return None
    for centred in (False, True):
        read = tries - tries.mean(1, keepdim=True) if centred else tries
        read = read / read.square().mean(1, keepdim=True).sqrt().clamp_min(TINY)
        weight = (got[:1] - bias) / read[:1]
        if float((weight * read + bias - got).norm()) < 1e-4 * float(got.norm()):
            return weight, bias, centred
    return None


def _refine(post: nn.Module, base: Tensor, target: Tensor, y: Tensor) -> Tensor:
    """Levenberg-Marquardt from `y`, each row with its own damping; steps by conjugate gradients."""
    wanted = (post(base) - target).norm(dim=1, keepdim=True)
    gap = post(base + y) - target
    size = gap.norm(dim=1, keepdim=True)
    unit = _diagonal(post, base)
    damping = torch.full_like(wanted, 1e-3)
    still = size <= PRECISION * wanted
    for _ in range(ROUNDS):
        if bool(still.all()):
            break
        back: Callable[..., tuple[Tensor]] = torch.func.vjp(post, base + y)[1]

        def curvature(
            p: Tensor, at: Tensor = base + y, back: Callable[..., tuple[Tensor]] = back, damping: Tensor = damping
        ) -> Tensor:
            moved: Tensor = torch.func.jvp(post, (at,), (p / unit,))[1]
            return back(moved)[0] / unit + damping * p

        step = _conjugate_gradients(curvature, -back(gap)[0] / unit) / unit
        found = post(base + y + step) - target
        new = found.norm(dim=1, keepdim=True)
        better = ~still & (new < (1 - PRECISION) * size)  # less is rounding
        still |= (better & (new <= PRECISION * wanted)) | (damping > 1e3)
        y, gap, size = torch.where(better, y + step, y), torch.where(better, found, gap), torch.where(better, new, size)
        damping = torch.where(better, damping / 10, damping * 10)
    return y


def _diagonal(post: nn.Module, base: Tensor) -> Tensor:
    """About the diagonal of the Jacobian of `post` at each row of `base`, without its sign, `[n, d]`.

    A norm's Jacobian is its weights on the diagonal but for a term of rank one or two: in units of them a step costs
    a few products, however different the weights are.
    """
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros_like(base)
    for _ in range(PROBES):  # Hutchinson: E[z * Jz] over random signs
        signs = torch.randint(0, 2, base.shape, generator=generator).to(base) * 2 - 1
        found += signs * torch.func.jvp(post, (base,), (signs,))[1]
    found = found.abs() / PROBES
    return found.clamp_min(1e-3 * found.mean(dim=1, keepdim=True)).clamp_min(TINY)


def _conjugate_gradients(matrix: Callable[[Tensor], Tensor], right: Tensor) -> Tensor:
    """Solves `matrix(x) = right` for each row by itself; `matrix` is symmetric and positive definite."""
    x, rest, way = torch.zeros_like(right), right, right
    size = first = rest.square().sum(1, keepdim=True)
    for _ in range(INNER):
        image = matrix(way)
        length = size / (way * image).sum(1, keepdim=True).clamp_min(TINY)
        x, rest = x + length * way, rest - length * image
        size, last = rest.square().sum(1, keepdim=True), size
        if bool((size <= 1e-8 * first).all()):
            break
        way = rest + size / last.clamp_min(TINY) * way
    return x
