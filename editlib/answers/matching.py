"""Find an answer in a text, in any script."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from editlib.answers.scripts import JOINED, folded, script_of

_NUMERIC = re.compile(r"[\d.,]*\d")
_NUMBER = re.compile(r"(?<![\d.,])(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?:\.\d{3})+(?:,\d+)?|\d+[.,]\d+)(?![.,]?\d)")
"""A number with marks inside; "12.5.1990" is a date and not a number."""
_PREFIXES = {
    "ARABIC": re.compile(r"(?<!\w)[وف]?(?:[بك]?(?:ال)?|لل?|س)\Z"),
    "HEBREW": re.compile(r"(?<!\w)[ושהכלבמ]{1,3}\Z"),
}
"""Prefixes that are written together with a word: conjunctions, prepositions and the article."""
LEAST_STEM = 3  # letters that an inflected word keeps
CHANGED = 2  # letters at its end that may change


def has_answer(text: str, answers: Sequence[str], *, endings: int = 0) -> bool:
    """Returns whether one of `answers` occurs in `text` as words of its own.

    Composed and decomposed accents are the same, and so are curly and straight apostrophes, full-width and other forms
    of a letter or digit, blanks and line ends, Arabic and Hebrew with and without vowel points (`folded`). In scripts
    without spaces (Chinese, Japanese, Thai, ...) and in Korean, whose particles are joined to the word, an answer may
    occur anywhere. Arabic and Hebrew join small words and the article to a word ("بالقاهرة", "בירושלים"). Case counts
    only for answers of one or two letters (the symbol "He" is not the word "he"). A part of a number ("3" of "3.14",
    "400" of "1,400") is not an answer.

    Args:
        endings: how many letters an inflected ending may have (Russian "Москва" in "в Москве", Finnish "Pariisi" in
            "Pariisissa"). In every word of four letters or more, up to two vowels at its end may then be replaced, and
            as many further letters may follow. 0: no ending.
    """
    searched = folded(text)
    for answer in map(folded, answers):
        answer = answer.strip() or answer
        flags = 0 if len(answer) <= 2 else re.IGNORECASE
        pattern = _inflected(answer, endings) if endings > 0 else _escaped(answer)
        pattern = re.sub("^ال", r"(?:ال|(?<=\\bل)ل)", pattern)  # "to" before the article: للقاهرة
        matches = re.finditer(f"(?=({pattern}))", searched, flags)  # looks ahead, so that matches may overlap
        numbers = [number.span() for number in _NUMBER.finditer(searched)] if _NUMERIC.fullmatch(answer) else []
        if any(_is_apart(searched, *match.span(1)) and not _is_part(match.span(1), numbers) for match in matches):
            return True
    return False


def _escaped(text: str) -> str:
    """Returns a pattern for a text in which all kinds of blanks and line ends are equivalent."""
    return "".join(r"\s+" if part.isspace() else re.escape(part) for part in re.split(r"(\s+)", text))


def _inflected(answer: str, endings: int) -> str:
    return "".join(_any_ending(part, endings) for part in re.split(r"(\w+)", answer))


def _any_ending(word: str, endings: int) -> str:
    """Returns a pattern for one word with other endings."""
    letters = len(word)
    if letters <= LEAST_STEM or not word.isalpha() or script_of(word[-1]) in JOINED:
        return _escaped(word)
    stem = letters
    while stem > max(LEAST_STEM, letters - CHANGED) and _is_vowel(word[stem - 1]):
        stem -= 1
    return rf"{re.escape(word[:stem])}\w{{{letters - stem},{endings + letters - stem}}}(?!\w)"


def _is_vowel(letter: str) -> bool:
    bare = unicodedata.normalize("NFD", letter.lower())[0]
    return bare in "aeiouyаеиоуыэюяіїєйьαεηιουω"


def _is_apart(text: str, start: int, end: int) -> bool:
    """Returns whether `text[start:end]` begins and ends at word boundaries, without separating a letter from its
    marks."""
    if start >= end:
        return False
    if end < len(text) and _is_mark(text[end]):
        return False
    before, after = start - 1, end
    while before >= 0 and text[before] == "_":  # emphasis, unless a word continues after it
        before -= 1
    while after < len(text) and text[after] == "_":
        after += 1
    if script_of(text[start]) in _PREFIXES and end - start > LEAST_STEM:
        before = _without_prefix(text, start) - 1
    first, last = text[start], text[start:end].rstrip("".join(filter(_is_mark, text[start:end])))[-1:]
    return not (_continues(text[max(before, 0) : before + 1], first) or _continues(text[after : after + 1], last))


def _without_prefix(text: str, start: int) -> int:
    """Returns the start of the small words that are joined to the word at `start`; `start` itself if there are none."""
    prefix = _PREFIXES[script_of(text[start])].search(text, 0, start)
    return start if prefix is None else prefix.start()


def _is_part(span: tuple[int, int], numbers: Sequence[tuple[int, int]]) -> bool:
    """Returns whether a span is a part of one of `numbers`."""
    start, end = span
    return any(first <= start and end <= last and (start, end) != (first, last) for first, last in numbers)


def _continues(neighbour: str, edge: str) -> bool:
    """Returns whether a word continues from the answer's character `edge` to the `neighbour` beside it."""
    if not neighbour or not (neighbour.isalnum() or _is_mark(neighbour)):
        return False
    return script_of(neighbour) not in JOINED and (not edge or script_of(edge) not in JOINED)


def _is_mark(character: str) -> bool:
    """Returns whether a character is a vowel sign or an accent on the letter before it."""
    return unicodedata.category(character).startswith("M")
