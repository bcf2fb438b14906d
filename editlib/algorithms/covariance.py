"""Factor the covariance of a layer's keys once, for the solves of ROME and MEMIT."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from editlib.errors import StatsError
from editlib.models.precision import wide_dtype
from editlib.stats.cache import kept_beside
from editlib.stats.file import LayerStats

log = logging.getLogger(__name__)

JITTERS = (0.0, 1e-6, 1e-5, 1e-4)
"""Tried in turn, as shares of the mean eigenvalue: the smallest that leaves eight digits to a solve in fp64."""


@dataclass(frozen=True)
class Covariance:
    """Represents the uncentred covariance `C = E[k k^T]` of a layer's keys, as its Cholesky factor."""

    factor: Tensor  # [d_ff, d_ff], lower triangular
    jitter: float  # added to the diagonal of C, 0 for a moment of full rank

    def solve(self, keys: Tensor) -> Tensor:
        """Returns `C^-1 keys [d_ff, n]` for `keys [d_ff, n]`, solved in the widest dtype that their device has."""
        factor = self.factor.to(keys.device, wide_dtype(keys.device))
        return torch.cholesky_solve(keys.to(factor), factor).to(keys)


def covariance(moment: Tensor, name: str = "the layer") -> Covariance:
    """Factors a second moment `[d_ff, d_ff]` in fp64.

    A moment of fewer tokens than dimensions is singular, and the published code fails on it; here the smallest of
    `JITTERS` that helps is added to the diagonal, with a warning.

    Raises:
        StatsError: not finite, or not a second moment (negative directions).
    """
    moment = moment.to(torch.float64)
    if not torch.isfinite(moment).all():
        raise StatsError(f"the second moment of {name} is not finite; compute it again with `editlib stats`")
    mean = float(moment.diagonal().mean())  # of the eigenvalues, too: both sum up to the trace
    for share in JITTERS:
        jitter = share * mean
        raised = moment.clone()  # C + jitter I
        raised.diagonal().add_(jitter)
        factor, failed = torch.linalg.cholesky_ex(raised)
        pivots = factor.diagonal()
        # A pivot near the level of rounding would fill a solve with noise.
        if not int(failed) and float(pivots.min()) ** 2 > 1e-10 * mean:
            if share:
                log.warning(
                    "the covariance of %s has no full rank (too few tokens?): %.1g was added to its diagonal "
                    "(%.0g of its mean eigenvalue)", name, jitter, share,
                )  # fmt: skip
            return Covariance(factor, jitter)
    raise StatsError(f"the second moment of {name} has negative directions; compute it again with `editlib stats`")


def covariance_of(stats: LayerStats, *, device: torch.device | None = None) -> Covariance:
    """Factors stored statistics on `device` and keeps the factor beside their file; it is returned on the CPU."""

    def compute(moment: Tensor) -> dict[str, Tensor]:
        factored = covariance(moment, stats.header.module if stats.header else str(stats.path or "the layer"))
        return {"factor": factored.factor, "jitter": torch.tensor(factored.jitter, dtype=torch.float64)}

    stored = kept_beside(stats, "cholesky", compute, device)
    return Covariance(stored["factor"], float(stored["jitter"]))
