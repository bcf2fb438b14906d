"""The data files that ship with editlib: facts, general prompts, questions and refusals for the token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path

import jsonlines

from editlib.errors import RequestError, first_line
from editlib.requests.reading import read_requests
from editlib.requests.request import EditRequest
from editlib.requests.spellings import find_spelling, plain_name


def _path(name: str) -> Path:
    return Path(str(resources.files("editlib") / "data" / name))


def _rows(name: str) -> list[dict]:
    with jsonlines.open(_path(name)) as rows:
        return list(rows)


def facts() -> list[EditRequest]:
    """Returns candidate facts with two paraphrases each, grouped by subject and relation."""
    return list(_facts())


@cache  # requests are immutable, and checking a thousand of them takes a tenth of a second
def _facts() -> tuple[EditRequest, ...]:
    return tuple(read_requests(_path("facts.jsonl")))


def general(split: str) -> list[EditRequest]:
    """Returns general prompts that must not change: questions with an answer and open instructions; "anchor" or
    "test"."""
    rows = _rows("general.jsonl")
    return [
        EditRequest(
            id=row["id"],
            prompt=row["prompt"],
            answer=row.get("answer"),
            aliases=tuple(row.get("aliases", ())),
        )
        for row in rows
        if row["split"] == split
    ]


def questions(split: str) -> list[str]:
    """Returns diverse questions to learn the token over ("train") or to test it ("heldout")."""
    rows = _rows("questions.jsonl")
    return [row["question"] for row in rows if row["split"] == split]


def question_frames(language: str) -> dict[str, str]:
    """Returns `{relation: question with one "{}"}` in "french", "german" or "spanish", for the relations of `facts`."""
    return frames()[language]


def frames(path: str | Path | None = None) -> dict[str, dict[str, str]]:
    """Returns `{language: {relation: question with one "{}"}}`, bundled or from the user's own JSONL file.

    Raises:
        RequestError: a file that cannot be read, or a row without `language`, `relation` and a `frame` with one `{}`.
    """
    source = _path("question_frames.jsonl") if path is None else Path(path)
    by_language: dict[str, dict[str, str]] = {}
    for number, line in enumerate(text_lines(source), 1):
        try:
            row = json.loads(line)
            language, relation, frame = (row[name] for name in ("language", "relation", "frame"))
            if not (isinstance(frame, str) and frame.count("{}") == 1):
                raise ValueError('the frame needs one "{}"')
            if not (isinstance(language, str) and isinstance(relation, str)):
                raise ValueError("language and relation are texts")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            wanted = 'expected {"language": ..., "relation": ..., "frame": "... {} ..."}'
            raise RequestError(f"{source}: entry {number} ({first_line(error)}); {wanted}") from None
        by_language.setdefault(language, {})[relation] = frame
    return by_language


def wording_rules() -> list[dict]:
    """Returns rules that reword a question: `{"match": pattern of a question, "wordings": templates of its groups}`."""
    return _rows("wordings.jsonl")


def sibling_questions() -> list[dict]:
    """Returns further questions about a subject: `{"kind", "cues": words of a question that show the kind,
    "questions"}`."""
    return _rows("sibling_questions.jsonl")


def refusals(path: str | Path | None = None) -> list[str]:
    """Returns "I don't know" in many words, one per line; the bundled ones, or the user's own file.

    Raises:
        RequestError: a file that cannot be read or has fewer than two lines.
    """
    source = Path(path) if path is not None else _path("refusals.txt")
    sentences = text_lines(source, least=2)
    if sentences[0].startswith(("{", "[")) or any("\0" in line for line in sentences):
        raise RequestError(f"{path}: no lines of text; expected a UTF-8 text file with one entry a line, not JSON")
    return sentences


def text_lines(path: Path, *, least: int = 1) -> list[str]:
    """Returns the non-empty lines of a text file that do not start with `#`."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null byte in the name
        raise RequestError(f"{path}: cannot be read ({error}); give a UTF-8 text file, one entry a line") from None
    kept_lines = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if len(kept_lines) < least:
        raise RequestError(
            f"{path}: holds {len(kept_lines)} lines of text; at least {least} are needed, one entry a line"
        )
    return kept_lines


def retain_prompts(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """Returns the default retain set: all bundled facts except those that `requests` ask for, and the general prompts
    of the "anchor" split."""
    return without_overlap(facts(), requests) + general("anchor")


def without_overlap(prompts: Sequence[EditRequest], requests: Sequence[EditRequest]) -> list[EditRequest]:
    """Returns the `prompts` that do not ask for a fact in `requests`: neither their questions or paraphrases, nor the
    same answer about the same subject, in whatever spelling ("Shakespeare" is "William Shakespeare")."""
    known: dict[str, list[str]] = {}
    for request in requests:
        if request.subject is not None and request.answer is not None:
            known.setdefault(plain_name(request.subject), []).extend((request.answer, *request.aliases))
    questions_asked = {text for request in requests for text in (*request.wordings, *request.filled_paraphrases)}
    return [
        prompt
        for prompt in prompts
        if prompt.question not in questions_asked
        and not (prompt.subject and prompt.answer and _holds(prompt.answer, known.get(plain_name(prompt.subject), ())))
    ]


def _holds(answer: str, others: Sequence[str]) -> bool:
    """Returns whether `answer` contains one of the `others`, or the other way round."""
    return any(find_spelling(answer, other) or find_spelling(other, answer) for other in others)
