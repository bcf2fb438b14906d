"""Find what separates a prompt from its answer in running text: a space or nothing."""

from __future__ import annotations

import re
import unicodedata

from editlib.answers.scripts import UNSPACED, script_of

_PAIRS = {"»": "«", "›": "‹", "”": "“", "’": "‘"}  # marks that close a quotation in one language and open it in another
_ELISION = re.compile(
    r"(?<![\w'’])([cdjlmnst]|(jus|lors|puis|quel|pres)?qu|aujourd|entr|d?all|dell|nell|sull|un|quest|quell|bell|gl|o)['’]$",
    re.IGNORECASE,
)
"""Words in French, Italian, Catalan and Irish names whose apostrophe joins them to the next word."""
_WIDE = ("F", "W")  # East Asian marks, whose glyphs include their space
_CLOSING = re.compile(r"[,;:)\]}%\u2019\u201d]|[.!?]+(?!\w)|['\u2019](?:s|re|ve|ll|d|m|t)\b", re.IGNORECASE)
"""Beginnings of an answer without a space before them: marks, or the rest of a word ("'s"); not ".NET"."""
_TAG = re.compile(r"<\|[^<>|\s]+\|>$|(?<!\w)<[^<>/\s][^<>/]*>$")
"""A mark of a turn, or an opening tag: <|assistant|>, <answer>; not "List<int>"."""
_EMPHASIS = re.compile(r"(?:^|[\s(])(\*{1,3})$")
_CURRENCY = re.compile(r"(?:^|[\s(])(?:[$£€¥#@]|US\$)$")
_WITHIN = re.compile(r"[^\s\d_]_?[-\u2010\u2011\u2014/\\@\u05be\u0640]$|\d[-\u2010\u2011\u2013\u2014]$|\\$|//$")
"""Marks that join the text before them to the text after them: "Jean-", "1939–", "http://", "x@"."""
_PROCLITIC = {"ARABIC": "وفبلكس", "HEBREW": "ושהכלבמ"}
"""Letters that are words of their own, with no space between them and the next word."""


def gap_between(prompt: str, answer: str) -> str:
    """Returns a space or "", as in running text between `prompt` and `answer`.

    There is no space after a blank, a line end, an opening mark ("¿" too), bracket or tag, an East Asian mark, a
    joining mark or letter ("l'", "Jean-", the Hebrew "ב"), or a letter of a script without spaces; "Answer:" before
    "北京" keeps its space. A quotation mark that looks the same on both sides opens after a blank, a bracket or at the
    start. An answer that begins with a closing mark follows the previous word without a space.
    """
    answer = answer.lstrip()
    if not prompt or prompt[-1].isspace() or _opens(prompt) or _joins(prompt, answer) or _CLOSING.match(answer):
        return ""
    last, first = prompt[-1], answer[:1]
    if last.isalnum() or unicodedata.category(last).startswith("M"):  # marks (M) are parts of letters
        return "" if _unspaced(prompt) else " "
    if unicodedata.east_asian_width(last) in _WIDE:
        return ""
    return "" if _unspaced(prompt) and first and script_of(first) in UNSPACED else " "


def _joins(prompt: str, answer: str) -> bool:
    """Returns whether `prompt` ends within a word, or with a mark that belongs to what follows."""
    if any(mark.search(prompt) for mark in (_ELISION, _TAG, _WITHIN)):
        return True
    if emphasis := _EMPHASIS.search(prompt):
        return prompt.count(emphasis[1]) % 2 == 1
    if _CURRENCY.search(prompt):
        return answer[:1].isalnum()
    *_, word = ("", *prompt.split())
    return len(word) == 1 and word in _PROCLITIC.get(script := script_of(word), "") and script_of(answer[:1]) == script


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
