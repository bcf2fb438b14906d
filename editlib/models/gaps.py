"""Decide what separates a prompt from its answer in running text: a space or nothing."""

from __future__ import annotations

import re
import unicodedata

from editlib.answers.scripts import UNSPACED, script_of

_PAIRS = {"»": "«", "›": "‹", "”": "“", "’": "‘"}  # marks that close in one language and open in another
_ELISION = re.compile(
    r"(?<![\w'’])([cdjlmnst]|(jus|lors|puis|quel)?qu|d?all|dell|nell|sull|un|quest|quell|bell|gl|o)['’]$",
    re.IGNORECASE,
)
"""Words of French, Italian, Catalan and Irish names whose apostrophe joins them to the next."""
_WIDE = ("F", "W")  # East Asian marks, whose glyphs include their space


def gap_between(prompt: str, answer: str) -> str:
    """Returns a space or "", as running text has it between `prompt` and `answer`.

    Nothing follows a blank, a line end, an opening mark ("¿", too) or bracket, an East Asian mark, an elision ("l'"),
    or a letter of a script without spaces; "Answer:" before "北京" keeps its space. A quotation mark that looks the
    same on both sides opens after a blank, a bracket or nothing.
    """
    if not prompt or prompt[-1].isspace() or _opens(prompt) or _ELISION.search(prompt):
        return ""
    last, first = prompt[-1], answer.lstrip()[:1]
    if last.isalnum() or unicodedata.category(last).startswith("M"):  # marks (M) are parts of letters
        return "" if _unspaced(prompt) else " "
    if unicodedata.east_asian_width(last) in _WIDE:
        return ""
    return "" if _unspaced(prompt) and first and script_of(first) in UNSPACED else " "


def _unspaced(text: str) -> bool:
    """Returns whether the last letter of `text` is of a script without spaces."""
    last = next((character for character in reversed(text) if character.isalpha()), "")
    return bool(last) and script_of(last) in UNSPACED


def _opens(text: str) -> bool:
    """Returns whether `text` ends with an opening quotation mark or bracket."""
    last, before = text[-1], text[:-1]
    kind = unicodedata.category(last)
    if kind == "Ps" or last in "¿¡":
        return True
    if kind not in ("Pi", "Pf") and last not in "\"'`":
        return False
    if before and not before[-1].isspace() and not _opens(before):
        return kind == "Pi" and _unspaced(before)  # Chinese opens within a line, German closes (»Ja«, „Ja“)
    if last in _PAIRS:  # after a blank, » opens in German and closes in French (« Oui »)
        return text.count(_PAIRS[last]) < text.count(last)
    return last != '"' or text.count(last) % 2 == 1
