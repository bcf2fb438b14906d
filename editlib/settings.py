"""Define settings as checked dataclasses: fields hold ranges and choices; unknown and missing keys are errors."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from editlib.errors import ConfigError, EditlibError, HparamsError, first_line, nearest, quote

Self = TypeVar("Self", bound="Section")


def setting(default: Any = MISSING, help: str = "", **limits: Any) -> Any:
    """Makes a field of a settings class: its default, its help text and its allowed values.

    `limits` are `min`, `max` (inclusive), `above`, `below` (exclusive) and `choices`.
    """
    given = {"default_factory": default} if callable(default) else {"default": default}
    return field(**given, metadata={"help": help, **limits})


def read_settings(path: str | Path) -> dict[str, Any]:
    """Reads a file with one flat object: YAML where its name ends in `.yaml` or `.yml`, else JSON.

    Raises:
        HparamsError: it cannot be read, or has other content.
    """
    yaml = Path(path).suffix.lower() in (".yaml", ".yml")
    kind = "YAML" if yaml else "JSON"
    wanted = f"expected a file with one flat {kind} object"
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        values = _yaml(text) if yaml else json.loads(text, object_pairs_hook=_each_once)
    except OSError as error:
        raise HparamsError(f"{path}: {error.strerror}; {wanted}; check the path") from None
    except UnicodeDecodeError:
        raise HparamsError(f"{path}: not UTF-8; {wanted}; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        at = f"line {error.lineno} column {error.colno}"
        raise HparamsError(f"{path}: not JSON at {at} ({error.msg}); {wanted}; fix it") from None
    except (ValueError, RecursionError) as error:  # also a null byte in the path
        raise HparamsError(f"{path}: {error}; {wanted}; fix it") from None
    if not isinstance(values, dict):
        raise HparamsError(f"{path}: {quote(values)}; {wanted}; write {'keys with their values' if yaml else '{...}'}")
    return values


def _each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object from its keys and values; raises `ValueError` if a key occurs twice."""
    names = [name for name, _ in pairs]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise ValueError(f"key {quote(twice)} is there twice in one object")
    return dict(pairs)


