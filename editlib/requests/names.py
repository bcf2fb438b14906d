"""Guess the subject of a prompt that is asked alone: the one name or title in it, and none where there is a choice.

A guess depends on capitals alone, so the words between two names decide whether they are one: "of" makes one name
("Bank of England") unless the word before it is a relation ("President of France") or a rank ("King of Spain", where
either may be meant). "and" can join two names or be part of one, and makes none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

WORD = re.compile(r"\w[\w+-]*(?:['’](?=\w\w)[\w-]+)*")
_TITLES = (re.compile(r"[\"“”]([^\"“”]+)[\"“”]"), re.compile(r"(?<!\w)['‘](\S.*?)['’](?!\w)"))

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

PARTICLES = frozenset(
    re.findall(r"\w+", "al ben bin binti da das de del della den der di dos du el ibn la le ter van von zu")
)

ORDERS = frozenset(
    re.findall(
        r"\w+",
        """according after although answer ask because before being between both choose complete consider continue
        currently define during each every explain fill find finish following give given guess he her his i identify if
        imagine it its let list me my no not now once one our people please question quote recall repeat say select
        she show since so some spell state suppose tell their then there they think three today translate true two
        until use we while within without write yes yesterday your
        aan che chi combien comment como cosa cual cuál cuándo cuando cuántos cómo de dans das der die donde dove dónde
        el en est hoe il in la le les où où par pourquoi qual quale quali quand quando que quel quelle quelles quels
        quem qui quién quoi qué sur un una une waar waarom wanneer warum was wat welche welchem welchen welcher welches
        welk welke wem wen wer wessen wie wo woher""",
    )
)
"""Further words that begin a prompt and name nothing. `OPENERS` is left as TOFU was measured with it."""

RELATIONS = frozenset(
    re.findall(
        r"\w+",
        """abbreviation anthem architect area author birthplace capital ceo cfo chairman chairwoman chancellor citizen
        coach code composer continent country cto currency definition demonym density developer director discoverer
        editor elevation employer end father flag founder gdp genre governor head headquarters height inhabitants
        inventor language leader length location manager maker mayor meaning members minister mother motto
        nationality origin owner painter pm population president producer publisher religion spouse start symbol
        temperature translation value wife winner writer year""",
    )
)
"""Words before "of" that ask about the name after it; with a capital they look like names."""

RANKS = frozenset(
    re.findall(
        r"\w+",
        """archbishop baron bishop caliph commander count countess czar duchess duke earl emperor empress general king
        marquess minister pope prince princess queen secretary shah sultan tsar viceroy""",
    )
)
"""Words before "of" of which the whole may be the name of a person, a rank, or a relation to a country."""

INNER = frozenset({" of ", " of the ", " the ", " & ", " y ", " am ", " im ", " an der ", " sur ", " upon ", " de la "})
"""Texts between the parts of one name, in addition to `PARTICLES`."""
_BEFORE = re.compile(r"\b(?:(?:[Tt]he|[Aa]n?) (\d[\w-]*)|(\d+):(?: (?:The|An?))?) $")
_AFTER = re.compile(r" \d+(?![\w.,]\w)")
_AND = re.compile(r" and (?:the |a )?")
_SINGULAR = re.compile(r" (?:is|was|has|takes|tells|begins|ends)\b")
_ASKS = re.compile(r"\s*(?:am|are|did|do|does|is|was|were)\b", re.IGNORECASE)
_GERMAN = re.compile(r"\b(?:ist|wurde|heißt|heisst|liegt|dem|eine[mnrs]?|[Ww]elche[mnrs]?|[Ww]er|[Ww]ann|[Ww]o)\b")
"""Words by which German is known, where every noun has a capital."""


@dataclass(frozen=True)
class _Name:
    start: int
    end: int
    text: str


def titles_in(text: str) -> list[str]:
    """Finds the titles of works in quotation marks."""
    return [title for pattern in _TITLES for title in pattern.findall(text)]


def names_in(text: str) -> list[str]:
    """Finds the runs of capitalised words, with particles between them, in their order."""
    return list(dict.fromkeys(text[start:end] for start, end in _runs(text)))


def whole_names(question: str) -> list[str]:
    """Finds the names outside of titles, joined where they are parts of one, in their order."""
    return list(dict.fromkeys(name.text for name in _names(question)))


def candidates(question: str) -> list[str]:
    """Lists the names and titles that a question asked alone may be about, in their order."""
    titles = [title.strip().rstrip("?.!,").strip() for title in titles_in(question)]
    return list(dict.fromkeys([*filter(None, titles), *whole_names(question)]))


def only_name(question: str) -> str | None:
    """Returns the one name or title in a question; `None` where there is none or a choice, or capitals tell nothing."""
    found = candidates(question)
    if len(found) != 1 or (_GERMAN.search(question) and found[0] not in titles_in(question)):
        return None
    return found[0]


def _names(question: str) -> list[_Name]:
    """Finds the names outside of titles, joined where they are parts of one."""
    bare = question
    for title in titles_in(question):
        bare = bare.replace(title, ";" * len(title))
    found: list[_Name] = []
    for name in _single(bare):
        between = bare[found[-1].end : name.start] if found else ""
        kind = _last_word(found[-1]) if found else ""
        if between in (" of ", " of the ") and kind in RELATIONS:
            found[-1] = name
        elif between in INNER and not (between.startswith(" of ") and kind in RANKS):
            # "Is Rome the Eternal City?" asks about one of two names, "Who was Ivan the Terrible?" about one.
            apart = between == " the " and _ASKS.match(bare)
            found = [*found, name] if apart else [*found[:-1], _joined(bare, found[-1], name)]
        else:
            found.append(name)
    return _joined_by_and(bare, found)


def _joined_by_and(text: str, names: list[_Name]) -> list[_Name]:
    """Joins the names around "and" where they begin the text and its verb is singular: "Romeo and Juliet was written
    by"."""
    if len(names) != 2 or text[: names[0].start].strip().lower() not in ("", "the", "a"):
        return names
    one = _AND.fullmatch(text[names[0].end : names[1].start])
    return [_joined(text, *names)] if one and _SINGULAR.match(text, names[1].end) else names


