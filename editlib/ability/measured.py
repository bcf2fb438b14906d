"""Hold the results of one model on one task by document, and compare two models on the same documents."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from editlib.evaluation.intervals import bootstrap_stderr
from editlib.shelf import from_json

Aggregate = Callable[[Sequence[Any]], float]


@dataclass(frozen=True)
class TaskScore:
    """Holds one number of a task, with what each document adds to it, from which a paired difference is computed.

    `aggregation` is the name under which lm-eval keeps the function that makes `value` out of `items` (one for each
    document; `None` where a document has none), or `None` for a function that it does not keep.
    """

    name: str
    value: float | None
    stderr: float | None
    higher_is_better: bool | None
    aggregation: str | None
    items: tuple[Any, ...]


@dataclass(frozen=True)
class TaskResult:
    """Holds all numbers of one model on one task.

    `documents` are hashes, in the order of every measure's items. `first_prompt` is the first one as the model saw it;
    a text has none.
    """

    documents: tuple[str, ...]
    measures: tuple[TaskScore, ...]
    seconds: float
    first_prompt: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Gives the result JSON-ready."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskResult:
        """Reads what `to_dict` gave."""
        measures = [from_json(TaskScore, {**one, "items": tuple(one["items"])}) for one in data["measures"]]
        return from_json(cls, {**data, "documents": tuple(data["documents"]), "measures": tuple(measures)})


@dataclass(frozen=True)
class Difference:
    """Holds a measure of one model less that of another, with its standard error over the documents that both have."""

    value: float
    stderr: float | None


def difference(base: TaskScore, edited: TaskScore, aggregate: Aggregate | None, *, seed: int = 0) -> Difference | None:
    """Computes `edited - base`, paired: both hold items of the same documents in the same order.

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

    def change(some: Sequence[tuple[Any, Any]]) -> float:
        before, after = zip(*some, strict=True)
        return aggregate(after) - aggregate(before)

    return Difference(value, bootstrap_stderr(change, pairs, seed=seed))
