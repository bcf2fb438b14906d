"""Measured points of a long benchmark, one JSON object a line, kept as they are done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from editlib.models.files import atomic_path


def read_cells(path: Path) -> list[dict[str, Any]]:
    """The points of earlier runs; a line that was cut when its run was stopped is taken out of the file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole, end, cut = text.rpartition("\n")
    if cut:
        with atomic_path(path) as temporary:
            temporary.write_text(whole + end, encoding="utf-8")
    return [json.loads(row) for row in whole.split("\n") if row]


def append_cell(path: Path, cell: Mapping[str, Any]) -> None:
    """Adds one point."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(cell) + "\n")
