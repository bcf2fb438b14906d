"""Rows of each subject to be forgotten: what to erase, and what to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from editlib.algorithms.rows import Row
from editlib.algorithms.unierase.anchors import answers_to
from editlib.algorithms.unierase.catalogue import Catalogue
from editlib.algorithms.unierase.examples import behind_examples
from editlib.answers import has_answer
from editlib.errors import RequestError
from editlib.models.anatomy import Anatomy
from editlib.models.prompts import PromptFormat, TokenRow
from editlib.requests.request import EditRequest
from editlib.requests.templates import Filled, occurrences

KEPT_TOKENS = 20  # of a sibling's answer: a name may come late in the model's sentence
ANSWER_TOKENS = 24  # of the model's own sentence, in which the answer to erase is looked for
MOST_RIVALS = 40
FEWEST_RIVALS = 3  # other answers of a relation; with fewer the likeliest other tokens compete


@dataclass(frozen=True)
class RequestRows:
    """Holds what was made for one request, as texts: for receipts and `--show-rows`."""

    id: str
    kind: str
    wordings: tuple[str, ...]
    sentences: tuple[str, ...]  # the model's own, up to the answer
    rivals: tuple[str, ...]  # other answers of the relation; none: the likeliest other tokens
    siblings: Mapping[str, str]  # question: what the model answers today
    known: bool  # whether the model gives the answer to any wording


@dataclass(frozen=True)
class SubjectRows:
    """Holds rows of all subjects. `subjects[i]`: numbers of the requests that share change `i`; `owner`: the
    reverse."""

    rows: list[Row]
    subjects: list[list[int]]
    made: list[RequestRows]
    requests_of: list[int | None] = field(default_factory=list)  # of each row; `None`: a sibling's
    answers: Mapping[str, Sequence[int]] = field(default_factory=dict)  # of the unedited model, by question

    @property
    def owner(self) -> dict[int, int]:
        return {i: number for number, group in enumerate(self.subjects) for i in group}


def check_answers(requests: Sequence[EditRequest]) -> None:
    """Raises `RequestError`, naming the request, where there is no answer to erase."""
    for request in requests:
        if request.answer is None:
            raise RequestError(
                f'{request.source or f"request {request.id}"}: has no "answer"; rows erase a known answer: add it, or '
                'set "values" to "descent"'
            )


def by_subject(requests: Sequence[EditRequest]) -> list[list[int]]:
    """Returns the requests, by number, that ask about one subject. Up to the subject's last token, where an edit reads
    its key, their questions hardly differ (TOFU asks twenty about one author), and one key can be given one change
    only."""
    groups: dict[str | int, list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(i if request.subject is None else request.subject, []).append(i)
    return list(groups.values())


def subject_rows(
    anat: Anatomy,
    form: PromptFormat,
    requests: Sequence[EditRequest],
    retain: Sequence[EditRequest],
    groups: Sequence[Sequence[int]],
    *,
    siblings: int,
    catalogue: Catalogue,
    examples: int = 0,
    known_answers: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> SubjectRows:
    """Makes the rows of `requests`, from the requests alone and from what the model answers today.

    Args:
        retain: prompts whose answers compete with a request's answer where they share its relation.
        groups: requests, by number, that share a subject and so a change.
        siblings: how many sibling questions about a subject are held.
        examples: how many wordings of a request are erased behind examples as well.
        seed: draws the examples.
    """
    asked = {i: request.filled_wordings for i, request in enumerate(requests)}
    held = [catalogue.siblings([requests[i] for i in group], siblings, requests) for group in groups]
    # Every question is put to the unchanged model once, all in one batch.
    texts = [wording.text for wordings in asked.values() for wording in wordings]
    texts += [text for siblings_of_one in held for text in siblings_of_one]
    prompts = [EditRequest(id=text, prompt=text) for text in dict.fromkeys(texts)]
    answers = answers_to(anat, form, prompts, most=ANSWER_TOKENS, known=known_answers, progress=progress)
    rivals = _rivals(requests, retain)
    found = SubjectRows([], [list(group) for group in groups], [])
    made: dict[int, RequestRows] = {}
    for number, (group, texts) in enumerate(zip(groups, held, strict=True)):
        for i in group:
            made[i] = _request_rows(found, form, requests[i], i, number, asked[i], answers, rivals[i])
            behind = behind_examples(form, requests[i], retain, seed) if examples else None
            if behind is not None:
                _example_rows(found, behind, requests[i], i, number, asked[i][:examples], rivals[i])
        subject = requests[group[0]].subject
        erased = [text for i in group for text in (str(requests[i].answer), *requests[i].aliases)]
        for text in texts:
            # What is to be erased is not kept by another question, whose answer may name it.
            kept = answers[text][: answer_slot(form, answers[text], erased)]
            _sibling_rows(found, form, text, subject, number, kept)
        said = {text: _text(form, answers[text]).strip() for text in texts}
        for i in group:
            made[i] = RequestRows(**{**vars(made[i]), "kind": catalogue.kind(requests[i]), "siblings": said})
    in_order = [made[i] for i in range(len(requests))]
    return SubjectRows(found.rows, found.subjects, in_order, found.requests_of, answers)


def _rivals(requests: Sequence[EditRequest], retain: Sequence[EditRequest]) -> list[tuple[str, ...]]:
    """Lists for each request the answers of other facts of its relation, none where there are too few to compare
    with."""
    by_relation: dict[str, dict[str, None]] = {}
    for fact in [*requests, *retain]:
        if fact.relation is not None and fact.answer is not None:
            by_relation.setdefault(fact.relation, {})[fact.answer] = None
    found = []
    for request in requests:
        own = (str(request.answer), *request.aliases)
        others = [text for text in sorted(by_relation.get(request.relation or "", {})) if not has_answer(text, own)]
        step = max(1, len(others) // MOST_RIVALS)
        found.append(tuple(others[::step][:MOST_RIVALS]) if len(others) >= FEWEST_RIVALS else ())
    return found


def _request_rows(
    found: SubjectRows,
    form: PromptFormat,
    request: EditRequest,
    number: int,
    owner: int,
    wordings: Sequence[Filled],
    answers: Mapping[str, Sequence[int]],
    rivals: Sequence[str],
) -> RequestRows:
    """Adds the erase rows of one request."""
    right = (str(request.answer), *request.aliases)
    sentences: dict[str, None] = {}
    known = False
    for first, wording in zip([True, *[False] * len(wordings)], wordings, strict=False):
        prompt = form.encode(wording.text, wording.subject, start=wording.start)
        said = tuple(answers[wording.text])
        slot = answer_slot(form, said, right)
        known = known or slot is not None
        if slot is not None or first:
            lead = said[: slot or 0]
            row = prompt.followed_by(lead)
            target = said[slot] if slot is not None else form.answer_ids(str(request.answer))[0]
            competing = _first_tokens(form, rivals, target, starts=not lead)
            _add(found, number, Row("erase", owner, row.ids, _places(form, prompt, lead, request.subject),
                                    (len(row) - 1,), (target,), competing))  # fmt: skip
            sentences[_text(form, lead)] = None
    return RequestRows(
        request.id, "", tuple(wording.text for wording in wordings), tuple(sentences), tuple(rivals), {}, known
    )


def _example_rows(
    found: SubjectRows,
    form: PromptFormat,
    request: EditRequest,
    number: int,
    owner: int,
    wordings: Sequence[Filled],
    rivals: Sequence[str],
) -> None:
    """Adds erase rows at the ends of questions behind examples (`form`), where the bare answer begins."""
    target = form.answer_ids(str(request.answer))[0]
    competing = _first_tokens(form, rivals, target, starts=True)
    for wording in wordings:
        row = form.encode(wording.text, wording.subject, start=wording.start)
        _add(found, number, Row("erase", owner, row.ids, (row.lookup,), (len(row) - 1,), (target,), competing))


def _sibling_rows(
    found: SubjectRows,
    form: PromptFormat,
    text: str,
    subject: str | None,
    owner: int,
    answer: Sequence[int],
) -> None:
    """Adds the keep row of a sibling question."""
    prompt = form.encode(text, subject)
    kept = tuple(answer[:KEPT_TOKENS])
    if kept:
        row = prompt.followed_by(kept[:-1])
        columns = tuple(range(len(prompt) - 1, len(row)))
        _add(found, None, Row("keep", owner, row.ids, _places(form, prompt, kept[:-1], subject), columns, kept))


def _add(found: SubjectRows, request: int | None, row: Row) -> None:
    found.rows.append(row)
    found.requests_of.append(request)


def answer_slot(form: PromptFormat, said: Sequence[int], right: Sequence[str]) -> int | None:
    """Returns the index of the token with which a right answer begins in the tokens `said`; `None`: it is not there."""

    def holds(start: int, end: int) -> bool:
        return has_answer(_text(form, said[start:end]), right)

    end = next((k for k in range(1, len(said) + 1) if holds(0, k)), None)
    # The shortest beginning that holds the answer ends with it; the shortest end of that begins with it.
    return None if end is None else next(j for j in range(end - 1, -1, -1) if holds(j, end))


def _text(form: PromptFormat, ids: Sequence[int]) -> str:
    """Returns the text of `ids`, without special tokens."""
    return str(form.tok.decode(list(ids), skip_special_tokens=True))


def _token_at(form: PromptFormat, ids: Sequence[int], character: int) -> int:
    """Returns the index of the token that holds a character of the decoded text."""
    for i in range(len(ids)):
        if len(_text(form, ids[: i + 1])) > character:
            return i
    return len(ids) - 1


def _places(form: PromptFormat, prompt: TokenRow, lead: Sequence[int], subject: str | None) -> tuple[int, ...]:
    """Returns the columns of the subject's last token in a prompt and in the answer's begin that follows it."""
    if subject is None or not lead:
        return (prompt.lookup,)
    text = _text(form, lead)
    ends = [start + len(subject) - 1 for start in occurrences(text, subject)]
    return (prompt.lookup, *(len(prompt) + _token_at(form, lead, end) for end in ends))


def _first_tokens(form: PromptFormat, texts: Sequence[str], target: int, *, starts: bool) -> tuple[int, ...]:
    """Returns the tokens that other answers begin with where `target` begins the right one."""
    if starts:
        ids = [form.answer_ids(text)[0] for text in texts]
    else:
        # Inside a sentence a word begins with the blank that its first token holds, if the right one's does.
        gap = " " if str(form.tok.decode([target])).startswith(" ") else ""
        ids = [form.tok(gap + text, add_special_tokens=False)["input_ids"][0] for text in texts]
    return tuple(dict.fromkeys(token for token in ids if token != target))
