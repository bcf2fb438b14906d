"""Estimate the uncertainty of a measured number: Wilson's interval of a share, and bootstraps over items."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
DRAWS = 1000


def wilson_interval(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Computes the 95 % interval of a share (Wilson 1927); `(0, 1)` for no observations."""
    if n == 0:
        return 0.0, 1.0
    share = right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Sequence[float], *, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Computes the 95 % percentile interval of the mean of `values` (Efron 1979); `(0, 1)` for no values.

    Draws `resamples` samples of the same size with replacement, and returns the 2.5 % and 97.5 % quantiles of their
    means, without interpolation.
    """
    if not len(values):
        return 0.0, 1.0
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    means = np.asarray(values, dtype=float)[draws].mean(1)
    low, high = np.quantile(means, [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)


def bootstrap_stderr(
    statistic: Callable[[Sequence[T]], float], items: Sequence[T], *, draws: int = DRAWS, seed: int = 0
) -> float | None:
    """Estimates the standard deviation of `statistic` over `draws` samples of `items` with replacement, each as large
    as `items` (Efron and Tibshirani 1993, algorithm 6.1); `None` for fewer than two items, or a sample without a finite
    value."""
    if len(items) < 2:
        return None
    generator = np.random.default_rng(seed)
    try:
        resampled = [
            statistic([items[i] for i in generator.integers(len(items), size=len(items))]) for _ in range(draws)
        ]
    except OverflowError:  # the perplexity of a destroyed model
        return None
    spread = statistics.stdev(resampled) if all(map(math.isfinite, resampled)) else math.nan
    return spread if math.isfinite(spread) else None
