"""Judge whether an answer is a refusal, in the languages of `data/languages.jsonl`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from editlib.answers.scripts import is_unspaced, main_script, plain_marks

TELLING = 4  # with this many words, one should be a common word of a known language
APOLOGY = (4, 30, 12)  # most words and characters of a mere apology; characters in scripts without spaces
LEAST = 3  # words of the shortest sentence in languages that need a subject


@dataclass(frozen=True)
class Language:
    """Describes how one language says "I don't know". `scripts` are those of `main_script`; `words` are common words
    that identify the language, empty if the script alone does; `least` is the number of words of the shortest such
    sentence ("Bilmiyorum.", "No sé.")."""

    name: str
    scripts: frozenset[str]
    admission: re.Pattern[str]
    person: re.Pattern[str] | None
    words: frozenset[str]
    apology: re.Pattern[str]
    least: int = LEAST

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Language:
        """Reads one line of the data file."""
        person = row.get("person")
        return cls(
            row["language"],
            frozenset(row["scripts"]),
            re.compile("|".join(row["admissions"]), re.IGNORECASE),
            re.compile(person, re.IGNORECASE) if person else None,
            frozenset(row.get("words", ())),
            re.compile(row["apology"], re.IGNORECASE),
            row.get("least", LEAST),
        )

    def admits(self, sentence: str) -> bool:
        """Returns whether a sentence says that the speaker does not know."""
        return bool(self.admission.search(sentence) and (self.person is None or self.person.search(sentence)))


def _bundled() -> tuple[Language, ...]:
    text = (resources.files("editlib") / "data" / "languages.jsonl").read_text(encoding="utf-8")
    return tuple(Language.of(json.loads(line)) for line in text.splitlines() if line.strip())


LANGUAGES = _bundled()
"""Languages whose refusals are recognised."""


def refusal_verdict(text: str, languages: Sequence[Language] = LANGUAGES) -> bool | None:
    """Returns whether `text` opens with "I don't know" in some language: in the first sentence, or in the one after a
    sentence of apology ("I'm sorry. I don't know.").

    `None` if that cannot be judged: the text is in a script of none of `languages`, or has `TELLING` words of two
    letters or more, and none of its words is a common word of a language.
    """
    first = _opening(plain_marks(text), languages)
    if any(language.admits(first) for language in languages):
        return True
    script = main_script(text)
    fitting = [language for language in languages if script in language.scripts]
    if script is None or any(not language.words for language in fitting):
        return False
    words = re.findall(r"\w+", plain_marks(text).lower())
    telling = re.findall(r"[^\W\d_]{2,}", plain_marks(text))  # "10 x 10 = 100." is in no particular language
    if fitting and (len(telling) < TELLING or any(not language.words.isdisjoint(words) for language in fitting)):
        return False
    return None


def is_refusal(text: str) -> bool:
    """Returns whether `text` is recognised as a refusal; `refusal_verdict` tells if that cannot be judged."""
    return bool(refusal_verdict(text))


def least_words(text: str) -> int:
    """Returns the least words of a sentence in the language in which `text` says "I don't know"."""
    first = _opening(plain_marks(text), LANGUAGES)
    return min((language.least for language in LANGUAGES if language.admits(first)), default=LEAST)


def _opening(text: str, languages: Sequence[Language]) -> str:
    """Returns the first sentence that is not a mere apology."""
    first = first_sentence(text)
    rest = text.strip()[len(first) :]
    words, most, unspaced = APOLOGY
    short = len(first.split()) <= words and len(first) <= (unspaced if is_unspaced(first) else most)
    alone = short and not re.search("[,\uff0c\u3001\u060c]", first)  # "Sorry, Paris." is an answer
    if rest.strip() and alone and any(language.apology.search(first) for language in languages):
        return first if any(language.admits(first) for language in languages) else first_sentence(rest)
    return first


def first_sentence(text: str) -> str:
    """Returns the text up to its first mark that ends a sentence; Chinese and Japanese have no space after it."""
    return re.split(r"(?<=[.!?\u061f\u0964])\s|(?<=[\u3002\uff01\uff1f])", text.strip(), maxsplit=1)[0]
