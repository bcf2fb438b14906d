"""Measure one cell of a comparison: a method with a seed on a set, kept in parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from editlib.comparison.method import Method
from editlib.shelf import JsonStore

FORMAT = 1  # of results.json
AXES = ("forget", "retain")
SEARCH, EDIT = "search", "edit"


@dataclass(frozen=True)
class RunCell:
    """Holds one method with one seed on one set. `identity` is all that decides the edited model; `parts` are
    measured."""

    set: str
    method: Method
    seed: int
    identity: Mapping[str, Any]
    shelf: JsonStore
    parts: tuple[str, ...]  # their keys

    @property
    def key(self) -> str:
        """The hash of what decides the cell: the name of its file."""
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