def _yaml(text: str) -> Any:
    """Reads a YAML text in which `5e-1` is a number, as EasyEdit expects; YAML 1.1 requires `5.0e-1`.

    Raises:
        ValueError: it is not YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads numbers without a point too, and refuses repeated keys."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            _each_once([(key.value, None) for key, _ in node.value if isinstance(key.value, str) and key.value != "<<"])
            return super().construct_mapping(node, deep)

    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.yaml_implicit_resolvers = {
        key: list(resolvers) for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for first in "-+.0123456789":
        Loader.yaml_implicit_resolvers.setdefault(first, []).insert(0, ("tag:yaml.org,2002:float", number))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = "" if mark is None else f" at line {mark.line + 1} column {mark.column + 1}"
        raise ValueError(f"not YAML{at} ({getattr(error, 'problem', None) or first_line(error)})") from None


def invalid(name: str, value: Any, wanted: str, remedy: str = "change it") -> HparamsError:
    """Makes the error for a setting with a value that is not allowed."""
    return HparamsError(f'key "{name}": {quote(value)}; expected {wanted}; {remedy}')


_KINDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a string", dict: "an object",
    list[int]: "a list of whole numbers", list[str]: "a list of texts", type(None): "null",
    list[list[int]]: "a list of pairs of whole numbers", tuple[int, ...]: "a list of whole numbers", Path: "a path",
}  # fmt: skip
_LIMITS = {"min": "at least", "above": "more than", "max": "at most", "below": "less than"}


def checked(name: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    """Checks a value against its annotation and its limits; returns it in the annotated type.

    Raises:
        HparamsError: another type, or out of range.
    """
    value, wanted = _fitted(value, hint, metadata)
    if wanted is not None:
        raise invalid(name, value, wanted)
    return value


def check_fields(settings: Any, *, error: type[EditlibError] = HparamsError, of: str = "") -> None:
    """Checks each field of a frozen dataclass of settings as `checked` does, and converts it to the annotated type.

    For settings that are made in Python or from options instead of from a file's keys.

    Args:
        error: the class of the exception to raise.
        of: follows the field's name in the message, such as " of a search".
    """
    hints = get_type_hints(type(settings))
    for item in fields(settings):
        value, wanted = _fitted(getattr(settings, item.name), hints[item.name], item.metadata)
        if wanted is not None:
            raise error(f"{item.name}{of} is {quote(value)}; expected {wanted}")
        object.__setattr__(settings, item.name, value)


def _fitted(value: Any, hint: Any, metadata: Mapping[str, Any]) -> tuple[Any, str | None]:
    """Returns the value in the annotated type, and a description of valid values, or `None` if it is valid."""
    choices = metadata.get("choices", get_args(hint) if get_origin(hint) is Literal else None)
    kinds = (str,) if get_origin(hint) is Literal else (hint,) if hint in _KINDS else get_args(hint)
    if float in kinds and type(value) is int and abs(value) <= sys.float_info.max:
        value = float(value)
    if isinstance(value, (list, tuple)) and {list[int], list[str], list[list[int]]} & set(kinds):
        value = list(value)  # the caller's list may change later
    elif isinstance(value, list) and tuple[int, ...] in kinds:
        value = tuple(value)
    if not any(_is(value, kind) for kind in kinds):
        return value, " or ".join(_KINDS[kind] for kind in kinds)
    if choices is not None and value not in choices:
        return value, " or ".join(f'"{choice}"' for choice in choices)
    for number in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(number, (int, float)) and not _within(number, metadata):
            limits = [f"{word} {metadata[key]}" for key, word in _LIMITS.items() if key in metadata]
            return value, " and ".join(limits) or "a finite number"
    return value, None


def _is(value: Any, kind: Any) -> bool:
    if kind == list[int]:
        return type(value) is list and all(type(item) is int for item in value)
    if kind == list[str]:
        return type(value) is list and all(type(item) is str for item in value)
    if kind == list[list[int]]:
        return type(value) is list and all(_is(item, list[int]) and len(item) == 2 for item in value)
    if kind == tuple[int, ...]:
        return type(value) is tuple and all(type(item) is int for item in value)
    if kind is Path:
        return isinstance(value, Path)
    return type(value) is kind  # exact: True is not a number


def _within(number: float, limits: Mapping[str, Any]) -> bool:
    return (
        abs(number) < math.inf  # false for nan, and whole numbers may be too big for math.isfinite
        and number >= limits.get("min", number)
        and number <= limits.get("max", number)
        and ("above" not in limits or number > limits["above"])
        and ("below" not in limits or number < limits["below"])
    )


@dataclass(frozen=True, kw_only=True)
class Section:
    """Reads one part of a config; the base class of all parts. Its fields are `setting`s with help, range and
    choices."""

    @classmethod
    def read(cls: type[Self], values: Any, where: str) -> Self:
        """Makes the section from the values in the file.

        Raises:
            ConfigError: not an object, an unknown or missing key, a value of the wrong type or out of range.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: {quote(values)}; expected an object with keys; write it as one")
        names, hints = [item.name for item in fields(cls)], get_type_hints(cls)
        for key in values:
            if key not in names:
                raise ConfigError(f'{where}: key "{key}": unknown; expected {nearest(str(key), names)}')
        given = {}
        for item in fields(cls):
            if item.name not in values:
                if item.default is item.default_factory is MISSING:
                    wanted = item.metadata["help"]
                    raise ConfigError(f'{where}: key "{item.name}": missing; expected {wanted}; add it')
                continue
            try:
                given[item.name] = checked(item.name, values[item.name], hints[item.name], item.metadata)
            except HparamsError as error:
                raise ConfigError(f"{where}: {error}") from None
        try:
            return cls(**given)
        except HparamsError as error:  # conditions on several keys
            raise ConfigError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings JSON-ready, with the defaults filled in."""
        return asdict(self)


def chosen(name: Any, known: Mapping[str, Any], what: str, where: str) -> Any:
    """Looks up an entry of a registry.

    Raises:
        ConfigError: there is no such entry; the message names the nearest.
    """
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"{where}: {what} {quote(name)}: unknown; expected {nearest(str(name), known)}")
    return known[name]
