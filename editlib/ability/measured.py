"""Hold the results of one model on one task by document, and compare two models on the same documents."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editlib.evaluation.intervals import bootstrap_stderr
from editlib.evaluation.metrics import MetricResult
from editlib.shelf import from_json

Aggregate = Callable[[Sequence[Any]], float]


@dataclass(frozen=True, kw_only=True)
class TaskScore(MetricResult):
    """Holds one number of a task, with each document's score, from which a paired difference is computed.

    `aggregation` is lm-eval's registered name of the function that computes `value` (`agg_value`) from `items` (one for
    each document, of any type; `None` for a document without a score), or `None` for a function that is not registered.
    `stderr` is lm-eval's standard error, which replaces an interval.
    """

    stderr: float | None
    aggregation: str | None
    items: tuple[Any, ...]

    @property
    def value(self) -> float | None:
        """The number; `None` if nothing could be scored."""
        return self.agg_value

    def to_row(self) -> dict[str, Any]:
        """Returns the fields of a number in a finished task's file."""
        return {name: getattr(self, name) for name in _ROW}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> TaskScore:
        """Reads the output of `to_row`.

        Raises:
            KeyError, TypeError: a field is missing, or holds something else.
        """
        given = {name: row[name] for name in _ROW if name not in ("value", "items")}
        return from_json(cls, {**given, "agg_value": row["value"], "items": tuple(row["items"])})


_ROW = ("name", "value", "stderr", "higher_is_better", "aggregation", "items")


@dataclass(frozen=True)
class TaskResult:
    """Holds all numbers of one model on one task.

    `documents` are hashes, in the order of every measure's items. `first_prompt` is the first prompt as the model read
    it; `None` for a text.
    """

    documents: tuple[str, ...]
    measures: tuple[TaskScore, ...]
    seconds: float
    first_prompt: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the result JSON-ready."""
        return {
            **vars(self),
            "documents": list(self.documents),
            "measures": [measure.to_row() for measure in self.measures],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskResult:
        """Reads the output of `to_dict`."""
        measures = [TaskScore.from_row(measure) for measure in data["measures"]]
        return from_json(cls, {**data, "documents": tuple(data["documents"]), "measures": tuple(measures)})


@dataclass(frozen=True)
class Difference:
    """Holds a measure of one model minus that of another, with its standard error over the documents of both.

    Not a `MetricResult`: its direction is that of the measure, and it has no interval of its own.
    """

    value: float
    stderr: float | None


def difference(base: TaskScore, edited: TaskScore, aggregate: Aggregate | None, *, seed: int = 0) -> Difference | None:
    """Computes `edited - base`, paired: both have items of the same documents in the same order.

    The standard error of a mean is `sd(d) / sqrt(n)` over the differences `d` of the items (Miller, arXiv 2411.00640);
    of anything else it comes from a paired bootstrap (`bootstrap_stderr`), and is `None` without `aggregate`.
    """
    if base.value is None or edited.value is None:
        return None
    value = edited.value - base.value
    pairs = [pair for pair in zip(base.items, edited.items, strict=True) if None not in pair]
    if base.stderr is None or len(pairs) < 2:
        return Difference(value, None)
    if base.aggregation == "mean":
        spread = statistics.stdev(float(after) - float(before) for before, after in pairs)
        return Difference(value, spread / math.sqrt(len(pairs)))
    if aggregate is None:
        return Difference(value, None)

    def change(sampled: Sequence[tuple[Any, Any]]) -> float:
        before, after = zip(*sampled, strict=True)
        return aggregate(after) - aggregate(before)

    return Difference(value, bootstrap_stderr(change, pairs, seed=seed))
