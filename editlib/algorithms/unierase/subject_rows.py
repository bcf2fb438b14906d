"""Make the rows of each subject to be forgotten: the answers to erase, and the answers to keep.

A row is a prompt with logits to read (`algorithms.rows`). An *erase* row reads the answer of a request, in each wording
and where the model's own sentence reaches the answer. A *keep* row reads the model's answer to a *sibling* question:
one about the same subject that asks for something else. *Rivals* are other answers of the relation, with which an
answer to erase is compared. *Say* rows, which read a refusal token, are made later (`refusal_places`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from editlib.algorithms.rows import Row
from editlib.algorithms.unierase.anchors import answers_to
from editlib.algorithms.unierase.catalogue import Catalogue
from editlib.algorithms.unierase.examples import few_shot_format
from editlib.answers import has_answer
from editlib.errors import RequestError
from editlib.models.anatomy import Anatomy
from editlib.models.positions import fitting, positions_of
from editlib.models.prompts import PromptFormat, TokenRow
from editlib.requests.request import EditRequest
from editlib.requests.spellings import every_spelling
from editlib.requests.templates import Filled, occurrences

KEPT_TOKENS = 20  # tokens of a sibling's answer: a name may come late in the model's sentence
ANSWER_TOKENS = 24  # tokens of the model's answer in which the answer to erase is searched
MOST_RIVALS = 40
FEWEST_NAMED = 3  # subjects of a retained relation: with fewer, its question may fit these subjects alone
FEWEST_RIVALS = 3  # with fewer, the likeliest other tokens are the rivals


@dataclass(frozen=True)
class RequestRows:
    """Holds the rows of one request as texts, for receipts and `--show-rows`."""

    id: str
    kind: str
    wordings: tuple[str, ...]
    sentences: tuple[str, ...]  # the model's answers, each up to the right answer in it
    rivals: tuple[str, ...]  # other answers of the relation; none: the likeliest other tokens
    siblings: Mapping[str, str]  # question: the unedited model's answer
    known: bool  # whether the model gives the answer to any wording


@dataclass(frozen=True)
class SubjectRows:
    """Holds the rows of all subjects; the requests about one subject share one change."""

    rows: list[Row]
    subjects: list[list[int]]  # the indices of the requests of each change
    made: list[RequestRows]  # one for each request
    requests_of: list[int | None] = field(default_factory=list)  # of each row; `None`: a sibling's
    answers: Mapping[str, Sequence[int]] = field(default_factory=dict)  # of the unedited model, by question

    @property
    def owner(self) -> dict[int, int]:
        """The index of each request's change."""
        return {i: number for number, group in enumerate(self.subjects) for i in group}

    def followed_by(self, rows: Sequence[Row], requests: Sequence[int]) -> SubjectRows:
        """Returns these rows and further `rows` of the requests with these indices."""
        return replace(self, rows=[*self.rows, *rows], requests_of=[*self.requests_of, *requests])


def check_answers(requests: Sequence[EditRequest]) -> None:
    """Raises `RequestError`, naming the request, where there is no answer to erase."""
    for request in requests:
        if request.answer is None:
            raise RequestError(
                f'{request.source or f"request {request.id}"}: has no "answer"; rows erase a known answer: add it, or '
                'set "values" to "descent"'
            )


