"""Turn a file of questions into the configuration of an lm-eval task: two formats, scored like the official tasks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editlib.errors import RequestError

SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Shape:
    """Holds the fields of a file's lines, the type of each, and the task's configuration without its data."""

    fields: Mapping[str, str]
    config: Mapping[str, Any]


def _metric(name: str, aggregation: str, better: bool) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": better}


# The templates and metrics of lm-eval's `lambada_openai` and `arc_easy`, for rows that are already split.
CONTINUATION = Shape(
    {"context": "a text", "continuation": "a text"},
    {
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "{{' ' + continuation}}",
        "metric_list": [_metric("perplexity", "perplexity", False), _metric("acc", "mean", True)],
    },
)
CHOICE = Shape(
    {"query": "a text", "choices": "a list of two texts or more", "gold": "the number of the right choice, from 0"},
    {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}{% if not query.endswith('Answer:') %}\nAnswer:{% endif %}",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [_metric("acc", "mean", True), _metric("acc_norm", "mean", True)],
    },
)
SHAPES = (CONTINUATION, CHOICE)


@dataclass(frozen=True)
class LocalFile:
    """Holds a file's rows, with the fields of its format only; `sha256` is over these."""

    shape: Shape
    rows: tuple[dict[str, Any], ...]
    sha256: str

    def config(self, name: str, folder: Path) -> dict[str, Any]:
        """Returns the configuration of the task `name`, whose rows are written to `folder`. `datasets` keeps its own
        files there too, so nothing is left in the user's cache."""
        path = folder / f"{name}.jsonl"
        path.write_text(self._lines(), encoding="utf-8")
        data = {"data_files": {"test": str(path)}, "cache_dir": str(folder / "datasets")}
        place = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        return {"task": name, **place, **self.shape.config, "metadata": {"version": 1.0}}

    def _lines(self) -> str:
        return "".join(json.dumps(row) + "\n" for row in self.rows)

    @classmethod
    def read(cls, path: Path) -> LocalFile:
        """Reads a file of JSON lines, all of one shape.

        Raises:
            RequestError: it cannot be read, or a line does not fit; names file, line and field.
        """
        rows: list[dict[str, Any]] = []
        shape: Shape | None = None
        for number, line in enumerate(_text(path).split("\n"), start=1):  # splitlines() would cut at U+2028 too
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            row = _object(line, where)
            shape = shape or _shape(row, where)
            rows.append(_checked(row, shape, where))
        if shape is None:
            raise RequestError(f"{path}: holds no questions; expected one JSON object per line")
        file = cls(shape, tuple(rows), "")
        digest = hashlib.sha256(json.dumps(shape.config).encode() + file._lines().encode())
        return cls(shape, tuple(rows), digest.hexdigest())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{path}: cannot be read ({reason}); give a file of JSON lines") from None


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: not JSON ({error}); expected one object per line") from None
    if not isinstance(row, dict):
        raise RequestError(f"{where}: a {type(row).__name__}; expected an object")
    return row


def _shape(row: Mapping[str, Any], where: str) -> Shape:
    """Finds the format that shares most fields with a line."""
    best = max(SHAPES, key=lambda shape: sum(name in row for name in shape.fields))
    if not any(name in row for name in best.fields):
        known = "; or ".join(", ".join(shape.fields) for shape in SHAPES)
        raise RequestError(
            f"{where}: its fields are {', '.join(row) or 'none'}; expected {known}; for other files write an lm-eval "
            "task (.yaml) and give that"
        )
    return best


def _checked(row: Mapping[str, Any], shape: Shape, where: str) -> dict[str, Any]:
    for name, expected in shape.fields.items():
        if name not in row:
            raise RequestError(f"{where}: field {name!r} is missing; expected {expected}")
        if not FITS[name](row[name], row):
            shown = json.dumps(row[name], ensure_ascii=False)
            raise RequestError(f"{where}: field {name!r} is {_short(shown)}; expected {expected}")
    return {name: row[name] for name in shape.fields}


def _is_text(value: Any, _: Mapping[str, Any]) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value == value.encode(errors="ignore").decode()


def _is_choices(value: Any, row: Mapping[str, Any]) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(_is_text(choice, row) for choice in value)


def _is_gold(value: Any, row: Mapping[str, Any]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(row["choices"])


FITS: Mapping[str, Callable[[Any, Mapping[str, Any]], bool]] = {
    "context": _is_text,
    "continuation": _is_text,
    "query": _is_text,
    "choices": _is_choices,
    "gold": _is_gold,
}


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
