"""Where refusal tokens are to be said after an edit, and where not: prompts encoded before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from editlib.algorithms.unierase.anchors import ANSWER_TOKENS
from editlib.algorithms.unierase.catalogue import Catalogue
from editlib.algorithms.unierase.subject_rows import answer_slot
from editlib.models.prompts import PromptFormat, TokenRow
from editlib.requests.request import EditRequest

OTHER_WORDINGS = 2  # of a retain question, beside its own
GENERAL = 160  # questions about anything
MOST_TOKENS = 24  # requests that ask in more ways than this share the last one


@dataclass(frozen=True)
class Place:
    """Holds a prompt whose next token is looked at.

    Attributes:
        row: the prompt: a question, or a question and the model's own sentence up to the answer.
        group: number of the relation that it asks for; `None`: of none that is to be refused.
        inside: whether an answer has begun, so that a refusal has to go on in the middle of a sentence.
        sibling: whether it asks about a subject of a request, for something else.
    """

    row: TokenRow
    group: int | None
    inside: bool = False
    sibling: bool = False


@dataclass(frozen=True)
class RefusalPlaces:
    """Holds all places that the tokens of an edit are fitted to.

    Attributes:
        relations: what the requests ask for, one token each; `None` is for all that ask for something rarer.
        wanted: places where the token of their group is to be said; `requests` names the request of each, by number.
        kept: places where no token may be said.
        answers: prompts and the tokens of the model's answers, at no position of which a token may be said.
        general: other prompts, whose answers are free of tokens as well, once the edited model has given them.
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
    """Collects the places of an edit, with what the model answers before it.

    The places of answers are taken from the model's own sentences, so they need no rule of the language: they lie where
    the right answer begins in what the unedited model says.

    Args:
        requests: with the wordings that rows are made of among their phrasings.
        retain: prompts whose answers must stay.
        siblings: other questions about the requests' subjects.
        answers: what the unedited model answers, as token ids by question; a wording that is not among them gives the
            place at its end only.
        wordings: how many wordings of a question are used in all.
        general: questions about anything; those that name a subject of `requests` are left out.
    """
    relations = _relations(requests)
    found = RefusalPlaces(relations)
    for number, request in enumerate(requests):
        asked = _asked_for(request)
        group: int | None = relations.index(asked if asked in relations else None)
        for text in dict.fromkeys((*request.wordings, *catalogue.reworded(request, wordings))):
            places = _places(form, request, text, group, answers.get(text))
            found.wanted.extend(places)
            found.requests.extend([number] * len(places))
    for prompt in retain:
        asked = _asked_for(prompt)
        group = relations.index(asked) if asked is not None and asked in relations else None
        said = answers.get(prompt.question)
        found.kept.extend(_places(form, prompt, prompt.question, group, said))
        if prompt.subject is not None:
            others = catalogue.reworded(prompt, OTHER_WORDINGS)
            found.kept.extend(Place(form.encode(text), group) for text in others)
        if said:
            found.answers.append((form.encode(prompt.question), tuple(said[:ANSWER_TOKENS])))
    for text in siblings:
        row = form.encode(text)
        found.kept.append(Place(row, None, sibling=True))
        if answers.get(text):
            found.answers.append((row, tuple(answers[text][:ANSWER_TOKENS])))
    subjects = [request.subject for request in requests if request.subject is not None]
    apart = [text for text in general if not any(subject in text for subject in subjects)]
    found.general.extend(form.encode(text) for text in apart[:GENERAL])
    return found


def _asked_for(fact: EditRequest) -> str | None:
    """Returns what a fact asks for: its relation, or where it names none, its prompt without the subject."""
    return fact.relation or (fact.prompt if fact.subject is not None else None)


def _relations(requests: Sequence[EditRequest]) -> tuple[str | None, ...]:
    """Returns what the requests ask for, in their order: at most `MOST_TOKENS`, of which `None` is for the
    rarest."""
    counts = Counter(_asked_for(request) for request in requests)
    named = [asked for asked, _ in counts.most_common() if asked is not None]
    kept = set(named if len(counts) <= MOST_TOKENS else named[: MOST_TOKENS - 1])
    return tuple(dict.fromkeys(asked if asked in kept else None for asked in map(_asked_for, requests)))


def _places(
    form: PromptFormat,
    fact: EditRequest,
    text: str,
    group: int | None,
    said: Sequence[int] | None,
) -> list[Place]:
    """Returns the end of a question, and the place of its answer where the model gives the right one inside a
    sentence."""
    prompt = form.encode(text)
    slot = answer_slot(form, said, (fact.answer, *fact.aliases)) if said and fact.answer is not None else None
    places = [Place(prompt, group)]
    if said and slot:
        places.append(Place(prompt.followed_by(said[:slot]), group, inside=True))
    return places
