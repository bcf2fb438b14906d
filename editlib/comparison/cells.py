"""Measure one cell of a comparison: a method with a seed on a set, stored in parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from editlib.comparison.method import Method
from editlib.shelf import JsonStore

FORMAT = 1  # format version of results.json
AXES = ("forget", "retain")
SEARCH, EDIT = "search", "edit"


@dataclass(frozen=True)
class RunCell:
    """Holds one method with one seed on one set. `identity` determines the edited model; `parts` are its
    measurements."""

    set: str
    method: Method
    seed: int
    identity: Mapping[str, Any]
    shelf: JsonStore
    parts: tuple[str, ...]  # their keys

    @property
    def key(self) -> str:
        """The hash of the cell's identity, which is the name of its folder."""
        return self.shelf.path.name

    @property
    def label(self) -> str:
        """The cell's name in messages."""
        seed = f", seed {self.seed}" if self.method.seeded else ""
        return f"{self.set}, {self.method.label}{seed}"

    @property
    def complete(self) -> bool:
        """Whether the edit and all its measurements are stored."""
        return all(self.shelf.get(part) is not None for part in (EDIT, *self.parts))