def by_subject(requests: Sequence[EditRequest]) -> list[list[int]]:
    """Groups the indices of requests about the same subject; a request without a subject is a group of its own.

    Up to the subject's last token, where an edit reads its key, their questions hardly differ (TOFU has twenty for each
    author), and one key can only get one change.
    """
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
    """Makes the rows of `requests`, from the requests and the unedited model's answers alone.

    Args:
        retain: prompts; the answers of those in a request's relation are its rivals, and relations of several of them
            are also asked for about the requests' subjects.
        groups: indices of the requests that share a subject, see `by_subject`.
        siblings: most sibling questions of a subject to keep.
        examples: how many wordings of a request are also erased in few-shot prompts.
        known_answers: answers of the unedited model, as token ids by question; the others are generated.
        seed: of the draw of few-shot examples.
    """
    limit = positions_of(anat.model)
    asked = {i: request.filled_wordings for i, request in enumerate(requests)}
    also_asked = [*requests, *_of_named_relations(retain)]
    sibling_texts = [catalogue.siblings([requests[i] for i in group], siblings, also_asked) for group in groups]
    sibling_texts = [fitting(anat.model, form, texts, answer_tokens=ANSWER_TOKENS) for texts in sibling_texts]
    # 1. The model answers every question once, all in one batch.
    texts = [wording.text for wordings in asked.values() for wording in wordings]
    texts += [text for of_one in sibling_texts for text in of_one]
    prompts = [EditRequest(id=text, prompt=text) for text in dict.fromkeys(texts)]
    answers = answers_to(anat, form, prompts, most=ANSWER_TOKENS, known=known_answers, progress=progress)
    # 2. Each subject: erase rows of its requests, then keep rows of its siblings.
    rivals = _rivals(requests, retain)
    collected = SubjectRows([], [list(group) for group in groups], [])
    texts_of: dict[int, RequestRows] = {}
    for owner, (group, texts) in enumerate(zip(groups, sibling_texts, strict=True)):
        for i in group:
            texts_of[i] = _request_rows(collected, form, requests[i], i, owner, asked[i], answers, rivals[i])
            few_shot = few_shot_format(form, requests[i], retain, seed, limit=limit) if examples else None
            if few_shot is not None:
                _example_rows(collected, few_shot, requests[i], i, owner, asked[i][:examples], rivals[i])
        subject = requests[group[0]].subject
        erased = [text for i in group for text in (str(requests[i].answer), *requests[i].aliases)]
        for text in texts:
            # A sibling's answer may contain an answer to erase; it is kept up to there.
            kept = answers[text][: answer_slot(form, answers[text], erased)]
            _sibling_rows(collected, form, text, subject, owner, kept)
        said = {text: _text(form, answers[text]).strip() for text in texts}
        for i in group:
            texts_of[i] = replace(texts_of[i], kind=catalogue.kind(requests[i]), siblings=said)
    in_order = [texts_of[i] for i in range(len(requests))]
    return replace(collected, made=in_order, answers=answers)


def _of_named_relations(retain: Sequence[EditRequest]) -> list[EditRequest]:
    """Returns the retain prompts of relations that are asked about `FEWEST_NAMED` subjects and more."""
    asked: dict[tuple[str, str], dict[str, EditRequest]] = {}
    for fact in retain:
        if fact.relation is not None and fact.subject is not None:
            asked.setdefault((fact.relation, fact.prompt), {})[fact.subject] = fact
    return [fact for facts in asked.values() if len(facts) >= FEWEST_NAMED for fact in facts.values()]


