"""Record how prompts are made from questions, so that a prompt is the same text on a later day."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from hashlib import sha256
from typing import Any

from editlib.errors import RequestError, quote

NAMES = ("chat", "system", "tags", "date")
_HALF = ("January", "February", "March", "April", "May", "June")
_MONTHS = (*_HALF, "July", "August", "September", "October", "November", "December")
_MIDNIGHT = {
    **{"%H": "00", "%I": "12", "%M": "00", "%S": "00", "%p": "AM", "%f": "000000", "%k": " 0", "%l": "12"},
    **{"%-H": "0", "%-I": "12", "%-M": "0", "%-S": "0", "%T": "00:00:00", "%X": "00:00:00", "%R": "00:00"},
    **{"%Z": "", "%z": ""},
}
"""Texts of `strftime` for midnight without a time zone."""
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True)
class PromptSettings:
    """Holds the settings by which questions become prompts.

    Args:
        chat: use the tokenizer's chat template; `None`: if it has one.
        system: the system's turn, for chat templates only.
        arguments: further arguments of the chat template (`enable_thinking`).
        tags: text around a plain question, with "{}" for the question ("Question: {}\\nAnswer:"). The chat template is
            then not used.
        date: the day that a chat template prints as today, as "2026-01-31"; `None`: today.

    Raises:
        RequestError: a value of the wrong type, or settings that exclude each other.
    """

    chat: bool | None = None
    system: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tags: str | None = None
    date: str | None = None

    def __post_init__(self) -> None:
        for name in ("system", "tags", "date"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise RequestError(f"prompts: {name} is {quote(getattr(self, name))}; expected a text")
        if self.chat not in (None, True, False):
            raise RequestError(f"prompts: chat is {quote(self.chat)}; expected true or false")
        if not isinstance(self.arguments, Mapping):
            raise RequestError(f"prompts: arguments are {quote(self.arguments)}; expected an object")
        if self.tags is not None and self.tags.count("{}") != 1:
            raise RequestError(f'prompts: tags {quote(self.tags)}; expected one "{{}}" for the question')
        plain = self.tags is not None or self.chat is False
        if plain and (self.chat or self.system is not None or self.arguments):
            raise RequestError(
                "prompts: tags and chat=false are plain text; they exclude a chat, a system and arguments"
            )
        if self.date is not None:
            try:
                # Only one notation: newer Pythons read others, and equal records would then differ.
                if date.fromisoformat(self.date).isoformat() != self.date:
                    raise ValueError
            except ValueError:
                raise RequestError(f"prompts: date {quote(self.date)}; expected a day such as 2026-01-31") from None

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as JSON values, without those at their default."""
        return {name: value for name, value in asdict(self).items() if value not in (None, {})}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptSettings:
        """Reads the output of `to_dict`.

        Raises:
            RequestError: an unknown key or a value of the wrong type.
        """
        known = [item.name for item in fields(cls)]
        for name in values:
            if name not in known:
                raise RequestError(f"prompts: {quote(name)} is unknown; expected {', '.join(known)}")
        return cls(**values)

    @classmethod
    def of_options(cls, options: Sequence[str]) -> PromptSettings | None:
        """Reads options of the form `NAME=VALUE`; `None` without options.

        A name other than `NAMES` is an argument of the chat template, and its value is read as JSON if possible. In
        texts, "\\n" means a line end.

        Raises:
            RequestError: no "=", a name that is given twice, or an invalid value.
        """
        given: dict[str, Any] = {}
        for option in options:
            name, mark, text = option.partition("=")
            name = name.strip()
            if not mark or not name or name in given:
                fault = "is given twice" if name in given else "has no value"
                raise RequestError(f'--prompt {quote(option)} {fault}; expected NAME=VALUE, such as system="Be brief."')
            texts = ("system", "tags", "date")
            given[name] = text.replace("\\n", "\n") if name in texts else _value(text)
        return cls.of_values(given) if given else None

    @classmethod
    def of_values(cls, values: Mapping[str, Any]) -> PromptSettings:
        """Reads a mapping from names to values; a name other than `NAMES` is an argument of the chat template.

        Raises:
            RequestError: an invalid value.
        """
        known = {name: value for name, value in values.items() if name in NAMES}
        return cls(**known, arguments={name: value for name, value in values.items() if name not in NAMES})

    def key(self, of: str) -> str:
        """Returns the key that answers of `of` are stored under: `of` itself for default settings, else with their
        hash."""
        settings = self.to_dict()
        return f"{of}:{sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]}" if settings else of


def differing(recorded: Mapping[str, Any], own: Mapping[str, Any], what: str) -> str:
    """Writes one line for a message: `what` was done with `recorded` prompt settings, which differ from the current
    ones."""
    names = [name for name in (*NAMES, "arguments") if recorded.get(name) != own.get(name)]
    was, now = (", ".join(f"{name} {quote(given.get(name))}" for name in names) for given in (recorded, own))
    return f"{what} with other prompts ({was}) than those asked now ({now})"


def _value(text: str) -> Any:
    """Returns `text` parsed as JSON, or the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def dated(template: str, day: date) -> str:
    """Makes a chat template that prints `day` as today: a macro replaces the function `strftime_now`.

    A macro, since transformers passes only plain data to a template.
    """
    filled = "".join(f" | replace('{directive}', '{text}')" for directive, text in _directives(day).items())
    # The empty expression preserves a line end at the beginning of the template.
    return f"{{% macro strftime_now(format) %}}{{{{ format{filled} }}}}{{% endmacro %}}{{{{ '' }}}}{template}"


def _directives(day: date) -> dict[str, str]:
    """Returns the text of each directive of `strftime` on a day, in English whatever the locale; its time is
    midnight."""
    month, weekday = _MONTHS[day.month - 1], _DAYS[day.weekday()]
    return _MIDNIGHT | {
        "%B": month,
        "%b": month[:3],
        "%h": month[:3],
        "%A": weekday,
        "%a": weekday[:3],
        "%F": day.isoformat(),
        "%Y": str(day.year),
        "%y": f"{day.year % 100:02d}",
        "%m": f"{day.month:02d}",
        "%-m": str(day.month),
        "%d": f"{day.day:02d}",
        "%-d": str(day.day),
        "%e": f"{day.day:2d}",
        "%j": f"{day.timetuple().tm_yday:03d}",
        "%D": f"{day:%m/%d}/{day.year % 100:02d}",
        "%x": f"{day:%m/%d}/{day.year % 100:02d}",
        "%c": f"{weekday[:3]} {month[:3]} {day.day:2d} 00:00:00 {day.year}",
        "%-j": str(day.timetuple().tm_yday),
        "%-y": str(day.year % 100),
        "%G": str(day.isocalendar().year),
        "%V": f"{day.isocalendar().week:02d}",
        "%u": str(day.isoweekday()),
        "%w": str(day.isoweekday() % 7),
        "%U": f"{day:%U}",
        "%W": f"{day:%W}",
        "%%": "%",
    }
