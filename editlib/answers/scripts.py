"""Find the script of a text, and whether that script separates words by spaces."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cache
from importlib import resources

UNSPACED = frozenset(
    {"CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "YI"}
    | {"JAVANESE", "BALINESE", "TAI"}
)
"""Scripts that write words without spaces between them."""

JOINED = UNSPACED | {"HANGUL"}
"""Scripts in which a word may continue after the answer: Korean has spaces, but joins particles to a word."""

POINTED = frozenset({"ARABIC", "HEBREW"})
"""Scripts whose vowel points most texts leave out."""

_ALIKE = {"IDEOGRAPHIC": "CJK", "HALFWIDTH": "KATAKANA", "FULLWIDTH": "LATIN"}


def script_of(character: str) -> str:
    """Returns the script of one character as Unicode names it ("LATIN", "CJK", "HANGUL", ...); "" for one without a
    name.

    Full-width Latin letters are Latin; the Japanese mark for a long vowel is Katakana.
    """
    first = unicodedata.name(character, "").partition(" ")[0].partition("-")[0]
    return _ALIKE.get(first, first)


def main_script(text: str) -> str | None:
    """Returns the script of most letters in `text`; `None` if it has no letters.

    Kana and Chinese characters count together as "CJK" if there is no kana among them, as "JAPANESE" otherwise.
    """
    counts = Counter(script_of(character) for character in text if character.isalpha())
    kana = counts.pop("HIRAGANA", 0) + counts.pop("KATAKANA", 0)
    if kana:
        counts["JAPANESE"] = kana + counts.pop("CJK", 0)
    return max(counts, key=lambda script: counts[script]) if counts else None


def is_unspaced(text: str) -> bool:
    """Returns whether most letters of `text` are of a script without spaces between words."""
    return main_script(text) in UNSPACED | {"JAPANESE"}


def plain_marks(text: str) -> str:
    """Returns `text` with composed accents (NFC), straight quotation marks and apostrophes, and without characters that
    only format (zero-width ones, soft hyphens, variation selectors)."""
    if text.isascii():
        return text
    composed = unicodedata.normalize("NFC", text).translate(_STRAIGHT)
    kept = (c for c in composed if unicodedata.category(c) != "Cf" and not "\ufe00" <= c <= "\ufe0f")
    return "".join(kept)


def folded(text: str) -> str:
    """Returns `text` with `plain_marks`, one form of each letter (full- and half-width, ligatures, subscripts, ß, the
    Thai am; simplified for traditional Chinese), plain hyphens and middle dots, ASCII digits, and without Arabic and
    Hebrew vowel points, which most texts leave out.

    Spellings that differ between keyboards or habits become equal, too: Arabic alef, ya, kaf and ta marbuta (like
    Lucene's analysers), Hindi nasals and dots below, the place of a Vietnamese tone (hòa, hoà).
    """
    if text.isascii():
        return text
    plain = _AM.sub(r"\2\1", unicodedata.normalize("NFC", "".join(map(_folded, plain_marks(text)))))
    return _TONE.sub(_tone_behind, _NASAL.sub("\u0902", plain.replace("\u093c", "")))


def _tone_behind(pair: re.Match[str]) -> str:
    """Returns two vowels with the first one's tone moved to the second, as in "hoà" for "hòa"."""
    first, second = unicodedata.normalize("NFD", pair[0][0]), pair[0][1]
    return unicodedata.normalize("NFC", first[0] + second + first[1:])


@cache
def _folded(character: str) -> str:
    """Returns the usual form of one character; a superscript or a fraction stays, since "10²" is not "102"."""
    if character in _HYPHENS:
        return "-"
    if character == "\u0640" or (unicodedata.category(character) == "Mn" and script_of(character) in POINTED):
        return ""
    if character in "ßẞ":  # capitals and Swiss spelling have two letters
        return "ss"
    if unicodedata.category(character) == "Nd":
        return str(unicodedata.digit(character))
    if unicodedata.decomposition(character).startswith(("<super>", "<fraction>")):
        return character
    return "".join(_usual(letter) for letter in unicodedata.normalize("NFKC", character))


def _usual(character: str) -> str:
    """Returns the letter that other keyboards use for this one; the simplified form of a Chinese character."""
    alike = _simplified() if "\u3400" <= character <= "\ufaff" else _ALIKE_LETTERS
    return alike.get(character, character)


@cache
def _simplified() -> dict[str, str]:
    """Reads the simplified character of each traditional one (several may share one)."""
    text = (resources.files("editlib") / "data" / "chinese_variants.txt").read_text(encoding="utf-8")
    return {line[0]: line[1] for line in text.splitlines() if line and not line.startswith("#")}


_STRAIGHT = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc\u02b9\u02bb\uff07\u2032\u00b4\u05f3\ua78c`", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\uff02\u2033\u05f4", '"')
)
_ALIKE_LETTERS = dict(
    zip("أإآٱىیکةہھ\u066b\u066c\u00d0\u00f0\u0110", "ااااييكههه.,\u0111\u0111\u0111", strict=True)
) | dict.fromkeys("\u2022\u2027\u2219\u22c5\u30fb\uff65\u0387", "\u00b7")
"""Letters that keyboards or habits exchange, and the middle dots of foreign names."""
_NASAL = re.compile("ङ्(?=[क-घ])|ञ्(?=[च-झ])|ण्(?=[ट-ढ])|न्(?=[त-ध])|म्(?=[प-भ])|\u0901")
_TONE = re.compile(r"(?:[òóõọỏ][ae]|[ùúũụủ]y)\b", re.IGNORECASE)
"""A vowel that may carry the tone of the one after it, at the end of a word."""
_AM = re.compile("([\u0e48-\u0e4b\u0ec8-\u0ecb])([\u0e4d\u0ecd])")
"""A tone before the ring of a Thai or Lao am, which some keyboards write after it."""
_HYPHENS = frozenset("\u2010\u2011\u2012\u2013\u2212\uff0d")
