"""Judge whether a text reads as a sentence."""

from __future__ import annotations

import re

from editlib.answers.refusals import least_words
from editlib.answers.scripts import is_unspaced, main_script, plain_marks

ENDS = ".!?\u3002\uff01\uff1f\uff0e\u0964\u0965\u061f\u06d4\u0589\u1362"
"""Marks that end a sentence: Latin, Chinese and Japanese, Devanagari, Arabic, Urdu, Armenian, Ethiopic."""

WITHOUT_ENDS = ("THAI", "LAO")
"""Scripts that have no mark at a sentence's end."""


def is_fluent(text: str) -> bool:
    """Returns whether `text` reads as a sentence: three words or more, an end mark closing at least the first sentence,
    no word or group of up to four words twice in a row, no glued repeat ("I'mI'm").

    In scripts without spaces, characters are counted instead, and only groups of three or more must not repeat. Fewer
    words suffice for a refusal in languages that need no more ("Bilmiyorum.", "Не знаю."), and in Korean.
    """
    text = plain_marks(text)
    if is_unspaced(text):
        return _is_fluent_unspaced(text)
    words = re.findall(r"[\w'-]+", text.lower())
    least = min(least_words(text), 2 if main_script(text) == "HANGUL" else 3)
    if len(words) < least or not re.search(rf"[{ENDS}](?:\s|$)", text.strip()):
        return False
    if _repeats(words, 1, 4):
        return False
    return not any(re.fullmatch(r"(.{2,})\1+", word) for word in words)


def _is_fluent_unspaced(text: str) -> bool:
    characters = [character for character in text if not character.isspace()]
    ended = re.search(f"[{ENDS}]", text) or main_script(text) in WITHOUT_ENDS
    return len(characters) >= 3 and bool(ended) and not _repeats(characters, 3, 12)


def _repeats(parts: list[str], least: int, most: int) -> bool:
    """Returns whether a group of `least` to `most` parts comes twice in a row."""
    for size in range(least, most + 1):
        for i in range(len(parts) - 2 * size + 1):
            if parts[i : i + size] == parts[i + size : i + 2 * size]:
                return True
    return False
