"""Read the rows of a table (CSV, TSV) as objects: the first line names the columns.

Spreadsheets separate cells by commas, semicolons or tabs, and write a byte order mark, and line ends inside quotes.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from editlib.errors import RequestError, first_line, quote
from editlib.requests import json_text
from editlib.requests.fields import OWN_FIELDS, SYNONYMS, FieldError
from editlib.requests.formats import format_of
from editlib.requests.readers import own

SUFFIXES = (".csv", ".tsv")
SEPARATORS = ",;\t|"
TEXTS = frozenset({"prompt", "question", "query", "answer", "subject", "target", "target_new", "src", "alt", "text"})
"""Columns of plain texts, even with a bracket at the beginning; other columns may have a JSON list or object."""
LISTS = ("aliases", "phrasings", "paraphrases", "neighbours")
_ALSO = frozenset(" ".join(SYNONYMS.values()).split()) | {"problem", "case_id", "requested_rewrite", "attribute", "gt"}
_KNOWN = frozenset(OWN_FIELDS) | _ALSO
WANTED = "expected a first line that names the columns, such as prompt,subject,answer"

Cells = list[str]


def is_table(path: Path) -> bool:
    """Returns whether a file is a table by its name; it may be gzipped."""
    name = path.name.lower().removesuffix(".gz")
    return name.endswith(SUFFIXES)


def table_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any] | None, str | None]]:
    """Yields each row with the line of the file that it begins in: its object, or a complaint. Empty rows are left out.

    Raises:
        RequestError: the first line names no columns, or a quotation mark is never closed.
    """
    first = 1
    if declared := re.match(r"sep=(.)\r?\n", text):  # Excel's own first line
        text, first = text[declared.end() :], 2
    separator = declared[1] if declared else _separator(path, text)
    rows = _records(path, text, separator, first)
    line, header = next(rows, (first, []))
    names = _columns(path, line, header)
    _check_columns(path, line, names)
    for line, cells in rows:
        if not any(cells):
            continue
        while len(cells) > len(names) and not cells[-1]:  # separators after the last cell
            cells.pop()
        if len(cells) != len(names):
            given = f"{len(cells)} cells for {len(names)} columns ({', '.join(names)})"
            yield line, None, f"{given}; expected one for each; put a text that holds the separator in quotes"
            continue
        pairs = zip(names, cells, strict=True)
        yield line, {name: _value(name, cell) for name, cell in pairs if name and cell}, None


def _separator(path: Path, text: str) -> str:
    """Returns the separator of a table: the one that gives the most known columns in the first line."""
    if path.name.lower().removesuffix(".gz").endswith(".tsv"):
        return "\t"
    begin = text.lstrip().split("\n", 1)[0]
    counts = {mark: sum(_name(cell) in _KNOWN for cell in begin.split(mark)) for mark in SEPARATORS}
    return max(SEPARATORS, key=lambda mark: (counts[mark], begin.count(mark)))


def _records(path: Path, text: str, separator: str, first: int) -> Iterator[tuple[int, Cells]]:
    """Yields the cells of each record, without blanks at their ends, and the line in which it begins."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    while True:
        line = first + reader.line_num
        try:
            cells = next(reader, None)
        except csv.Error as error:
            mended = 'close its quotation mark, and write a mark inside of it twice ("")'
            raise RequestError(f"{path}:{line}: not a table ({first_line(error)}); {WANTED}; {mended}") from None
        if cells is None:
            return
        yield line, [re.sub(r"\r\n?", "\n", cell).strip() for cell in cells]


def _columns(path: Path, line: int, header: Cells) -> list[str]:
    """Returns the names of the columns; "" for one without a name (a spreadsheet's row numbers), which is ignored.

    Raises:
        RequestError: a repeated name, or no known name.
    """
    names = ["" if re.fullmatch(r"(unnamed: ?\d+)?", _name(cell)) else _name(cell) for cell in header]
    while names and not names[-1]:
        names.pop()
    if "target_new" not in names and not {"queries", "target_true"} & {*names}:
        names = ["target_new" if name == "target" else name for name in names]
    twice = next((name for i, name in enumerate(names) if name and name in names[:i]), None)
    if twice is not None:
        raise RequestError(f"{path}:{line}: column {quote(twice)} is there twice; expected each once; rename one")
    if _KNOWN.isdisjoint(names):
        raise RequestError(f"{path}:{line}: columns {quote(', '.join(header))}; {WANTED}; add it")
    return names


def _check_columns(path: Path, line: int, names: Sequence[str]) -> None:
    """Raises `RequestError` if a table with our own columns has others too; formats of data sets may."""
    row: dict[str, Any] = {name: WANTED for name in names if name}
    try:
        reader = format_of(row)
    except FieldError:
        return  # an unsupported file: the error of its rows names the right one
    try:
        own(row) if reader is own else None
    except FieldError as error:
        raise RequestError(f"{path}:{line}: column {quote(error.name)}: {error.text}") from None


def _name(cell: str) -> str:
    return cell.strip().strip('"').strip().lower()


def _value(name: str, cell: str) -> Any:
    """Returns the value of a cell: a text, or a list or object written as JSON."""
    value: Any = cell
    if name not in TEXTS and cell.startswith(("[", "{")):
        try:
            value = json_text.loads(cell)
        except (ValueError, RecursionError):
            value = cell
    return [value] if name in LISTS and not isinstance(value, list) else value
