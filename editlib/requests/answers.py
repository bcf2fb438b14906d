"""Read the answers in a row of a data set: a text, a list of texts, or an object, under that set's field names.

The first answer is the usual one; the others are accepted too.
"""

from __future__ import annotations

import json
from typing import Any

from editlib.errors import quote
from editlib.requests.fields import FieldError, JsonRow, leaves

NAMES = ("answer", "best_answer", "correct_answers", "answers", "obj", "possible_answers")
"""Fields with answers, in order of preference (TruthfulQA has two, PopQA two others)."""
INNER = ("value", "aliases", "text")
"""Fields of an object with answers (TriviaQA, SQuAD)."""
CHOICES = ("choices", "options")


def answers_of(row: JsonRow) -> list[Any]:
    """Returns all distinct answers of a row; values that are not texts are left for `EditRequest` to refuse.

    Natural Questions has a list, TriviaQA an object with `value` and `aliases`, SQuAD one with `text`, PopQA a list
    written as a text.

    Raises:
        FieldError: an object without any of `INNER`, a text that is not a JSON list, or choices without the right one.
    """
    _check_choices(row)
    found: list[Any] = []
    for name in NAMES:
        value = row.get(name)
        if name == "possible_answers" and isinstance(value, str):
            value = _list_in(name, value)
        for one in leaves(value):
            found += _in_object(name, one) if isinstance(one, dict) else [one]
    return [one for i, one in enumerate(found) if one not in found[:i]]


def _in_object(name: str, value: JsonRow) -> list[Any]:
    inner = [leaf for key in INNER for leaf in leaves(value.get(key))]
    if not inner and not set(INNER) & value.keys():
        wanted = 'expected a text, a list of texts, or an object with "value" and "aliases"'
        raise FieldError(name, f"{quote(value)}; {wanted}; write one of these")
    return inner


def _list_in(name: str, text: str) -> list[Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise FieldError(name, f"{quote(text)}; expected a JSON list of texts, as in PopQA; fix it")
    return found


def _check_choices(row: JsonRow) -> None:
    """Raises `FieldError` if a row has choices and its answer is only the number or letter of one."""
    for name in CHOICES:
        if name not in row:
            continue
        offered = row[name].get("text") if isinstance(row[name], dict) else row[name]
        if not isinstance(offered, list) or row.get("answer") not in offered:
            given = "missing" if row.get("answer") is None else quote(row["answer"])
            raise FieldError("answer", f'{given}; expected a string, the right one of "{name}"; write it there')