def _joined(text: str, one: _Name, other: _Name) -> _Name:
    return _Name(one.start, other.end, text[one.start : other.end])


def _single(text: str) -> Iterator[_Name]:
    """Yields runs of capitalised words without the words that only begin a prompt, with the number that belongs to
    them: "Apollo 11", "the 1998 World Cup", "2001: A Space Odyssey"."""
    for start, end in _runs(text):
        words = [word for word in WORD.finditer(text) if start <= word.start() < end]
        while words and words[0][0].lower() in ORDERS | OPENERS:
            words.pop(0)
        if not words:
            continue
        first = words[0].start()
        if number := _BEFORE.search(text[:first]):
            first = number.start(number.lastindex or 0)
        if number := _AFTER.match(text[end:]):
            end += number.end()
        yield _Name(first, end, text[first:end])


def _last_word(name: _Name) -> str:
    return WORD.findall(name.text)[-1].lower()


def _runs(text: str) -> Iterator[tuple[int, int]]:
    """Yields where runs of capitalised words begin and end, without the words that only open a sentence."""
    words = list(WORD.finditer(text))
    start = 0
    while start < len(words):
        end, last = start, start  # the run ends after the last capital
        while end < len(words) and (end == start or _adjacent(text, words[end - 1], words[end])):
            if words[end][0][0].isupper():
                last = end + 1
            elif words[end][0] not in PARTICLES or end == start:
                break
            end += 1
        first = start
        while first < last and words[first][0].lower() in OPENERS:
            first += 1
        if first < last:
            yield words[first].start(), words[last - 1].end()
        start = max(last, start + 1)


def _adjacent(text: str, one: re.Match[str], other: re.Match[str]) -> bool:
    between = text[one.end() : other.start()]
    return between in (" ", " (", ") ") or (between == ". " and len(one[0]) <= 2)  # a nickname; initials
