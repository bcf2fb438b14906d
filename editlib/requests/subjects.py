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

RULES = {
    "given": "the file or the user says it",
    "name": "a name that leads several of the questions nearby (an author's in TOFU) is in this one",
    "part of the name": "a part, or another spelling, of the name that the questions nearby are about",
    "title": "no name, but the title of a work in quotation marks; of several the one that the answer repeats",
    "description": "no name and no title, but words that pick out one person: the author born in ..., known for ...",
    "shared name": "no name leads the questions nearby: the longest name in both question and answer",
    "only name": "a guess, by `editlib unlearn` alone: no name leads nearby, and the prompt holds one name or title",
}

GUESS = "only name"

NEARBY = 20  # TOFU asks twenty questions an author, one after the other
LEADS = 3  # questions that a name must lead to be what they are about
ALIKE = 0.8  # of two spellings of one name

OPENERS = frozenset(
    re.findall(
        r"\w+",
        """a also an and any apart are as aside at author based besides but by can could describe did do does finally
        for from had has have here how i in is lastly list many may mention much name of on or other outside over please
        provide regarding share should some summarize tell that the these this those through to under was were what when
        where which who whom whose why will with would writer you""",
    )
)
"""Words before a name that have a capital only because the sentence begins there."""

ORDERS = frozenset(
    re.findall(
        r"\w+",
        """answer ask choose complete consider continue define explain fill find finish give guess he her his identify
        if imagine it its let list me my no not one our please question quote recall repeat say select she show since
        some spell state suppose tell their then there they think three translate true two use we write yes your""",
    )
)
"""Further words that begin a prompt and name nothing. `OPENERS` is left as TOFU was measured with it."""

PARTICLES = frozenset(
    re.findall(r"\w+", "al ben bin binti da das de del della den der di dos du el ibn la le ter van von zu")
)
PEOPLE = "author|biographer|essayist|figure|journalist|novelist|person|playwright|poet|storyteller|writer"
FOLLOWED = "born|from|hailing|known|named|of|originating|recognized|renowned|that|who|whose|with|writing"

_WORD = re.compile(r"\w[\w+-]*(?:['’](?=\w\w)[\w-]+)*")
_TITLES = (re.compile(r"[\"“”]([^\"“”]+)[\"“”]"), re.compile(r"(?<!\w)['‘](\S.*?)['’](?!\w)"))
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
        self.titles = [title for pattern in _TITLES for title in pattern.findall(question)]
        bare = question
        for title in self.titles:
            bare = bare.replace(title, ";" * len(title))
        self.names = list(dict.fromkeys(_names(bare)))

    def once(self, text: str) -> bool:
        """Returns whether `text` can be looked up: it is in the question exactly once."""
        return len(_places(self.question, text)) == 1


def candidates(question: str) -> list[str]:
    """Lists the names and titles that a question asked alone may be about, in their order."""
    one = _Asked(question, "")
    names = [name for name in one.names if name.lower() not in ORDERS]
    # A word whose capital may be that of the sentence counts only where there is nothing else.
    plain = [name for name in names if " " in name or not question.lstrip().startswith(name)]
    return list(dict.fromkeys([title.strip().rstrip("?.!,").strip() for title in one.titles] + (plain or names)))


def _subject(asked: Sequence[_Asked], leaders: Sequence[str | None], i: int, *, guess: bool) -> Subject | None:
    one = asked[i]
    near = Counter(name for name in _nearby(leaders, i) if name is not None)
    # Answers mention a person too; they do not mention "American", however many questions it leads.
    words = {word for other in _nearby(asked, i) for word in _WORD.findall(other.answer)}
    persons = [name for name, n in near.most_common() if n >= LEADS and _WORD.findall(name)[-1] in words]
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
    if parts := [name for name in persons if any(_is_part(own, name) for own in (*one.names, *_names(one.answer)))]:
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
        if any(word[0].isupper() or word[0].isdigit() for word in _WORD.findall(found)):
            yield Subject(found.strip().rstrip(".,").strip(), "description", about)


def _lone(one: _Asked) -> Iterator[Subject]:
    for name in sorted((name for name in one.names if _places(one.answer, name)), key=len, reverse=True):
        yield Subject(name, "shared name")


def _only(one: _Asked) -> Iterator[Subject]:
    if len(found := candidates(one.question)) == 1:
        yield Subject(found[0], GUESS)


def _names(text: str) -> Iterator[str]:
    """Runs of capitalised words, with particles between them, without the words that only open a sentence."""
    words = list(_WORD.finditer(text))
    start = 0
    while start < len(words):
        end, last = start, start  # the run ends after the last capital
        while end < len(words) and (end == start or _joined(text, words[end - 1], words[end])):
            if words[end][0][0].isupper():
                last = end + 1
            elif words[end][0] not in PARTICLES or end == start:
                break
            end += 1
        first = start
        while first < last and words[first][0].lower() in OPENERS:
            first += 1
        if first < last:
            yield text[words[first].start() : words[last - 1].end()]
        start = max(last, start + 1)


def _joined(text: str, one: re.Match[str], other: re.Match[str]) -> bool:
    between = text[one.end() : other.start()]
    return between in (" ", " (", ") ") or (between == ". " and len(one[0]) <= 2)  # a nickname; initials


def _is_part(name: str, whole: str) -> bool:
    """Returns whether `name` is another run with a word of three letters or more of `whole`, and is no longer."""
    words, more = set(_WORD.findall(name)), set(_WORD.findall(whole))
    return name != whole and len(words) <= len(more) and any(len(word) > 2 for word in words & more)


def _is_alike(name: str, whole: str) -> bool:
    return SequenceMatcher(None, name, whole, autojunk=False).ratio() >= ALIKE


def _places(text: str, name: str) -> list[int]:
    return [found.start() for found in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text)]
