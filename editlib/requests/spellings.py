"""Find a subject that a further phrasing spells differently: in another case, with other blanks, without article or
accents."""

from __future__ import annotations

import re
import unicodedata

from editlib.answers.scripts import plain_marks, script_of

ACCENTED = frozenset({"LATIN", "GREEK", "CYRILLIC"})
"""Scripts whose accents many writers leave out; elsewhere a mark makes another letter."""
_ARTICLE = re.compile(r"^(?:the|an?) ")


def find_spelling(text: str, subject: str) -> tuple[int, str] | None:
    """Finds a subject with another spelling in a text, at word boundaries.

    Ignored are case, accents of the Latin, Greek and Cyrillic scripts, apostrophes, blanks and a leading English
    article.

    Returns:
        The index of its first character, and its spelling there; `None` unless it occurs exactly once.
    """
    for name in dict.fromkeys((_plain(subject)[0].strip(), plain_name(subject))):
        found = _found(text, name)
        if found:
            return found[0] if len(found) == 1 else None
    return None


def every_spelling(text: str, subject: str) -> list[tuple[int, str]]:
    """Finds all places of a subject in a text, in whatever spelling (`find_spelling`) and without its article.

    Returns:
        For each, the index of its first character, and its spelling there.
    """
    return _found(text, plain_name(subject))


def plain_name(subject: str) -> str:
    """Returns a subject without what `find_spelling` ignores: the same text for all its spellings."""
    return _ARTICLE.sub("", _plain(subject)[0].strip(), count=1)


def _found(text: str, name: str) -> list[tuple[int, str]]:
    """Returns the places of a plain `name` in a text, and the text there."""
    searched, places = _plain(text)
    found = []
    for match in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", searched) if name else ():
        start, end = places[match.start()], places[match.end() - 1] + 1
        while end < len(text) and unicodedata.category(text[end]) == "Mn":  # the accent of the last letter
            end += 1
        found.append((start, text[start:end]))
    return found


def _plain(text: str) -> tuple[str, list[int]]:
    """Returns the text without the differences that `find_spelling` ignores, and the index in `text` of each of its
    characters."""
    found, places = "", []
    for place, character in enumerate(text):
        for plain in " " if character.isspace() else _letters(character):
            if plain != " " or not found.endswith(" "):
                found += plain
                places.append(place)
    return found, places


def _letters(character: str) -> str:
    bare = plain_marks(character)  # nothing for a character that only formats
    if unicodedata.category(character) == "Mn" and unicodedata.name(character, "").startswith("COMBINING"):
        return ""
    if script_of(character) in ACCENTED:
        apart = unicodedata.normalize("NFKD", bare)
        bare = "".join(one for one in apart if unicodedata.category(one) != "Mn")
    return bare.casefold()
