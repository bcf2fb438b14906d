"""Read and write request files."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from editlib.errors import OutputError, RequestError, quote
from editlib.requests.contradictions import warn_of_contradictions, warn_of_kept
from editlib.requests.json_text import MENDED, doubled_key
from editlib.requests.names import candidates
from editlib.requests.parsing import Parsed, parse_file
from editlib.requests.request import EditRequest
from editlib.requests.rows import parse_json, read_text
from editlib.requests.subjects import Subject, find_subjects
from editlib.requests.templates import literal

log = logging.getLogger(__name__)


def read_requests(
    path: str | Path,
    *,
    subjects: Mapping[str, str] | None = None,
    skip_bad: bool = False,
    left_out: dict[str, list[str]] | None = None,
    tell_missing: bool = True,
) -> list[EditRequest]:
    """Reads requests from JSON Lines, a JSON array, CSV, TSV, Parquet or a folder by `datasets.save_to_disk`.

    The format is recognised by the fields of each object: our own (see `EditRequest`) or a format listed in
    `docs/reference/file-formats.md`. A request without an id is called `<file stem>:<position in the file>`. Questions
    of sets that name no subject get theirs from `editlib.requests.subjects`; those that none is found for are logged,
    and have none. Logs, too, which of two fields is taken where a format has two, and requests that contradict one
    another.

    Args:
        subjects: the user's own for such questions, by id or by question.
        skip_bad: leave rows that cannot be used out, and log their numbers and what is wrong with them.
        left_out: gets these rows by the file's name, for a receipt.
        tell_missing: warn of questions whose subject is not found; not needed where `guess_subjects` follows.

    Raises:
        RequestError: the file cannot be read or rows cannot be used; names the file, every such line or row, and the
            field.
    """
    path = Path(path)
    parsed = parse_file(path, skip_bad=skip_bad)
    if left_out is not None and parsed.bad:
        _note_rows(left_out, path, parsed)
    requests = parsed.requests
    found = with_subjects([requests[i] for i in parsed.questions], subjects)
    for i, (request, _) in zip(parsed.questions, found, strict=True):
        requests[i] = request
    if any(subject is None or subject.rule != "given" for _, subject in found):
        tell_subjects(path.name, found, missing=tell_missing)
    warn_of_contradictions(path.name, requests)
    return requests


def read_with_retain(
    path: str | Path,
    retain: str | Path | None,
    *,
    skip_bad: bool = False,
    left_out: dict[str, list[str]] | None = None,
    tell_missing: bool = True,
) -> tuple[list[EditRequest], list[EditRequest] | None]:
    """Reads requests, and prompts to keep if there is a file of them; warns of requests that are also to be kept.

    Args:
        tell_missing: see `read_requests`; of the requests alone.

    Raises:
        RequestError: see `read_requests`.
    """
    requests = read_requests(path, skip_bad=skip_bad, left_out=left_out, tell_missing=tell_missing)
    kept = None if retain is None else read_requests(retain, skip_bad=skip_bad, left_out=left_out)
    warn_of_kept(requests, kept or ())
    return requests, kept


def read_questions(
    path: str | Path,
    *,
    subjects: Mapping[str, str] | None = None,
    skip_bad: bool = False,
    left_out: dict[str, list[str]] | None = None,
) -> list[tuple[EditRequest, Subject | None]]:
    """Reads the questions of a file in TOFU's form, each with how its subject was found, `None` if it was not.

    Args:
        subjects: see `with_subjects`.
        skip_bad, left_out: see `read_requests`.

    Raises:
        RequestError: as `read_requests`; or the file holds none.
    """
    parsed = parse_file(Path(path), skip_bad=skip_bad)
    if left_out is not None and parsed.bad:
        _note_rows(left_out, Path(path), parsed)
    if not parsed.questions:
        wanted = 'expected objects with "question" and "answer"; other formats say their subjects themselves'
        raise RequestError(f"{path}: holds no question in TOFU's form; {wanted}")
    return with_subjects([parsed.requests[i] for i in parsed.questions], subjects)


def _note_rows(left_out: dict[str, list[str]], path: Path, parsed: Parsed) -> None:
    """Adds the bad rows of a file, by its name, or by its path if another file of this name has some."""
    left_out[str(path) if path.name in left_out else path.name] = [row.place for row, _ in parsed.bad]


def with_subjects(
    requests: Sequence[EditRequest], subjects: Mapping[str, str] | None = None
) -> list[tuple[EditRequest, Subject | None]]:
    """Returns questions with the subjects that they lack, and how these were found; `group` becomes whom a question is
    about.

    Args:
        requests: in the order of their file, since `find_subjects` looks at the questions nearby.
        subjects: the user's own, by id or by question; they go before what is found.

    Raises:
        RequestError: `subjects` names no request, or a subject that is not in its question exactly once.
    """
    subjects = subjects or {}
    known = {name for request in requests for name in (request.id, request.question)}
    for name in subjects.keys() - known:
        wanted = "expected the id or the question of one; fix the mapping"
        raise RequestError(f"subjects: {quote(name)} names no request; {wanted}")
    found = find_subjects([request.question for request in requests], [request.answer or "" for request in requests])
    pairs: list[tuple[EditRequest, Subject | None]] = []
    for request, subject in zip(requests, found, strict=True):
        own = subjects.get(request.id, subjects.get(request.question, request.subject))
        if own is not None:
            subject = Subject(own, "given", None if subject is None else subject.about)
        if subject is None:
            pairs.append((request, None))
            continue
        # The question spelled out, where it is about another subject: its `{}` would stay where it was.
        prompt = request.prompt if subject.text == request.subject else literal(request.question)
        named = replace(request, prompt=prompt, subject=subject.text, group=request.group or subject.about)
        pairs.append((named, subject))
    return pairs


def read_subjects(path: str | Path) -> dict[str, str]:
    """Reads the user's own subjects: one JSON object that maps ids or questions to subjects.

    Raises:
        RequestError: it cannot be read, or is anything else.
    """
    path = Path(path)
    found = parse_json(path, read_text(path), 1)
    if (key := doubled_key(found)) is not None:
        raise RequestError(f"{path}: {quote(key)} is there twice; {MENDED}")
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise RequestError(f"{path}: {quote(found)}; expected one JSON object, from id or question to subject")
    return found


def guess_subjects(
    requests: Sequence[EditRequest], *, otherwise_last: bool = False, remedy: str = ""
) -> tuple[list[EditRequest], dict[str, str]]:
    """Guesses the subjects of requests that have none, where their prompts hold a single name, and logs them.

    Args:
        otherwise_last: leave requests that none is evident in without one: they are edited at the last token.
        remedy: what else may be done about a request without one, for the message.

    Returns:
        (requests, guessed): all requests with their subjects, and those that were guessed, by id.

    Raises:
        RequestError: a request's subject is neither given nor evident.
    """
    asked, answers = [one.question for one in requests], [one.answer or "" for one in requests]
    named: list[EditRequest] = []
    guessed: dict[str, str] = {}
    missing: list[EditRequest] = []
    for request, subject in zip(requests, find_subjects(asked, answers, guess=True), strict=True):
        found = request if request.subject is not None or subject is None else _with_guess(request, subject)
        named.append(found)
        if found.subject is None:
            missing.append(found)
        elif request.subject is None:
            guessed[found.id] = found.subject
    if missing and not otherwise_last:
        raise RequestError(_no_subject(missing, remedy))
    if guessed:
        listed = [f"{name}: {quote(subject)}" for name, subject in guessed.items()]
        more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
        log.info("subjects guessed from the prompts, since none are given (%s%s)", ", ".join(listed[:10]), more)
    if missing:
        log.info("edited at the last token, since no subject is given or evident: %s", _ids(missing))
    return named, guessed


def _with_guess(request: EditRequest, subject: Subject) -> EditRequest:
    """Returns the request with the subject; as it is where a phrasing does not hold that."""
    try:
        return replace(request, prompt=literal(request.question), subject=subject.text)
    except RequestError:
        return request


def _no_subject(missing: Sequence[EditRequest], remedy: str) -> str:
    """Says which request has no subject, which names its prompt holds, and what to do."""
    one = missing[0]
    names = ", ".join(quote(name) for name in candidates(one.question)) or "none"
    others = f"; so have {len(missing) - 1} more ({_ids(missing[1:])})" if len(missing) > 1 else ""
    lack = f'no "subject", and none is evident in {quote(one.question)} (names in it: {names}){others}'
    wanted = 'expected one; add "subject", as the prompt spells it'
    return f"{one.source or f'request {one.id}'}: {lack}; {wanted}{remedy and f', or {remedy}'}"


def _ids(requests: Sequence[EditRequest]) -> str:
    more = f" and {len(requests) - 5} more" if len(requests) > 5 else ""
    return ", ".join(request.id for request in requests[:5]) + more


def tell_subjects(name: str, found: Sequence[tuple[EditRequest, Subject | None]], *, missing: bool = True) -> None:
    """Logs how many subjects were found by which rule, and (with `missing`) warns of the questions without one."""
    rules = Counter(subject.rule for _, subject in found if subject is not None)
    listed = ", ".join(f"{rule} {count}" for rule, count in rules.most_common())
    if rules or missing:
        log.info("%s: subjects of %d of %d questions (%s)", name, rules.total(), len(found), listed or "none")
    lacking = [request for request, subject in found if subject is None]
    if lacking and missing:
        log.warning(
            '%s: no subject was found for %d of %d questions (%s): add a field "subject", or see `editlib subjects`; '
            "without one UniErase edits at a question's last token, and other algorithms refuse it",
            name,
            len(lacking),
            len(found),
            _ids(lacking),
        )


def write_requests(path: str | Path, requests: Iterable[EditRequest]) -> None:
    """Writes requests as JSONL in the own format, replacing the file in one step.

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
    """Computes the SHA-256 (hex) of the requests in their order, the same on every machine and in every run."""
    canonical = json.dumps([request.to_dict() for request in requests], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
