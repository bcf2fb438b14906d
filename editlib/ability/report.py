"""Write the numbers of all models side by side, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

NOTE = (
    "A cell is a value and its standard error; after an edited model's value, in brackets, its difference to {base} "
    "and the standard error of that difference, paired over the same documents. An arrow says which way is better. "
    "{which}"
)


@dataclass(frozen=True)
class AbilityRow:
    """Holds one number of one model, over `n` of the task's `total` documents (or windows of text).

    `stderr` is `None` if there is none. `difference` is this model minus the base, and `None` for the base and if the
    two had different documents; `difference_stderr` is paired over documents. A row of `ability.json`, flat so that any
    table program opens it; the measured number itself is a `TaskScore`.
    """

    model: str
    task: str
    metric: str
    value: float | None
    stderr: float | None
    higher_is_better: bool | None
    n: int
    total: int
    difference: float | None = None
    difference_stderr: float | None = None


@dataclass(frozen=True)
class AbilityReport:
    """Holds the settings of the run (`job`), the `base`, and a row for each model, task and metric."""

    job: Mapping[str, Any]
    base: str
    rows: tuple[AbilityRow, ...]

    def row(self, model: str, task: str, metric: str) -> AbilityRow:
        """Formats one task and metric as cells of a table.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if (row.model, row.task, row.metric) == (model, task, metric):
                return row
        raise KeyError((model, task, metric))

    def to_dict(self) -> dict[str, Any]:
        """Returns the report JSON-ready."""
        return {"job": dict(self.job), "base": self.base, "rows": [asdict(row) for row in self.rows]}

    def note(self) -> str:
        """Returns the note below the table."""
        limit, seed = self.job["limit"], self.job["seed"]
        which = "Tasks were run on all of their documents."
        if limit is not None:
            drawn = "first" if seed is None else f"documents drawn with seed {seed}, at most"
            which = f"Tasks were run on the {drawn} {limit}" + (" documents." if seed is None else ".")
        if how := self.job.get("prompts"):
            which += f" Tasks asked with these prompts: {json.dumps(how, ensure_ascii=False)}."
        return NOTE.format(base=self.base, which=which)


def table_rows(report: AbilityReport) -> list[list[str]]:
    """Builds a table: the head, then a row for each task and metric, with a column for each model."""
    models = list(dict.fromkeys(row.model for row in report.rows))
    rows = [["task", "metric", "n", *models]]
    for task, metric in dict.fromkeys((row.task, row.metric) for row in report.rows):
        by_model = {row.model: row for row in report.rows if (row.task, row.metric) == (task, metric)}
        first = next(iter(by_model.values()))
        arrow = {True: " ↑", False: " ↓", None: ""}[first.higher_is_better]
        numbers = " / ".join(dict.fromkeys(str(row.n) for row in by_model.values()))
        rows.append([task, metric + arrow, numbers, *(cell(by_model.get(model)) for model in models)])
    return rows


def cell(row: AbilityRow | None) -> str:
    """Formats a value with its standard error, and its difference from the base: `0.521 ± 0.014 (-0.012 ± 0.004)`."""
    if row is None or row.value is None:
        return "-"
    change = row.difference
    text = _with_error(row.value, row.stderr)
    return text if change is None else f"{text} ({_with_error(change, row.difference_stderr, sign=True)})"


def _with_error(value: float, error: float | None, *, sign: bool = False) -> str:
    form = ".3f" if abs(value) < 10 else ".2f" if abs(value) < 1e6 else ".1e"
    shown = f"{value:{'+' if sign else ''}{form}}"
    return shown if error is None else f"{shown} ± {error:{form}}"
