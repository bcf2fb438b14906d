"""Find the subject in a text, and distinguish its placeholder from other braces.

A text marks its subject in one of three ways, in this order of preference: `{subject}`; a single `{}`; the subject
itself, spelled out once. All other braces are ordinary text, and `{{}}` is a literal `{}`.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from editlib.answers.scripts import plain_marks
from editlib.errors import quote
from editlib.requests.fields import FieldError
from editlib.requests.spellings import find_spelling

PLACE, NAMED, BRACES = "{}", "{subject}", "{{}}"
APOSTROPHES = "['\u2018\u2019\u02bc\u02bb\u00b4`\u2032\uff07]"
_MARKS = re.compile(r"\{\{\}\}|\{\}")


@dataclass(frozen=True)
class Filled:
    """Holds a text with its subject filled in, which begins at character `start`; `None` if the text does not contain
    it.

    `subject` is the text's own spelling.
    """

    text: str
    start: int | None
    subject: str | None = None


def fill(name: str, text: str, subject: str | None, *, otherwise: bool = False) -> Filled:
    """Fills the subject into a text's placeholder.

    Args:
        name: name of the field, for messages.
        otherwise: if the text does not contain the subject, accept another spelling (`find_spelling`).

    Raises:
        FieldError: a placeholder without a subject, or several placeholders.
    """
    marks = [mark[0] for mark in _MARKS.finditer(text)]
    if subject is None:
        if PLACE in marks:
            given = f'missing, but {name} has "{{}}"'
            wanted = 'expected what fills it; add "subject", spell it out, or write braces as "{{}}"'
            raise FieldError("subject", f"{given}; {wanted}")
        return Filled(_unescaped(text), None)
    if (places := text.count(NAMED)) > 1:
        given = f'{quote(text)} has {places} "{NAMED}"'
        raise FieldError(name, f"{given}; expected one, in the subject's place; take the others out")
    if places:
        before, _, after = text.partition(NAMED)
        return _joined(before, subject, after)
    spelled = occurrences(_unescaped(text), subject)
    if marks.count(PLACE) == 1:
        place = next(mark for mark in _MARKS.finditer(text) if mark[0] == PLACE)
        return _joined(_unescaped(text[: place.start()]), subject, _unescaped(text[place.end() :]))
    if marks == [BRACES] and len(spelled) != 1:  # a subject in braces
        before, _, after = text.partition(PLACE)
        return _joined(before, subject, after)
    if PLACE in marks and len(spelled) != 1:
        given = f'{quote(text)} has {marks.count(PLACE)} "{{}}"'
        raise FieldError(name, f'{given}; expected one, in the subject\'s place; write the others as "{{{{}}}}"')
    if otherwise and not spelled and (there := find_spelling(_unescaped(text), subject)) is not None:
        return Filled(_unescaped(text), *there)
    return Filled(_unescaped(text), *((spelled[0], subject) if len(spelled) == 1 else (None,)))


def template_of(prompt: str, subject: str) -> str:
    """Returns the prompt in its standard form: `{}` in the subject's place, or `{subject}` if other braces could be
    mistaken for it.

    Raises:
        FieldError: see `fill`; or the subject is not in the prompt, or more than once without a placeholder.
    """
    if subject != subject.strip() or PLACE in subject or NAMED in subject:
        wanted = 'expected text without "{}" and without blanks at its ends'
        raise FieldError("subject", f"{quote(subject)}; {wanted}; remove them")
    filled = fill("prompt", prompt, subject)
    if filled.start is None:
        found = occurrences(filled.text, subject)
        if not found:
            given = f"{quote(subject)} is not in the prompt {quote(prompt)}"
            raise FieldError("subject", f'{given}; expected it once; put "{{}}" in its place or drop "subject"')
        given = f"{quote(subject)} occurs more than once in {quote(filled.text)}"
        one = filled.text[: found[0]] + PLACE + filled.text[found[0] + len(subject) :]
        raise FieldError("subject", f'{given}; expected "{{}}" in the place that is meant; write, say, {quote(one)}')
    before, after = filled.text[: filled.start], filled.text[filled.start + len(subject) :]
    plain = before + PLACE + after
    return plain if _reads(plain, subject, filled) else before + NAMED + after


def spelling_in(prompt: str, subject: str) -> str:
    """Returns the subject in the prompt's spelling, if they differ only invisibly: composed or decomposed accents,
    straight or curly apostrophes. Returns the subject itself if the prompt has a placeholder, contains the subject
    exactly, or does not contain it."""
    if subject in prompt or PLACE in prompt or NAMED in prompt:
        return subject
    found = {match[0] for match in re.finditer("".join(map(_forms, unicodedata.normalize("NFC", subject))), prompt)}
    return found.pop() if len(found) == 1 else subject


def _forms(character: str) -> str:
    """Returns a pattern for one composed character in each of its forms."""
    if plain_marks(character) == "'":
        return APOSTROPHES
    apart = unicodedata.normalize("NFD", character)
    return re.escape(character) if apart == character else f"(?:{re.escape(character)}|{re.escape(apart)})"


def literal(text: str) -> str:
    """Returns the text with each `{}` escaped, so that it is literal."""
    return text.replace(PLACE, BRACES)


def occurrences(text: str, subject: str) -> list[int]:
    """Finds the subject at word boundaries, else (as in scripts without spaces) anywhere."""
    spelled = re.escape(subject)
    whole = [m.start() for m in re.finditer(rf"(?<!\w){spelled}(?!\w)", text)]
    return whole or [m.start() for m in re.finditer(rf"(?={spelled})", text)]


def _reads(text: str, subject: str, wanted: Filled) -> bool:
    try:
        return fill("prompt", text, subject) == wanted
    except FieldError:
        return False


def _joined(before: str, subject: str, after: str) -> Filled:
    return Filled(before + subject + after, len(before), subject)


def _unescaped(text: str) -> str:
    return text.replace(BRACES, PLACE) if BRACES in text else text
