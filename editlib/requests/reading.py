"""Reads and writes the files that requests come in."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from editlib.errors import OutputError, RequestError, quote
from editlib.requests.formats import FieldError, format_of, name_in, own, tofu, unzip
from editlib.requests.request import EditRequest
from editlib.requests.subjects import Subject, find_subjects

log = logging.getLogger(__name__)


def read_requests(path: str | Path, *, subjects: Mapping[str, str] | None = None) -> list[EditRequest]:
    """Read requests from a JSONL file or a JSON array.

    The format is found out by the fields of each object: the own one (see `EditRequest`), CounterFact
    (nested, or EasyEdit's flat form), zsRE, FastEdit, KnowEdit, TOFU, or plain prompts. A request
    without `id` or `case_id` is called `<file stem>:<position in the file>`. Questions of TOFU get
    their subjects from `editlib.requests.subjects`; those that none is found for are logged, and have none.

    Args:
        subjects: the user's own for questions of TOFU, by id or by question.

    Raises:
        RequestError: the file cannot be read or an object cannot be used; names file, line and field.
    """
    requests, questions = _read(Path(path))
    found = with_subjects([requests[i] for i in questions], subjects)
    for i, (request, _) in zip(questions, found, strict=True):
        requests[i] = request
    if any(subject is None or subject.rule != "given" for _, subject in found):
        tell_subjects(Path(path).name, found)
    return requests


def _read(path: Path) -> tuple[list[EditRequest], list[int]]:
    """The requests of a file as they stand there, and which of them are in a format that has no subjects."""
    requests: list[EditRequest] = []
    questions: list[int] = []
    lines: dict[str, int] = {}
    for line, value in _objects(path, _read_text(path)):
        where = f"{path}:{line}"
        if not isinstance(value, dict):
            raise RequestError(f"{where}: {quote(value)}; expected a JSON object; write {{...}}")
        for request, is_question in _to_requests(value, where, path.stem, len(requests) + 1):
            if request.id in lines:
                given = f"{quote(request.id)} is taken by line {lines[request.id]}"
                raise FieldError("id", f"{given}; expected one of its own; rename one of the two", where)
            lines[request.id] = line
            questions += [len(requests)] if is_question else []
            requests.append(request)
    if not requests:
        raise RequestError(f"{path}: holds no request; expected at least one JSON object; add a line")
    return requests, questions


def read_questions(
    path: str | Path, *, subjects: Mapping[str, str] | None = None
) -> list[tuple[EditRequest, Subject | None]]:
    """The questions of a file in TOFU's form, each with how its subject was found, `None` where it was not.

    Args:
        subjects: see `with_subjects`.

    Raises:
        RequestError: as `read_requests`; or the file holds none.
    """
    requests, questions = _read(Path(path))
    if not questions:
        wanted = 'expected objects with "question" and "answer"; other formats say their subjects themselves'
        raise RequestError(f"{path}: holds no question in TOFU's form; {wanted}")
    return with_subjects([requests[i] for i in questions], subjects)


def with_subjects(
    requests: Sequence[EditRequest], subjects: Mapping[str, str] | None = None
) -> list[tuple[EditRequest, Subject | None]]:
    """Questions with the subjects that they lack, and how these were found; `group` becomes whom a question is about.

    Args:
        requests: in the order of their file, since `find_subjects` looks at the questions nearby.
        subjects: the user's own, by id or by question; they go before what is found.

    Raises:
        RequestError: `subjects` names no request, or what does not stand in its question once.
    """
    subjects = subjects or {}
    known = {name for request in requests for name in (request.id, request.question)}
    for name in subjects.keys() - known:
        wanted = "expected the id or the question of one; mend the mapping"
        raise RequestError(f"subjects: {quote(name)} is no request's; {wanted}")
    found = find_subjects([request.question for request in requests], [request.answer or "" for request in requests])
    pairs: list[tuple[EditRequest, Subject | None]] = []
    for request, subject in zip(requests, found, strict=True):
        own = subjects.get(request.id, subjects.get(request.question, request.subject))
        if own is not None:
            subject = Subject(own, "given", None if subject is None else subject.about)
        if subject is None:
            pairs.append((request, None))
            continue
        # The question spelled out: a `{}` of another subject in it would stay where it was.
        named = replace(request, prompt=request.question, subject=subject.text, group=request.group or subject.about)
        pairs.append((named, subject))
    return pairs


def read_subjects(path: str | Path) -> dict[str, str]:
    """The user's own subjects: one JSON object that maps ids or questions to subjects.

    Raises:
        RequestError: it cannot be read, or is anything else.
    """
    path = Path(path)
    found = _loads(path, _read_text(path), 1)
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise RequestError(f"{path}: {quote(found)}; expected one JSON object, from id or question to subject")
    return found


def tell_subjects(name: str, found: Sequence[tuple[EditRequest, Subject | None]]) -> None:
    """Logs how many subjects were found by which rule, and warns of the questions without one."""
    rules = Counter(subject.rule for _, subject in found if subject is not None)
    told = ", ".join(f"{rule} {count}" for rule, count in rules.most_common())
    log.info("%s: subjects of %d of %d questions (%s)", name, rules.total(), len(found), told or "none")
    if missing := [request.id for request, subject in found if subject is None]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        log.warning(
            '%s: no subject was found for %d of %d questions (%s%s): add a field "subject", or see `editlib subjects`; '
            "without one UniErase edits at a question's last token, and other algorithms refuse it",
            name,
            len(missing),
            len(found),
            ", ".join(missing[:5]),
            more,
        )


def _to_requests(value: dict[str, Any], where: str, stem: str, position: int) -> Iterator[tuple[EditRequest, bool]]:
    """The requests of one object, and whether they are in a format that has no subjects."""
    reader = own
    try:
        for i, row in enumerate(unzip(value), position):
            given = {name: v for name, v in row.items() if v is not None}
            reader = format_of(given)
            arguments = {"prompt": None, **reader(given)}
            given_id = given.get("id") if reader is own else given.get("id", given.get("case_id"))
            arguments["id"] = f"{stem}:{i}" if given_id is None else given_id
            if type(given_id) is int:  # not a bool
                arguments["id"] = str(given_id)
            yield EditRequest(**arguments, source=where), reader is tofu
    except FieldError as error:
        raise FieldError(name_in(reader, error.name), error.text, where) from None


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(f"{path}: {reason}; expected a JSONL or JSON file; check the path") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RequestError(f"{path}:{line}: not UTF-8; expected UTF-8 text; save the file as UTF-8") from None


def _objects(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """The JSON values of a file, each with the line that it starts on."""
    if text.lstrip().startswith("["):
        return _array(path, text)
    try:
        whole = json.loads(text)  # one object, printed over several lines
    except (ValueError, RecursionError):
        # Only "\n" ends a line: str.splitlines would cut a string at U+2028.
        rows = ((line, row) for line, row in enumerate(text.split("\n"), 1) if row.strip())
        return ((line, _loads(path, row, line)) for line, row in rows)
    return iter([(1 + text[: text.index(text.lstrip()[0])].count("\n"), whole)])


def _array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    position, line, end = text.index("[") + 1, 1, 0
    for value in _loads(path, text, 1):
        position = gap.match(text, position).end()  # type: ignore[union-attr]
        line += text.count("\n", end, position)
        yield line, value
        end, position = position, decoder.raw_decode(text, position)[1]


def _loads(path: Path, text: str, line: int) -> Any:
    wanted = "expected one JSON object; mend the line"
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        given = f"not JSON at column {error.colno} ({error.msg})"
        raise RequestError(f"{path}:{line + error.lineno - 1}: {given}; {wanted}") from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 100 000 brackets
        raise RequestError(f"{path}:{line}: not usable as JSON ({error}); {wanted}") from None


def write_requests(path: str | Path, requests: Iterable[EditRequest]) -> None:
    """Write requests as JSONL in the own format, replacing the file in one step.

    Raises:
        OutputError: the file cannot be written.
    """
    path = Path(path)
    text = "".join(json.dumps(request.to_dict(), ensure_ascii=False) + "\n" for request in requests)
    for mark in "\x85\u2028\u2029":  # readers that split at every Unicode line end get whole lines, too
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(text.encode("utf-8"))
        os.replace(temporary, path)
    except OSError as error:
        if temporary.is_file():
            temporary.unlink()
        wanted = "expected a file that can be written; check the folder"
        raise OutputError(f"{path}: {error.strerror}; {wanted}") from None


def requests_hash(requests: Iterable[EditRequest]) -> str:
    """SHA-256 (hex) of the requests in their order, the same on every machine and in every run."""
    canonical = json.dumps([request.to_dict() for request in requests], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
