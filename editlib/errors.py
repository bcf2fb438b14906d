"""Define the errors that a user of editlib can cause.

Every message is one line that says what was given, what was expected and what to do about it; the command line prints
it to stderr and leaves with exit code 2. Helpers for the wording of messages are here, too.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class EditlibError(Exception):
    """Reports bad input or an impossible job; the base of all errors that editlib raises."""


class RequestError(EditlibError, ValueError):
    """Reports a request, retain or data file that cannot be used; names file, line and field."""


class HparamsError(EditlibError, ValueError):
    """Reports a hyper-parameter that is unknown, missing, of the wrong type or out of range."""


class ModelError(EditlibError, ValueError):
    """Reports a model or tokenizer that cannot be loaded or edited."""


class StatsError(EditlibError, ValueError):
    """Reports layer statistics that are missing, damaged or belong to another model."""


class CorpusError(EditlibError, ValueError):
    """Reports a corpus that cannot be read or has too little text."""


class TokenError(EditlibError, ValueError):
    """Reports an unlearning token that is missing, damaged or belongs to another model."""


class EditError(EditlibError, ValueError):
    """Reports an edit that could not be solved; the model is left unchanged."""


class MetricError(EditlibError, ValueError):
    """Reports a measurement that cannot be made, or a file of results that cannot be read."""


class DeltaError(EditlibError, ValueError):
    """Reports a delta file that is damaged, or belongs to another model."""


class ChainError(EditlibError, ValueError):
    """Reports a folder that is not a chain, or a chain that is damaged, in use, or lacks a requested part."""


class AttackError(EditlibError, ValueError):
    """Reports an attack that does not exist, lacks a package, or has invalid settings."""


class ConfigError(EditlibError, ValueError):
    """Reports a comparison's file that cannot be read, or that has an unknown key or value."""


class OutputError(EditlibError, OSError):
    """Reports an output folder or file that cannot be written as asked."""


class FetchError(EditlibError, OSError):
    """Reports a packaged model or corpus that is neither cached nor can be downloaded."""


def first_line(error: BaseException | None) -> str:
    """Returns the first line of an exception's message, or the name of its class without one."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def quote(value: object) -> str:
    """Quotes a value for a message, on one line of at most 80 characters."""
    brief = reprlib.Repr()  # however deep and long the value is
    brief.maxstring = brief.maxother = brief.maxlong = 200
    brief.maxlist = brief.maxdict = 40
    text = brief.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def closest(name: str, known: Iterable[str], *, n: int = 1, cutoff: float = 0.6) -> list[str]:
    """Finds at most `n` known names that are spelled like `name`, whatever their case; the most alike comes first."""
    by_lower = {entry.lower(): entry for entry in known}
    return [by_lower[near] for near in difflib.get_close_matches(name.lower(), by_lower, n=n, cutoff=cutoff)]


def nearest(name: str, known: Iterable[str], also: Iterable[str] = ()) -> str:
    """Suggests names for an unknown one: the closest known one (or one of `also`), else all known."""
    known = list(known)
    near = closest(name, (*also, *known))
    return f'"{near[0]}"' if near else "one of " + ", ".join(known)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the closest known name as a question in brackets, after a blank; an empty text if none is close."""
    near = closest(name, known)
    return f" (did you mean {near[0]}?)" if near else ""
