"""Find the subject that a question asks about, in sets of questions and answers that do not name it (TOFU).

Every choice has a rule (`RULES`), and where no rule fits there is no subject. Only `only name` guesses, and only where
it is asked for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from editlib.requests.names import WORD, names_in, only_name, titles_in, whole_names

RULES = {
    "given": "the file or the user says it",
    "name": "a name that leads several of the questions nearby (an author's in TOFU) is in this one",
    "part of the name": "a part, or another spelling, of the name that the questions nearby are about",
    "title": "no name, but the title of a work in quotation marks; of several the one that the answer repeats",
    "description": "no name and no title, but words that pick out one person: the author born in ..., known for ...",
    "shared name": "no name leads the questions nearby: the longest name in both question and answer",
    "only name": "a guess, where subjects are needed: no name leads nearby, and the prompt holds one name or title",
}

GUESS = "only name"

NEARBY = 20  # TOFU asks twenty questions an author, one after the other
LEADS = 3  # questions that a name must lead to be what they are about
ALIKE = 0.8  # of two spellings of one name

PEOPLE = "author|biographer|essayist|figure|journalist|novelist|person|playwright|poet|storyteller|writer"
FOLLOWED = "born|from|hailing|known|named|of|originating|recognized|renowned|that|who|whose|with|writing"

_DESCRIPTION = re.compile(
    rf"\b(?:the|this|an?|that|our) ((?:(?!(?:the|this|an?|that|our|of)\b)[\w+'’-]+,? ){{0,6}}(?:{PEOPLE}),? "
    rf"(?:{FOLLOWED})\b[^?!]*)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Subject:
    """Names the words of a question that say whose fact it asks for, and the rule (of `RULES`) that found them.

    `about` is the name that this question and others nearby are about, where that is known; it need not be in the
    question.
    """

    text: str
    rule: str
    about: str | None = None


def find_subjects(questions: Sequence[str], answers: Sequence[str], *, guess: bool = False) -> list[Subject | None]:
    """Finds the subject of each question, or `None` where no rule finds one; a subject is in its question exactly once.

    Questions about one person are expected to lie together, as in TOFU; where they do not, fewer names are found to
    lead, and the rules that look at one question alone decide.

    Args:
        answers: one for each question; an empty one where there is none.
        guess: try the rule `only name`, too, where no other fits.
    """
    asked = [_Asked(question, answer) for question, answer in zip(questions, answers, strict=True)]
    leaders = _leaders(asked)
    return [_subject(asked, leaders, i, guess=guess) for i in range(len(asked))]


class _Asked:
    """Holds a question with its answer, the titles in it and the names outside of them, in their order."""

    def __init__(self, question: str, answer: str) -> None:
        self.question, self.answer = question, answer
        self.titles = titles_in(question)
        bare = question
        for title in self.titles:
            bare = bare.replace(title, ";" * len(title))
        self.names = names_in(bare)

    def once(self, text: str) -> bool:
        """Returns whether `text` can be looked up: it is in the question exactly once."""
        return len(_places(self.question, text)) == 1


def _subject(asked: Sequence[_Asked], leaders: Sequence[str | None], i: int, *, guess: bool) -> Subject | None:
    one = asked[i]
    near = Counter(name for name in _nearby(leaders, i) if name is not None)
    # Answers mention a person too; they do not mention "American", however many questions it leads.
    words = {word for other in _nearby(asked, i) for word in WORD.findall(other.answer)}
    persons = [name for name, n in near.most_common() if n >= LEADS and WORD.findall(name)[-1] in words]
    whole = [name for name in persons if not any(_is_part(name, other) for other in persons)]
    about = _about(one, whole, leaders, i)
    # Where names lead the questions nearby, this one is about one of those: no other name in it will do.
    alone = () if persons else (*_lone(one), *(_only(one) if guess else ()))
    for found in (*_named(one, about), *_by_title(one, about), *_described(one, about), *alone):
        if one.once(found.text):
            return found
    return None


def _leaders(asked: Sequence[_Asked]) -> list[str | None]:
    """Finds for each question the name that most of the questions nearby hold; `None` if it holds none."""
    found: list[str | None] = []
    for i, one in enumerate(asked):
        counts = Counter(name for other in _nearby(asked, i) for name in other.names)
        found.append(max(one.names, key=lambda name: (counts[name], name.count(" "), len(name)), default=None))
    return found


def _nearby(rows: Sequence, i: int) -> Sequence:
    return rows[max(0, i - NEARBY + 1) : i + NEARBY]


def _about(one: _Asked, persons: Sequence[str], leaders: Sequence[str | None], i: int) -> str | None:
    """Finds which of the `persons` nearby the question is about: its own text tells, or its answer, or both
    neighbours."""
    for text in (one.question, one.answer):
        if named := [name for name in persons if _places(text, name)]:
            return named[0]
    if parts := [name for name in persons if any(_is_part(own, name) for own in (*one.names, *names_in(one.answer)))]:
        return parts[0]
    around = [next((name for name in side if name in persons), None) for side in (leaders[:i][::-1], leaders[i + 1 :])]
    return around[0] if around[0] == around[1] else None


def _named(one: _Asked, about: str | None) -> Iterator[Subject]:
    if about is None:
        return
    yield Subject(about, "name", about)
    for name in one.names:
        if _is_part(name, about) or _is_alike(name, about):
            yield Subject(name, "part of the name", about)


def _by_title(one: _Asked, about: str | None) -> Iterator[Subject]:
    titles = [(title.strip().rstrip("?.!,").strip(), title in one.answer) for title in one.titles]
    titles.sort(key=lambda pair: (not pair[1], -len(pair[0])))
    yield from (Subject(title, "title", about) for title, _ in titles if title)


def _described(one: _Asked, about: str | None) -> Iterator[Subject]:
    for found in _DESCRIPTION.findall(one.question):
        if any(word[0].isupper() or word[0].isdigit() for word in WORD.findall(found)):
            yield Subject(found.strip().rstrip(".,").strip(), "description", about)


def _lone(one: _Asked) -> Iterator[Subject]:
    shared = [name for name in whole_names(one.question) if _places(one.answer, name)]
    if any(f"{name} and {other}" in one.question for name in shared for other in shared):
        return  # two names, or the halves of one ("Romeo and Juliet")
    for name in sorted(shared, key=len, reverse=True):
        yield Subject(name, "shared name")


def _only(one: _Asked) -> Iterator[Subject]:
    if (name := only_name(one.question)) is not None:
        yield Subject(name, GUESS)


def _is_part(name: str, whole: str) -> bool:
    """Returns whether `name` is another run with a word of three letters or more of `whole`, and is no longer."""
    words, more = set(WORD.findall(name)), set(WORD.findall(whole))
    return name != whole and len(words) <= len(more) and any(len(word) > 2 for word in words & more)


def _is_alike(name: str, whole: str) -> bool:
    return SequenceMatcher(None, name, whole, autojunk=False).ratio() >= ALIKE


def _places(text: str, name: str) -> list[int]:
    return [found.start() for found in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text)]
