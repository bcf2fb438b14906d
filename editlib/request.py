"""One request to edit or forget a fact, and the files that such requests come in."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from editlib.errors import OutputError, RequestError
from editlib.request_formats import OWN_FIELDS, FieldError, format_of, name_in, own, short, tofu, unzip
from editlib.subjects import Subject, find_subjects

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probe:
    """A prompt with the answer that is expected to it."""

    prompt: str
    answer: str | None = None


@dataclass(frozen=True)
class EditRequest:
    """A fact to edit (with `target_new`) or to unlearn (without).

    `prompt` holds one `{}` where the subject stands; a prompt that spells the subject out once is
    turned into that form. Without a subject the prompt is plain text. `answer` and `aliases` are the
    truth, used to score. Lists become tuples; a neighbour may be a `Probe`, a dict or a bare prompt.

    Raises:
        RequestError: a field of the wrong type, empty, or at odds with the others.
    """

    id: str
    prompt: str
    subject: str | None = None
    target_new: str | None = None
    answer: str | None = None
    aliases: tuple[str, ...] = ()
    phrasings: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Probe, ...] = ()
    group: str | None = None
    relation: str | None = None
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        try:
            self._check()
        except FieldError as error:
            raise FieldError(error.name, error.text, self.source or f"request {short(self.id)}") from None

    def _check(self) -> None:
        _check_text("id", self.id)
        _check_text("prompt", self.prompt)
        for name in ("subject", "answer", "target_new", "group", "relation"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        for name in ("aliases", "phrasings", "paraphrases", "neighbours"):
            if not isinstance(getattr(self, name), (list, tuple)):
                raise FieldError(name, f"{short(getattr(self, name))}; expected a list; put it in [ ]")
            self._set(name, tuple(getattr(self, name)))
        self._set("neighbours", tuple(_probe(f"neighbours[{i}]", p) for i, p in enumerate(self.neighbours)))
        self._set("prompt", _template(self.prompt, self.subject))
        for name in ("aliases", "phrasings", "paraphrases"):
            for i, text in enumerate(getattr(self, name)):
                _check_text(f"{name}[{i}]", text)
        for name in ("phrasings", "paraphrases"):
            for i, text in enumerate(getattr(self, name)):
                _check_braces(f"{name}[{i}]", text, self.subject)
        for i, text in enumerate(self.filled_phrasings if self.subject else ()):
            if len(occurrences(text, self.subject)) != 1:
                wanted = f"{short(self.subject)} once, since the edit looks it up there"
                raise FieldError(f"phrasings[{i}]", f"{short(text)}; expected {wanted}; reword it")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen for everyone but __post_init__

    @property
    def question(self) -> str:
        """The prompt with the subject filled in."""
        return _fill(self.prompt, self.subject)

    @property
    def filled_phrasings(self) -> tuple[str, ...]:
        """The further phrasings that an edit uses, with the subject filled in."""
        return tuple(_fill(text, self.subject) for text in self.phrasings)

    @property
    def filled_paraphrases(self) -> tuple[str, ...]:
        """The paraphrases with the subject filled in."""
        return tuple(_fill(text, self.subject) for text in self.paraphrases)

    def to_dict(self) -> dict[str, Any]:
        """The request as one JSON object of the own format: no empty fields, no `source`."""
        out: dict[str, Any] = {}
        for name in OWN_FIELDS:
            value = getattr(self, name)
            if name == "neighbours":
                value = [{k: v for k, v in vars(probe).items() if v is not None} for probe in value]
            if value:
                out[name] = list(value) if isinstance(value, tuple) else value
        return out


def _fill(text: str, subject: str | None) -> str:
    # Never str.format: other braces in a prompt are ordinary text.
    return text if subject is None else text.replace("{}", subject)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        given = "missing" if value is None else short(value)
        raise FieldError(name, f"{given}; expected a string; write the text in quotes")
    if not value.strip():
        raise FieldError(name, f"{short(value)} is empty; expected some text; write it or take the field out")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        text = f"{short(value)} holds half a surrogate pair; expected Unicode text; mend the \\u escape"
        raise FieldError(name, text) from None


def _check_braces(name: str, text: str, subject: str | None) -> None:
    count = text.count("{}")
    if count > 1:
        given = f'{short(text)} has {count} "{{}}"'
        raise FieldError(name, f"{given}; expected one, in the subject's place; take the others out")
    if count and subject is None:
        given = f'missing, but {name} has "{{}}"'
        raise FieldError("subject", f'{given}; expected what fills it; add "subject" or spell it out')


def occurrences(text: str, subject: str) -> list[int]:
    """Where the subject stands as words of its own, else (as in scripts without spaces) anywhere."""
    literal = re.escape(subject)
    whole = [m.start() for m in re.finditer(rf"(?<!\w){literal}(?!\w)", text)]
    return whole or [m.start() for m in re.finditer(rf"(?={literal})", text)]


def _template(prompt: str, subject: str | None) -> str:
    """The prompt with `{}` in the subject's place, which must be the only one."""
    _check_braces("prompt", prompt, subject)
    if subject is None:
        return prompt
    if subject != subject.strip() or "{}" in subject:
        wanted = 'expected text without "{}" and without blanks at its ends'
        raise FieldError("subject", f"{short(subject)}; {wanted}; take them out")
    filled, place = _fill(prompt, subject), prompt.find("{}")
    found = occurrences(filled, subject)
    if not found:
        given = f"{short(subject)} is not in the prompt {short(prompt)}"
        raise FieldError("subject", f'{given}; expected it once; put "{{}}" in its place or drop "subject"')
    if len(found) > 1 or place not in (-1, found[0]):
        given = f"{short(subject)} stands more than once in {short(filled)}"
        raise FieldError("subject", f"{given}; expected it once; reword the prompt")
    return filled[: found[0]] + "{}" + filled[found[0] + len(subject) :]


def _probe(name: str, value: Any) -> Probe:
    if isinstance(value, Probe):
        value = vars(value)
    elif isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, Mapping):
        raise FieldError(name, f'{short(value)}; expected {{"prompt": ..., "answer": ...}}; write an object')
    for key in value.keys() - {"prompt", "answer"}:
        raise FieldError(f"{name}.{key}", 'unknown; expected "prompt" or "answer"; rename it or take it out')
    _check_text(f"{name}.prompt", value.get("prompt"))
    if value.get("answer") is not None:
        _check_text(f"{name}.answer", value["answer"])
    return Probe(value["prompt"], value.get("answer"))


def read_requests(path: str | Path, *, subjects: Mapping[str, str] | None = None) -> list[EditRequest]:
    """Read requests from a JSONL file or a JSON array.

    The format is found out by the fields of each object: the own one (see `EditRequest`), CounterFact
    (nested, or EasyEdit's flat form), zsRE, FastEdit, KnowEdit, TOFU, or plain prompts. A request
    without `id` or `case_id` is called `<file stem>:<position in the file>`. Questions of TOFU get
    their subjects from `editlib.subjects`; those that none is found for are logged, and have none.

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
            raise RequestError(f"{where}: {short(value)}; expected a JSON object; write {{...}}")
        for request, is_question in _to_requests(value, where, path.stem, len(requests) + 1):
            if request.id in lines:
                given = f"{short(request.id)} is taken by line {lines[request.id]}"
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
        raise RequestError(f"subjects: {short(name)} is no request's; {wanted}")
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
        raise RequestError(f"{path}: {short(found)}; expected one JSON object, from id or question to subject")
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