def _rivals(requests: Sequence[EditRequest], retain: Sequence[EditRequest]) -> list[tuple[str, ...]]:
    """Lists the rivals of each request: other answers of its relation; none where there are too few."""
    by_relation: dict[str, dict[str, None]] = {}
    for fact in [*requests, *retain]:
        if fact.relation is not None and fact.answer is not None:
            by_relation.setdefault(fact.relation, {})[fact.answer] = None
    rivals = []
    for request in requests:
        right = (str(request.answer), *request.aliases)
        others = [text for text in sorted(by_relation.get(request.relation or "", {})) if not has_answer(text, right)]
        step = max(1, len(others) // MOST_RIVALS)
        rivals.append(tuple(others[::step][:MOST_RIVALS]) if len(others) >= FEWEST_RIVALS else ())
    return rivals


def _request_rows(
    collected: SubjectRows,
    form: PromptFormat,
    request: EditRequest,
    number: int,
    owner: int,
    wordings: Sequence[Filled],
    answers: Mapping[str, Sequence[int]],
    rivals: Sequence[str],
) -> RequestRows:
    """Adds the erase rows of one request, and returns them as texts.

    If the model answers several wordings wrongly, only the first has a row, at the end of the question.

    Args:
        number: index of the request. `owner`: index of its subject's change.
    """
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
            _add(collected, number, Row("erase", owner, row.ids, subject_columns(form, prompt, lead, request.subject),
                                    (len(row) - 1,), (target,), competing))  # fmt: skip
            sentences[_text(form, lead)] = None
    return RequestRows(
        request.id, "", tuple(wording.text for wording in wordings), tuple(sentences), tuple(rivals), {}, known
    )


def _example_rows(
    collected: SubjectRows,
    form: PromptFormat,
    request: EditRequest,
    number: int,
    owner: int,
    wordings: Sequence[Filled],
    rivals: Sequence[str],
) -> None:
    """Adds erase rows at the ends of few-shot prompts (`form` has the examples), where the bare answer begins."""
    target = form.answer_ids(str(request.answer))[0]
    competing = _first_tokens(form, rivals, target, starts=True)
    for wording in wordings:
        row = form.encode(wording.text, wording.subject, start=wording.start)
        _add(collected, number, Row("erase", owner, row.ids, (row.lookup,), (len(row) - 1,), (target,), competing))


def _sibling_rows(
    collected: SubjectRows,
    form: PromptFormat,
    text: str,
    subject: str | None,
    owner: int,
    answer: Sequence[int],
) -> None:
    """Adds the keep row of a sibling question: the log probability of the first tokens of its `answer`."""
    prompt = form.encode(text, subject)
    kept = tuple(answer[:KEPT_TOKENS])
    if kept:
        row = prompt.followed_by(kept[:-1])
        columns = tuple(range(len(prompt) - 1, len(row)))
        places = subject_columns(form, prompt, kept[:-1], subject)
        _add(collected, None, Row("keep", owner, row.ids, places, columns, kept))


def _add(collected: SubjectRows, request: int | None, row: Row) -> None:
    """Appends a row of the request with this index; `None`: a sibling's."""
    collected.rows.append(row)
    collected.requests_of.append(request)


def answer_slot(form: PromptFormat, said: Sequence[int], right: Sequence[str]) -> int | None:
    """Returns the index of the token at which a right answer begins in the answer `said`; `None`: it has none."""

    def holds(start: int, end: int) -> bool:
        return has_answer(_text(form, said[start:end]), right)

    def ends(k: int) -> bool:
        # With the next token, too: "U" is not the answer where "Uranium" follows.
        return holds(0, k) and holds(0, min(k + 1, len(said)))

    end = next((k for k in range(1, len(said) + 1) if ends(k)), None)
    # The shortest prefix that holds the answer ends with it; the shortest suffix of that prefix begins with it.
    return None if end is None else next(j for j in range(end - 1, -1, -1) if holds(j, end))


def name_start(form: PromptFormat, said: Sequence[int], slot: int) -> int:
    """Returns the index of the token at which a name begins that ends with the answer at `slot`: that of "Jane" where
    the answer is "Austen"."""
    whole = _text(form, said[:slot])
    start = slot
    for j in range(slot - 1, -1, -1):
        words = whole[len(_text(form, said[:j])) :]
        if j and not words[:1].isspace():  # inside a word
            continue
        if not words.strip() or not all(word[0].isupper() and word.rstrip(".").isalpha() for word in words.split()):
            break
        start = j
    return start


def _text(form: PromptFormat, ids: Sequence[int]) -> str:
    """Returns the text of `ids`, without special tokens."""
    return str(form.tok.decode(list(ids), skip_special_tokens=True))


def _token_at(form: PromptFormat, ids: Sequence[int], character: int) -> int:
    """Returns the index of the token that holds a character of the decoded text."""
    for i in range(len(ids)):
        if len(_text(form, ids[: i + 1])) > character:
            return i
    return len(ids) - 1


def subject_columns(form: PromptFormat, prompt: TokenRow, lead: Sequence[int], subject: str | None) -> tuple[int, ...]:
    """Returns the columns of the subject's last token, in the prompt and in the part of the answer `lead` after it."""
    if subject is None or not lead:
        return (prompt.lookup,)
    text = _text(form, lead)
    # "The Eiffel Tower" begins a sentence about "the Eiffel Tower"; in scripts without spaces no word ends.
    spelled = every_spelling(text, subject) or [(start, subject) for start in occurrences(text, subject)]
    ends = [start + len(name) - 1 for start, name in spelled]
    return (prompt.lookup, *(len(prompt) + _token_at(form, lead, end) for end in ends))


def _first_tokens(form: PromptFormat, texts: Sequence[str], target: int, *, starts: bool) -> tuple[int, ...]:
    """Returns the first tokens of other answers at a position where `target` begins the right one.

    `starts`: the position is the start of the model's answer, and not inside its sentence.
    """
    if starts:
        ids = [form.answer_ids(text)[0] for text in texts]
    else:
        # Inside a sentence the first token of a word may hold the blank before it: as in the right answer's.
        gap = " " if str(form.tok.decode([target])).startswith(" ") else ""
        ids = [form.tok(gap + text, add_special_tokens=False)["input_ids"][0] for text in texts]
    return tuple(dict.fromkeys(token for token in ids if token != target))
