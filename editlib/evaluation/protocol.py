"""Define the interface of the evaluation protocols of `editlib eval`."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from editlib.models.loaded import LoadedModel
from editlib.models.prompts import PromptFormat
from editlib.requests.request import EditRequest


@dataclass(frozen=True, kw_only=True)
class NamedModel(LoadedModel):
    """Adds to a loaded model its name, the hash of its weights, and the receipt of its edit if it was edited."""

    name: str
    sha256: str
    receipt: Mapping[str, Any] | None = None


class Protocol(typing.Protocol):
    """Defines an evaluation protocol: which questions are asked and how answers are scored.

    Reusable for several edited models of one base model, whose answers it caches.
    """

    name: str

    @property
    def requests(self) -> Sequence[EditRequest]:
        """All requests that may be forgotten."""
        ...

    def check(self, model: PreTrainedModel, form: PromptFormat) -> None:
        """Raises `RequestError` for a question that is longer than the positions of the base model, which may be an
        outline."""
        ...

    def measure(
        self, base: NamedModel, edited: NamedModel, requests: Sequence[EditRequest], kept: Sequence[EditRequest] = ()
    ) -> dict[str, Any]:
        """Measures both models, with `requests` as the facts to be forgotten; returns a JSON-ready dict.

        Args:
            requests: a part of the protocol's own requests.
            kept: other requests of the protocol, which should be kept.
        """
        ...

    def headline(self, metrics: Mapping[str, Any]) -> dict[str, float | None]:
        """Picks the numbers of the edited model to follow over the batches of a chain, by name."""
        ...

    def table(self, metrics: Mapping[str, Any]) -> list[list[str]]:
        """Builds a table for a terminal: the head, then the rows."""
        ...

    def note(self, metrics: Mapping[str, Any]) -> str:
        """Returns a note on what the table omits, such as unusable questions; may be empty."""
        ...

    def write(self, metrics: Mapping[str, Any], out: Path) -> None:
        """Writes `metrics.json` and pages to the existing folder `out`."""
        ...

    def finish(self) -> None:
        """Writes results for later runs, such as the base model's answers, if the user asked for them."""
        ...
