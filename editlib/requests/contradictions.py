"""Find requests that cannot all be met: one question with two new answers, or to be forgotten and kept."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Sequence

from editlib.errors import quote
from editlib.requests.request import EditRequest

log = logging.getLogger(__name__)

NAMED = 5  # most pairs named in a warning


def contradictions(requests: Iterable[EditRequest]) -> list[tuple[EditRequest, EditRequest]]:
    """Finds requests with the same question, in any spelling, but another new answer; each with the first such
    request."""
    first: dict[str, EditRequest] = {}
    found = []
    for request in requests:
        if request.target_new is None:
            continue
        for text in (request.question, *request.filled_phrasings):
            other = first.setdefault(_plain(text), request)
            if other is not request and _plain(other.target_new or "") != _plain(request.target_new):
                found.append((other, request))
                break
    return found


def warn_of_contradictions(name: str, requests: Iterable[EditRequest]) -> None:
    """Warns of requests of a file that contradict one another, with both new answers."""
    pairs = contradictions(requests)
    said = [
        f"{one.id} ({quote(one.target_new)}) and {other.id} ({quote(other.target_new)}) ask {quote(other.question)}"
        for one, other in pairs
    ]
    if said:
        log.warning("%s: one question with two new answers: %s; the edit cannot meet both", name, _some(said))


def warn_of_kept(requests: Sequence[EditRequest], retain: Sequence[EditRequest]) -> None:
    """Warns of questions that are both to be kept and to be forgotten or edited."""
    asked = {_plain(text): request for request in requests for text in (request.question, *request.filled_phrasings)}
    said = [
        f"{kept.id} asks the same as request {asked[_plain(kept.question)].id}, {quote(kept.question)}"
        for kept in retain
        if _plain(kept.question) in asked
    ]
    if said:
        log.warning("to be kept and to be changed: retain prompt %s; it is not kept", _some(said))


def _some(said: Sequence[str]) -> str:
    more = f"; and {len(said) - NAMED} more" if len(said) > NAMED else ""
    return "; ".join(said[:NAMED]) + more


def _plain(text: str) -> str:
    """Returns the text without invisible differences: case, blanks, composed and decomposed letters."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())
