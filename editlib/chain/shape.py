"""Check the values of `chain.json`: its hash detects accidental damage only, since an editor of the file can update the
hash."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from editlib.errors import quote

Check = Callable[[Any, str], "str | None"]
"""Says what is wrong with a named value; `None` if it is valid."""

BATCH_FILE = re.compile(r"batches/\d{4,}-[0-9a-f]{12}\.safetensors")
LAYER = re.compile(r"0|[1-9]\d{0,4}")


def misfit(content: Mapping[str, Any]) -> str | None:
    """Names the first value in the content of `chain.json` (without its hash) whose type `ChainRecord` does not write;
    `None` if all are valid.

    Unknown keys of the record and its entries are refused by the dataclasses.
    """
    return next(filter(None, (check(content[name], name) for name, check in RECORD.items() if name in content)), None)


def _kind(test: Callable[[Any], bool]) -> Check:
    return lambda value, name: None if test(value) else f"{name} is of another kind"


def _optional(check: Check) -> Check:
    return lambda value, name: None if value is None else check(value, name)


def _listed(check: Check, called: str = "") -> Check:
    """Returns the check of a list; `called` names one of its values by its number."""

    def checked(value: Any, name: str) -> str | None:
        if not isinstance(value, list):
            return f"{name} is of another kind"
        names = (f"{called or name} {number}" for number in range(1, len(value) + 1))
        return next(filter(None, map(check, value, names)), None)

    return checked


def _mapped(check: Check, key: Callable[[str], Any] = bool, *, empty: bool = True) -> Check:
    """Returns the check of an object with any keys that pass `key`."""

    def checked(value: Any, name: str) -> str | None:
        if not isinstance(value, dict) or not (value or empty):
            return f"{name} is of another kind"
        if (other := next((item for item in value if not key(item)), None)) is not None:
            return f"{name} {quote(other)} is of another kind"
        return next(filter(None, (check(inner, f"{name} {item}") for item, inner in value.items())), None)

    return checked


def _object(fields: Mapping[str, Check], *, missing: frozenset[str] = frozenset()) -> Check:
    """Returns the check of an object with these fields, where those in `missing` may be absent."""

    def checked(value: Any, name: str) -> str | None:
        if not isinstance(value, dict):
            return f"{name} is of another kind"
        if gone := [field for field in fields if field not in value and field not in missing]:
            return f"{name} {gone[0]} is missing"
        checks = ((check, item) for item, check in fields.items() if item in value)
        return next(filter(None, (check(value[item], f"{name} {item}") for check, item in checks)), None)

    return checked


text = _kind(lambda value: isinstance(value, str) and "\0" not in value)
count = _kind(lambda value: type(value) is int and 0 <= value < 2**63)
number = _kind(lambda value: type(value) is float or (type(value) is int and 0 <= value < 2**63))
anything = _kind(lambda value: isinstance(value, dict))
flag = _optional(_kind(lambda value: isinstance(value, bool)))
template = _kind(lambda value: isinstance(value, str) and value.count("{}") == 1)
texts = _listed(text)
rows = _mapped(texts)
LAYER_ENTRY = _object({"sha256": text, "update": number, "ratio": number})
BATCH = _object(
    {
        "number": count,
        "file": _kind(lambda value: isinstance(value, str) and BATCH_FILE.fullmatch(value) is not None),
        "sha256": text,
        "time": text,
        "editlib": text,
        "seed": count,
        "keys": count,
        "ids": texts,
        "layers": _mapped(LAYER_ENTRY, LAYER.fullmatch, empty=False),
        "left_out": rows,
        "guessed_subjects": _mapped(text),
    },
    missing=frozenset({"left_out", "guessed_subjects"}),
)
RECORD: Mapping[str, Check] = {
    "created": text,
    "base": _object(
        {"name": text, "sha256": text, "dtype": _optional(text), "layers": _mapped(text, LAYER.fullmatch, empty=False)}
    ),
    "algorithm": text,
    "hparams": anything,
    "chat": flag,
    "seed": count,
    "templates": _listed(template),
    "statistics": _mapped(_object({"path": text, "sha256": text}), LAYER.fullmatch),
    "files": _mapped(text, lambda name: name in ("token.safetensors", "retain.jsonl")),
    "batches": _listed(BATCH, "batch"),
    "revoked": _listed(_object({"time": text, "ids": texts, "batches": _listed(count)}), "revocation"),
    "prompts": anything,
    "hparams_source": text,
    "left_out": rows,
}
numbers = _listed(number)
NOTES: Mapping[str, Check] = {
    "requests": _listed(anything),
    "values": _object({"steps": numbers, "nll": numbers, "relative_norm": numbers}),
    "relations": _listed(_optional(text)),
    "anchors": texts,
    "answers": _mapped(_listed(count), lambda question: True),
    "token": anything,
    "neurons": _mapped(_listed(count), LAYER.fullmatch),
}


def notes_misfit(notes: Any) -> str | None:
    """Names the first value in the notes of a batch's file whose type `Batch` does not write; `None` if all are
    valid."""
    return _object(NOTES, missing=frozenset({"token", "neurons"}))(notes, "notes")
