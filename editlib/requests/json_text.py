"""Parse JSON texts by users, in which an object must not have a key twice: Python would silently use the last one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from editlib.errors import quote

MENDED = "expected each key once; remove one of the two"


class Doubled(dict[str, Any]):
    """Holds an object that has a key twice; `key` is the first such one."""

    key = ""


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen: set[str] = set()
    doubled = Doubled(found)
    doubled.key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return doubled


def loads(text: str) -> Any:
    """Parses a JSON text; an object with a key twice becomes a `Doubled`.

    Raises:
        ValueError, RecursionError: as `json.loads`.
    """
    return json.loads(text, object_pairs_hook=_object)


def doubled_key(value: Any) -> str | None:
    """Returns a key that an object in `value` has twice; `None` if there is none."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, Doubled):
            return one.key
        if isinstance(one, (dict, list)):
            left.extend(one.values() if isinstance(one, dict) else one)
    return None


def loads_checked(text: str) -> Any:
    """Parses a JSON text.

    Raises:
        ValueError, RecursionError: as `json.loads`; or an object has a key twice.
    """
    value = loads(text)
    if (key := doubled_key(value)) is not None:
        raise ValueError(f"key {quote(key)} is there twice in one object")
    return value
