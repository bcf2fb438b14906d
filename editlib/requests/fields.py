"""List the names of a request's fields, word complaints about them, and read values as data sets write them."""

from __future__ import annotations

import json
from typing import Any

from editlib.errors import RequestError, closest

JsonRow = dict[str, Any]

OWN_FIELDS = (
    "id", "prompt", "subject", "target_new", "answer", "aliases", "phrasings", "paraphrases", "neighbours", "group",
    "relation",
)  # fmt: skip
SYNONYMS = {
    "prompt": "question query q input instruction text statement",
    "answer": "answers completion response output label labels gold truth ground_truth true_answer correct_answer a o "
    "obj obj_label object target_true old_answer",
    "target_new": "target new_answer new_target target_false edited_answer",
    "subject": "s subj sub_label entity name",
    "relation": "r rel predicate relation_id",
    "paraphrases": "paraphrase rephrase rephrased paraphrase_prompts",
    "neighbours": "neighbors neighborhood neighbourhood neighborhood_prompts locality",
}
"""Other names of our fields, for the message about an unknown one."""
FREE_FIELDS = ("kind", "split", "source", "note", "meta")
"""Fields of our own format that the reader ignores: the user's own remarks."""


class FieldError(RequestError):
    """Reports a fault of one field, under our name for it; `read_requests` replaces it by the file's name."""

    def __init__(self, name: str, text: str, where: str = "request") -> None:
        super().__init__(f"{where}: field {json.dumps(name)}: {text}")  # dumps: the message stays one line
        self.name, self.text = name, text


def leaves(value: Any) -> list[Any]:
    """Returns the non-empty values of a scalar or a nested list, in which data sets write one or several answers."""
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [] if value is None or value == "" else [value]


def meant(name: str) -> tuple[str, ...]:
    """Returns the fields of ours that an unknown name may mean."""
    plain = name.lower()
    for ours, others in SYNONYMS.items():
        if plain in (ours, *others.split()):
            return (ours,)
    return tuple(closest(plain, OWN_FIELDS, cutoff=0.7)) or OWN_FIELDS


def first(value: Any) -> Any:
    """Returns the first of the `leaves`, or `None`."""
    return next(iter(leaves(value)), None)


def stripped(value: Any) -> Any:
    """Returns the first of the `leaves` without blanks at its ends."""
    found = first(value)
    return found.strip() if isinstance(found, str) else found


def text_of(value: Any) -> Any:
    """Returns the text of a target: `{"str": ..., "id": ...}` as in CounterFact, or the text itself."""
    return value.get("str") if isinstance(value, dict) else value
