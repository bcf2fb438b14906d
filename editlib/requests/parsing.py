"""Make requests from the rows of a file, and report all faults and ambiguities at once."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from editlib.errors import RequestError, quote
from editlib.requests import formats, readers
from editlib.requests.fields import FieldError, JsonRow
from editlib.requests.request import EditRequest
from editlib.requests.rows import FileRow, file_rows

log = logging.getLogger(__name__)

NAMED_ROWS = 5
"""Number of bad rows to report with their errors; the others are reported by row number only."""
OF_ONE_KIND = 20
"""If more rows than this are all bad in the same way, the file is of another kind, and no row is named."""
REPEATED = "rewrites that ask the same as an earlier one are left out"


@dataclass
class Parsed:
    """Holds the contents of a request file."""

    requests: list[EditRequest] = field(default_factory=list)
    questions: list[int] = field(default_factory=list)
    """Whether each request is in a format that names no subject."""
    bad: list[tuple[FileRow, str]] = field(default_factory=list)
    """Unusable rows, with the fault of each."""
    notes: Counter[str] = field(default_factory=Counter)
    """Warnings about the file, each with its number of rows."""
    rows: int = 0


def parse_file(path: Path, *, skip_bad: bool = False) -> Parsed:
    """Reads a file's requests unchanged and logs its ambiguities.

    Args:
        skip_bad: leave out unusable rows, and log their number and faults.

    Raises:
        RequestError: the file cannot be read or has no request, or (without `skip_bad`) rows cannot be used; names all
            of them.
    """
    parsed = Parsed()
    places: dict[str, FileRow] = {}
    position = 1
    for row in file_rows(path):
        parsed.rows += 1
        position += _take(row, path, position, parsed, places)
    if not parsed.requests and not parsed.bad:
        raise RequestError(f"{path}: holds no request; expected at least one JSON object, or a table's row; add one")
    report_bad_rows(path, parsed.bad, parsed.rows, any_left=bool(parsed.requests), skip_bad=skip_bad)
    for note, count in parsed.notes.items():
        log.warning("%s: %s (%d of %d rows)", path.name, note, count, parsed.rows)
    return parsed


def report_bad_rows(
    path: Path, bad: Sequence[tuple[FileRow, str]], rows: int, *, any_left: bool, skip_bad: bool
) -> None:
    """Logs which of a file's `rows` are left out; does nothing if all can be used.

    Raises:
        RequestError: there are bad rows and they must not be left out, or no other row remains.
    """
    if bad and not skip_bad:
        raise RequestError(_complaint(path, bad, rows))
    if bad and not any_left:
        raise RequestError(f"{_complaint(path, bad, rows)}; no row is left")
    if bad:
        log.warning("%s: %d of %d rows left out: %s", path.name, len(bad), rows, "; ".join(_told(bad)))


def _take(row: FileRow, path: Path, position: int, parsed: Parsed, places: dict[str, FileRow]) -> int:
    """Puts the requests of one row, whose first has this `position` in the file, into `parsed`; returns how many."""
    several = False
    made: list[tuple[EditRequest, formats.Reader]] = []
    try:
        objects = formats.unfold(_object(row))
        several = isinstance(row.value.get("requested_rewrite"), list)
        if note := formats.left_out(row.value):
            parsed.notes[note] += 1
    except FieldError as error:
        parsed.bad.append((row, _field_said(error, readers.own)))
        return 1
    except RequestError as error:
        parsed.bad.append((row, str(error)))
        return 1
    asked = {(one.question, one.target_new) for one in parsed.requests} if several else set()
    for i, one in enumerate(objects):
        reader: formats.Reader = readers.own
        at = row if len(objects) == 1 else FileRow(f"{row.place}, number {i + 1}", one)
        try:
            given = {name: value for name, value in one.items() if value is not None}
            reader = formats.format_of(given)
            request = _request(given, reader, row.where(path), f"{path.stem}:{position + i}")
            if (request.question, request.target_new) in asked:
                parsed.notes[REPEATED] += 1
                continue
            if (first := places.get(request.id)) is not None:
                taken = f"{quote(request.id)} is taken by {first.place}"
                raise FieldError("id", f"{taken}; expected one of its own; rename one of the two")
        except FieldError as error:
            parsed.bad.append((at, _field_said(error, reader)))
            continue
        places[request.id] = row
        if note := formats.ambiguous(given, reader):
            parsed.notes[note] += 1
        made.append((request, reader))
        asked.add((request.question, request.target_new)) if several else None
    for request, reader in made:
        if reader in formats.UNNAMED:
            parsed.questions.append(len(parsed.requests))
        parsed.requests.append(request)
    return len(objects)


def _object(row: FileRow) -> JsonRow:
    if row.complaint is not None:
        raise RequestError(row.complaint)
    if isinstance(row.value, str):
        raise RequestError(f"{quote(row.value)}; expected a JSON object; {formats.PASSAGE}")
    if not isinstance(row.value, dict):
        raise RequestError(f"{quote(row.value)}; expected a JSON object; write {{...}}")
    return row.value


def _request(given: JsonRow, reader: formats.Reader, where: str, name: str) -> EditRequest:
    """Makes the request of one object; `name` is used if it has no name of its own."""
    arguments = {"prompt": None, **reader(given)}
    own_id = formats.id_of(given, reader)
    arguments["id"] = name if own_id is None else own_id
    for label in ("id", "group", "relation"):  # names, which data sets also number
        if type(arguments.get(label)) is int:  # not a bool
            arguments[label] = str(arguments[label])
    for label in ("group", "relation"):
        if arguments.get(label) == "":
            arguments[label] = None
    return EditRequest(**arguments, source=where)


def _field_said(error: FieldError, reader: formats.Reader) -> str:
    return str(FieldError(formats.name_in(reader, error.name), error.text, "")).removeprefix(": ")


def _complaint(path: Path, bad: Sequence[tuple[FileRow, str]], rows: int) -> str:
    if len(bad) == 1:
        row, said = bad[0]
        others = "" if rows == 1 else "; or leave it out with --skip-bad"
        return f"{row.where(path)}{_name_of(row)}: {said}{others}"
    if len(bad) >= rows > OF_ONE_KIND and len({said for _, said in bad}) == 1:
        return f"{path}: none of its {rows} rows can be used: {bad[0][1]}"
    listed = "; ".join(_told(bad))
    given = f"{path}: {len(bad)} of {rows} rows cannot be used: {listed}"
    return f"{given}; fix them, or leave them out with --skip-bad"


def _told(bad: Sequence[tuple[FileRow, str]]) -> list[str]:
    """Lists every bad row by its number, the first of them with their faults."""
    lines = [f"{row.place}{_name_of(row)}: {said}" for row, said in bad[:NAMED_ROWS]]
    if more := [row.place for row, _ in bad[NAMED_ROWS:]]:
        lines.append("and " + ", ".join(more))
    return lines


def _name_of(row: FileRow) -> str:
    """Returns an object's own name in brackets, after a blank; an empty text if it has none, or its line suffices."""
    if not isinstance(row.value, dict) or row.place.startswith("line"):
        return ""
    names = [(name, row.value[name]) for name in formats.IDS if type(row.value.get(name)) in (int, str)]
    return f" ({names[0][0]} {quote(names[0][1])})" if names else ""
