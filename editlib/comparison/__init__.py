"""Methods x seeds x sets: each run once, stored, attacked, and compared side by side in a table and a page."""

from __future__ import annotations

import warnings
from typing import Any

from editlib.comparison.config import PROTOCOLS, Config, read_config
from editlib.comparison.method import Cost, Method, Prepared
from editlib.comparison.methods import METHODS
from editlib.comparison.run import compare
from editlib.evaluation.forget_set import Benchmark, ForgetSet, Scores, Task
from editlib.evaluation.metrics import MetricResult

__all__ = [
    "METHODS",
    "PROTOCOLS",
    "Benchmark",
    "Config",
    "Cost",
    "ForgetSet",
    "Method",
    "Prepared",
    "Scores",
    "Task",
    "compare",
    "read_config",
]


def _measure(
    value: float | None,
    meaning: str,
    higher_is_better: bool = True,
    n: int | None = None,
    interval: tuple[float, float] | None = None,
) -> MetricResult:
    """Makes a measured number from the arguments of the former `Measure`."""
    return MetricResult("", value, {}, None, higher_is_better, n, meaning, interval)


_OLD_NAMES: dict[str, tuple[str, Any]] = {
    "Measure": ("editlib.evaluation.metrics.MetricResult", _measure),
    "Protocol": ("editlib.comparison.Benchmark", Benchmark),
}
"""Names before 0.2: the new name of each, and its replacement."""


def __getattr__(name: str) -> Any:
    if name in _OLD_NAMES:
        new, value = _OLD_NAMES[name]
        warnings.warn(f"editlib.comparison.{name} is now {new}", DeprecationWarning, stacklevel=2)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
