"""Define one request to edit or forget a fact."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from editlib.errors import quote
from editlib.requests.fields import OWN_FIELDS, FieldError
from editlib.requests.templates import Filled, fill, spelling_in, template_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probe:
    """Holds a prompt with its expected answer."""

    prompt: str
    answer: str | None = None


@dataclass(frozen=True)
class EditRequest:
    """Describes a fact to edit (with `target_new`) or to unlearn (without).

    `prompt` holds one `{}` in the place of the subject; a prompt that spells the subject out once is turned into that
    form, and a subject with other accents or apostrophes into its spelling there. A phrasing may also spell it in
    another case, without its article or its accents. `{}` decides where the subject is
    there more than once; braces that are only braces: see `editlib.requests.templates`. Without a subject the prompt is
    plain text. `answer` and `aliases` are the truth, used to score. Lists become tuples; a neighbour may be a `Probe`,
    a dict or a bare prompt.

    Raises:
        RequestError: a field of the wrong type, empty, or at odds with the others.
    """

    id: str
    prompt: str
    subject: str | None = None
    target_new: str | None = None
    answer: str | None = None
    aliases: tuple[str, ...] = ()
    phrasings: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Probe, ...] = ()
    group: str | None = None
    relation: str | None = None
    source: str = field(default="", compare=False)
    _asked: Filled = field(init=False, repr=False, compare=False)
    _phrasings: tuple[Filled, ...] = field(init=False, repr=False, compare=False)
    _paraphrases: tuple[Filled, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            self._check()
        except FieldError as error:
            raise FieldError(error.name, error.text, self.source or f"request {quote(self.id)}") from None

    def _check(self) -> None:
        _check_text("id", self.id)
        _check_text("prompt", self.prompt)
        for name in ("subject", "answer", "target_new", "group", "relation"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        for name in ("aliases", "phrasings", "paraphrases", "neighbours"):
            if not isinstance(getattr(self, name), (list, tuple)):
                raise FieldError(name, f"{quote(getattr(self, name))}; expected a list; put it in [ ]")
            self._set(name, tuple(getattr(self, name)))
        self._set("neighbours", tuple(_probe(f"neighbours[{i}]", p) for i, p in enumerate(self.neighbours)))
        if self.subject is not None:
            self._set("subject", spelling_in(self.prompt, self.subject))
            self._set("prompt", template_of(self.prompt, self.subject))
        self._set("_asked", fill("prompt", self.prompt, self.subject))
        for name in ("aliases", "phrasings", "paraphrases"):
            for i, text in enumerate(getattr(self, name)):
                _check_text(f"{name}[{i}]", text)
        for name in ("phrasings", "paraphrases"):
            texts = enumerate(getattr(self, name))
            self._set(f"_{name}", tuple(fill(f"{name}[{i}]", text, self.subject, otherwise=True) for i, text in texts))
        for i, text in enumerate(self._phrasings if self.subject else ()):
            if text.start is None:
                wanted = f"{quote(self.subject)} once, or {{}} in its place, since the edit looks it up there"
                raise FieldError(f"phrasings[{i}]", f"{quote(text.text)}; expected {wanted}; rephrase it")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen for everyone but __post_init__

    @property
    def question(self) -> str:
        """The prompt with the subject filled in."""
        return self._asked.text

    @property
    def subject_start(self) -> int | None:
        """The index in `question` of the subject's first character; `None` without a subject."""
        return self._asked.start

    @property
    def filled_wordings(self) -> tuple[Filled, ...]:
        """The question and the further phrasings that an edit uses, with the position and spelling of the subject in
        each."""
        return (self._asked, *self._phrasings)

    @property
    def topic(self) -> str | None:
        """The topic of the request: its group, else its subject."""
        return self.group or self.subject

    @property
    def wordings(self) -> tuple[str, ...]:
        """The question and the further phrasings that an edit uses, with the subject filled in; the question first."""
        return (self.question, *self.filled_phrasings)

    @property
    def filled_phrasings(self) -> tuple[str, ...]:
        """The further phrasings that an edit uses, with the subject filled in."""
        return tuple(filled.text for filled in self._phrasings)

    @property
    def filled_paraphrases(self) -> tuple[str, ...]:
        """The paraphrases with the subject filled in."""
        return tuple(filled.text for filled in self._paraphrases)

    def to_dict(self) -> dict[str, Any]:
        """Returns the request as one JSON object of the own format: no empty fields, no `source`."""
        out: dict[str, Any] = {}
        for name in OWN_FIELDS:
            value = getattr(self, name)
            if name == "neighbours":
                value = [{k: v for k, v in vars(probe).items() if v is not None} for probe in value]
            if value:
                out[name] = list(value) if isinstance(value, tuple) else value
        return out


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        given = "missing" if value is None else quote(value)
        if name == "answer" and isinstance(value, list):
            raise FieldError(name, f'{given}; expected one string; write the others under "aliases"')
        raise FieldError(name, f"{given}; expected a string; write the text in quotes")
    if not value.strip():
        raise FieldError(name, f"{quote(value)} is empty; expected some text; write it or remove the field")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        text = f"{quote(value)} holds half a surrogate pair; expected Unicode text; fix the \\u escape"
        raise FieldError(name, text) from None


def _probe(name: str, value: Any) -> Probe:
    if isinstance(value, Probe):
        value = vars(value)
    elif isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, Mapping):
        raise FieldError(name, f'{quote(value)}; expected {{"prompt": ..., "answer": ...}}; write an object')
    for key in value.keys() - {"prompt", "answer"}:
        raise FieldError(f"{name}.{key}", 'unknown; expected "prompt" or "answer"; rename it or remove it')
    _check_text(f"{name}.prompt", value.get("prompt"))
    if value.get("answer") is not None:
        _check_text(f"{name}.answer", value["answer"])
    return Probe(value["prompt"], value.get("answer"))
