"""List the names of a request's fields, word complaints about them, and read values as data sets write them."""

from __future__ import annotations

import json
from typing import Any

from editlib.errors import RequestError

Row = dict[str, Any]

OWN_FIELDS = (
    "id", "prompt", "subject", "target_new", "answer", "aliases", "phrasings", "paraphrases", "neighbours", "group",
    "relation",
)  # fmt: skip
FREE_FIELDS = ("kind", "split", "source", "note", "meta")
"""Fields of the own format that the reader passes over: room for the user's own remarks."""


class FieldError(RequestError):
    """Reports a complaint about one field, under our name for it; `read_requests` puts in the file's name."""

    def __init__(self, name: str, text: str, where: str = "request") -> None:
        super().__init__(f"{where}: field {json.dumps(name)}: {text}")  # dumps: the message stays one line
        self.name, self.text = name, text


def leaves(value: Any) -> list[Any]:
    """Gives the non-empty values of a scalar or a nested list, as data sets write one answer or several."""
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [] if value is None or value == "" else [value]


def first(value: Any) -> Any:
    """Gives the first of the `leaves`, or `None`."""
    return next(iter(leaves(value)), None)


def stripped(value: Any) -> Any:
    """Gives the first of the `leaves` without blanks at its ends."""
    found = first(value)
    return found.strip() if isinstance(found, str) else found


def text_of(value: Any) -> Any:
    """Gives what a target says: `{"str": ..., "id": ...}` as in CounterFact, or the text itself."""
    return value.get("str") if isinstance(value, dict) else value
