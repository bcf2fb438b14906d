"""Hold the result of a metric in open-unlearning's JSON shape, with its direction and meaning."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from editlib.errors import MetricError, quote
from editlib.files import write_json

LARGEST = sys.float_info.max  # whole numbers may be too big for math.isfinite

ROUNDING = 1e-9

Split = Literal["forget", "retain"]
"""Whether the questions were to be forgotten or to be kept; the direction of most metrics depends on it."""

Kind = Literal["generated", "teacher_forced", "combined"]
"""How a number was measured. `generated`: on text that the model generated. `teacher_forced`: on given answers that the
model read. `combined`: from other metrics."""


@dataclass(frozen=True)
class MetricResult:
    """Holds one measured number: a metric over one set of questions, with its direction, meaning and interval.

    `agg_value` is `None` if nothing could be scored, and `higher_is_better` if another tool's file does not say.
    `value_by_index` holds each item's scores under the keys that open-unlearning uses ("0", "1", ... and `score`,
    `prob`, `avg_loss`, `rougeL_recall`); an item that could not be scored has `None` there and does not count in `n`.
    `interval` is the 95 % interval, `None` if none was computed.
    """

    name: str
    agg_value: float | None
    value_by_index: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    kind: Kind | None = None
    higher_is_better: bool | None = None
    n: int | None = None
    meaning: str = ""
    interval: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Returns `{name: {"agg_value": ..., "value_by_index": {"0": {...}}, "higher_is_better": ..., ...}}`."""
        body = {
            "agg_value": self.agg_value,
            "higher_is_better": self.higher_is_better,
            "kind": self.kind,
            "n": self.n,
            "meaning": self.meaning,
            **({} if self.interval is None else {"interval": list(self.interval)}),
            "value_by_index": {index: dict(item) for index, item in self.value_by_index.items()},
        }
        return {self.name: body}

    def summary(self) -> dict[str, Any]:
        """Returns the number without its items, as comparisons store it; `None` in place of one that is not finite."""
        known = self.agg_value is not None and math.isfinite(self.agg_value)
        return {
            "value": self.agg_value if known else None,
            "meaning": self.meaning,
            "higher_is_better": self.higher_is_better is not False,
            "n": self.n,
            "interval": self.interval,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MetricResult:
        """Reads a result from a mapping of one name to its body; a body by open-unlearning has the first two keys only.

        Raises:
            MetricError: not one name, no usable `agg_value`, or items that are not objects.
        """
        if not isinstance(data, Mapping) or len(data) != 1:
            raise MetricError(f"expected one metric as {{name: {{...}}}}, got {quote(data)}")
        name, body = next(iter(data.items()))
        if not isinstance(body, Mapping) or "agg_value" not in body:
            raise MetricError(f'metric {name!r}: expected an object with "agg_value", got {quote(body)}')
        items = body.get("value_by_index") or {}
        if not isinstance(items, Mapping) or not all(isinstance(item, Mapping) for item in items.values()):
            raise MetricError(f'metric {name!r}: "value_by_index" must map an index to an object, got {quote(items)}')
        if (kind := body.get("kind")) not in (None, *get_args(Kind)):
            raise MetricError(f'metric {name!r}: "kind" must be one of {", ".join(get_args(Kind))}, got {quote(kind)}')
        if (better := body.get("higher_is_better")) not in (None, True, False):
            raise MetricError(f'metric {name!r}: "higher_is_better" must be true, false or null, got {quote(better)}')
        n = body.get("n")
        if n is not None and (isinstance(n, bool) or not isinstance(n, int)):
            raise MetricError(f'metric {name!r}: "n" must be a whole number or null, got {quote(n)}')
        return cls(
            name=str(name),
            agg_value=_finite(name, body["agg_value"]),
            value_by_index={str(index): dict(item) for index, item in items.items()},
            kind=kind,
            higher_is_better=better,
            n=n,
            meaning=str(body.get("meaning", "")),
            interval=_ends(name, body.get("interval")),
        )

    def values(self, key: str = "score") -> list[float]:
        """Lists the items' values under `key`, without those that could not be scored.

        Raises:
            MetricError: no item has this key.
        """
        if self.value_by_index and not any(key in item for item in self.value_by_index.values()):
            held = sorted({name for item in self.value_by_index.values() for name in item})
            raise MetricError(f"metric {self.name!r}: its items have no {key!r}; they hold {', '.join(held)}")
        return [float(item[key]) for item in self.value_by_index.values() if item.get(key) is not None]


@dataclass(frozen=True)
class Metric:
    """Describes a metric: its name, how it is measured, its direction on either kind of questions, and its meaning."""

    name: str
    kind: Kind
    higher_is_better: Mapping[Split, bool]
    meaning: str

    def averaged(self, on: Split, items: Sequence[Mapping[str, Any]], key: str) -> MetricResult:
        """Computes the mean of the items' values under `key`, as a result named `<on>_<kind>_<name>`."""
        if on not in get_args(Split):
            raise MetricError(f"on={on!r}; expected one of {', '.join(get_args(Split))}")
        counted = [item[key] for item in items if item[key] is not None]
        return MetricResult(
            name=f"{on}_{self.kind}_{self.name}",
            agg_value=math.fsum(counted) / len(counted) if counted else None,
            value_by_index={str(i): item for i, item in enumerate(items)},
            kind=self.kind,
            higher_is_better=self.higher_is_better[on],
            n=len(counted),
            meaning=self.meaning,
        )


MORE: Mapping[Split, bool] = {"forget": True, "retain": True}
"""Higher is better everywhere."""

KNOWN: Mapping[Split, bool] = {"forget": False, "retain": True}
"""Higher means that the model knows more: bad for what it should forget, good for what it should keep."""


def same_number(**given: Sequence[Any]) -> None:
    """Raises `MetricError` unless all of `given` have the same length."""
    if len({len(values) for values in given.values()}) > 1:
        counts = ", ".join(f"{len(values)} {name}" for name, values in given.items())
        raise MetricError(f"{counts}; expected one of each for every question")


def unit_value(name: str, value: float | MetricResult | None) -> float:
    """Returns a number, or that of a result, after a check that it is in 0..1.

    Raises:
        MetricError: there is none, or it lies outside.
    """
    number = value.agg_value if isinstance(value, MetricResult) else value
    if number is None or not -ROUNDING <= number <= 1.0 + ROUNDING:
        raise MetricError(f"{name} is {number}; expected a number from 0 to 1: measure it first")
    return min(max(float(number), 0.0), 1.0)


def write_results(path: Path, results: Iterable[MetricResult]) -> None:
    """Writes `results` into one JSON file, atomically.

    Raises:
        MetricError: two results have one name.
    """
    whole: dict[str, Any] = {}
    for result in results:
        if result.name in whole:
            raise MetricError(f"two results are named {result.name!r}; rename one with dataclasses.replace")
        whole |= result.to_dict()
    write_json(path, whole)


def read_results(path: Path, side: str = "edited") -> dict[str, MetricResult]:
    """Reads the results in a JSON file, by name.

    The file is one of `write_results`, open-unlearning's `*_EVAL.json`, or the `metrics.json` of `editlib eval`, which
    holds results under `scores`.

    Args:
        side: the model whose results are read from a `metrics.json`: "edited", or "base" if it was measured.

    Raises:
        MetricError: no such file, not a JSON object, an entry that is not a metric, or no results of this model.
    """
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MetricError(f"cannot read results from {path}: {error}; expected a JSON file of metrics") from None
    if not isinstance(whole, dict):
        raise MetricError(f"{path} holds {quote(whole)}; expected an object of metrics by name")
    scores = whole.get("scores")
    if isinstance(scores, dict) and "agg_value" not in scores:
        if not isinstance(scores.get(side), dict):
            raise MetricError(f"{path} holds no results of the model {side!r}; expected one of {', '.join(scores)}")
        whole = scores[side]
    try:
        return {name: MetricResult.from_dict({name: body}) for name, body in whole.items()}
    except MetricError as error:
        raise MetricError(f"{path}: {error}") from None


def _ends(name: str, value: Any) -> tuple[float, float] | None:
    """Checks the two ends of an interval."""
    if value is None:
        return None
    numbers = value if isinstance(value, list | tuple) else ()
    ends = [end for end in numbers if isinstance(end, int | float) and not isinstance(end, bool)]
    ends = [end for end in ends if abs(end) <= LARGEST]
    if len(numbers) != 2 or len(ends) != 2:
        raise MetricError(f'metric {name!r}: "interval" must be two numbers or null, got {quote(value)}')
    return float(ends[0]), float(ends[1])


def _finite(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        raise MetricError(f'metric {name!r}: "agg_value" must be a number or null, got {quote(value)}')
    return float(value)
