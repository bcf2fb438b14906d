"""Collect the places where refusal tokens should be generated after an edit, and where none may be.

A place is the end of a prompt: the position that predicts the next token (see `refusal_tokens`). The prompts are
encoded before the edit, since some of them end inside the unedited model's answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from editlib.algorithms.rows import Row
from editlib.algorithms.unierase.anchors import ANSWER_TOKENS
from editlib.algorithms.unierase.catalogue import Catalogue
from editlib.algorithms.unierase.subject_rows import answer_slot, name_start, subject_columns
from editlib.models.prompts import PromptFormat, TokenRow
from editlib.requests.request import EditRequest
from editlib.requests.spellings import plain_name
from editlib.requests.templates import Filled

OTHER_WORDINGS = 2  # of a retain question, in addition to its own
GENERAL = 160  # general questions
MOST_TOKENS = 24  # most tokens of an edit; if there are more relations, the rarest share the last one


@dataclass(frozen=True)
class Place:
    """Holds a prompt at whose end a refusal token should, or must not, be generated.

    Attributes:
        row: the prompt: a question, or a question with the model's sentence up to the answer.
        group: index of the relation that it asks for; `None`: a relation of no request.
        inside: whether the model's sentence has begun, so that a refusal must continue it.
        sibling: whether it asks for something else about the subject of a request.
    """

    row: TokenRow
    group: int | None
    inside: bool = False
    sibling: bool = False


@dataclass(frozen=True)
class RefusalPlaces:
    """Holds all places that the tokens of an edit are fitted to.

    Attributes:
        relations: the requests' relations, each with its token; `None` stands for all rare ones, which share a token.
        wanted: places where the token of the place's group should be generated.
        requests: the number of each wanted place's request.
        kept: places where no token may be generated.
        answers: prompts with the token ids of the model's answers, in which no token may be generated at any position.
        general: further prompts; the edited model's answers to them are used like `answers`.
    """

    relations: tuple[str | None, ...]
    wanted: list[Place] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)
    kept: list[Place] = field(default_factory=list)
    answers: list[tuple[TokenRow, tuple[int, ...]]] = field(default_factory=list)
    general: list[TokenRow] = field(default_factory=list)


def refusal_places(
    form: PromptFormat,
    requests: Sequence[EditRequest],
    retain: Sequence[EditRequest],
    siblings: Sequence[str],
    answers: Mapping[str, Sequence[int]],
    catalogue: Catalogue,
    *,
    wordings: int,
    general: Sequence[str] = (),
) -> RefusalPlaces:
    """Collects the places of an edit.

    The place of an answer is where the right answer begins in the unedited model's sentence. It is found by text
    search, so no rules of a language are needed.

    Args:
        requests: requests whose phrasings include the generated wordings.
        retain: prompts whose answers must stay.
        siblings: other questions about the requests' subjects.
        answers: the unedited model's answers, as token ids by question; a wording without an answer gives only the
            place at its end.
        wordings: how many further wordings of a question are used.
        general: general questions; those that name a subject of `requests` are left out.
    """
    relations = _relations(requests)
    found = RefusalPlaces(relations)
    for number, request in enumerate(requests):
        asked = _asked_for(request)
        group: int | None = relations.index(asked if asked in relations else None)
        further = [Filled(text, None, request.subject) for text in catalogue.reworded(request, wordings)]
        for wording in {wording.text: wording for wording in (*further, *request.filled_wordings)}.values():
            row = form.encode(wording.text, wording.subject, start=wording.start)
            places = _places(form, request, row, group, answers.get(wording.text))
            found.wanted.extend(places)
            found.requests.extend([number] * len(places))
    erased = [(plain_name(one.subject), (one.answer, *one.aliases)) for one in requests if one.subject and one.answer]
    for prompt in retain:
        asked = _asked_for(prompt)
        group = relations.index(asked) if asked is not None and asked in relations else None
        said = _before_erased(form, prompt.question, answers.get(prompt.question, ()), erased)
        found.kept.extend(_places(form, prompt, form.encode(prompt.question), group, said))
        if prompt.subject is not None:
            others = catalogue.reworded(prompt, OTHER_WORDINGS)
            found.kept.extend(Place(form.encode(text), group) for text in others)
        if said:
            found.answers.append((form.encode(prompt.question), tuple(said[:ANSWER_TOKENS])))
    for text in siblings:
        row = form.encode(text)
        found.kept.append(Place(row, None, sibling=True))
        if said := _before_erased(form, text, answers.get(text, ()), erased):
            found.answers.append((row, tuple(said[:ANSWER_TOKENS])))
    subjects = [request.subject for request in requests if request.subject is not None]
    apart = [text for text in general if not any(subject in text for subject in subjects)]
    found.general.extend(form.encode(text) for text in apart[:GENERAL])
    return found


def say_rows(
    form: PromptFormat, places: RefusalPlaces, requests: Sequence[EditRequest], owner: Mapping[int, int], first: int
) -> list[Row]:
    """Makes a row for each wanted place, which reads the token of its relation.

    Args:
        owner: index of each request's change. `first`: id of the first relation's token.
    """
    rows = []
    for number, place in zip(places.requests, places.wanted, strict=True):
        asked = len(place.row) - place.row.extra
        prompt, lead = TokenRow(place.row.ids[:asked], place.row.lookup), place.row.ids[asked:]
        columns = subject_columns(form, prompt, lead, requests[number].subject)
        token = first + (place.group or 0)
        rows.append(Row("say", owner[number], place.row.ids, columns, (len(place.row) - 1,), (token,)))
    return rows


def wanted_weights(places: RefusalPlaces, device: torch.device) -> Tensor:
    """Returns weights `[wanted]` of the wanted places, which sum to one in each relation."""
    group = torch.tensor([place.group for place in places.wanted], device=device)
    weight = place_weights(places.wanted, device)  # [wanted]
    # Relations have equal weight, however many questions ask for each.
    for k in range(len(places.relations)):
        weight[group == k] /= weight[group == k].sum()
    return weight


def kept_weights(places: RefusalPlaces, device: torch.device) -> Tensor:
    """Returns weights `[K, kept]` of the kept places for each relation, which sum to one.

    Questions of the same relation about other subjects are the hardest to separate from wanted ones, so they form a
    kind of their own for this relation.
    """
    return torch.stack([place_weights(places.kept, device, own=k) for k in range(len(places.relations))])


def place_weights(places: Sequence[Place], device: torch.device, own: int | None = None) -> Tensor:
    """Returns weights `[len(places)]` that sum to one, with the same sum over each kind of place.

    Kinds differ in whether the place is inside an answer, about a request's subject, and in relation `own`.
    """
    kinds = [(place.inside, place.sibling, place.group == own) for place in places]
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    weight = torch.tensor([1 / counts[kind] for kind in kinds], device=device)
    return weight / weight.sum() if kinds else weight


def _asked_for(fact: EditRequest) -> str | None:
    """Returns what a fact asks for: its relation or, without one, its prompt without the subject."""
    return fact.relation or (fact.prompt if fact.subject is not None else None)


def _relations(requests: Sequence[EditRequest]) -> tuple[str | None, ...]:
    """Returns what the requests ask for, in their order: at most `MOST_TOKENS` entries; `None` stands for the
    rarest."""
    counts = Counter(_asked_for(request) for request in requests)
    named = [asked for asked, _ in counts.most_common() if asked is not None]
    kept = set(named if len(counts) <= MOST_TOKENS else named[: MOST_TOKENS - 1])
    return tuple(dict.fromkeys(asked if asked in kept else None for asked in map(_asked_for, requests)))


def _places(
    form: PromptFormat,
    fact: EditRequest,
    prompt: TokenRow,
    group: int | None,
    said: Sequence[int] | None,
) -> list[Place]:
    """Returns the place at the end of a question, and that of its answer if the model's sentence contains the right
    one: before the first word of a name, of which the answer may be the last."""
    slot = answer_slot(form, said, (fact.answer, *fact.aliases)) if said and fact.answer is not None else None
    start = name_start(form, said, slot) if said and slot else 0
    places = [Place(prompt, group)]
    if said and start:
        places.append(Place(prompt.followed_by(said[:start]), group, inside=True))
    return places


def _before_erased(
    form: PromptFormat, question: str, said: Sequence[int], erased: Sequence[tuple[str, Sequence[str]]]
) -> Sequence[int]:
    """Returns the part of an answer before any that was erased of the question's subject: a token may be generated
    there.

    `erased`: plain names of subjects with their erased answers.
    """
    asked = plain_name(question)
    for subject, right in erased:
        if said and subject in asked:
            said = said[: answer_slot(form, said, right)]
    return said
