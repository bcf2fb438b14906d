"""Finished results kept in files: JSON parts under the hash of their job, and points a line each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editlib.errors import OutputError
from editlib.files import atomic_path


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON value, the same on every machine and in every run."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


@dataclass(frozen=True)
class Shelf:
    """A folder of parts, each a JSON file; what of it is damaged counts as not there."""

    path: Path

    def get(self, part: str) -> dict[str, Any] | None:
        try:
            value = json.loads(self._file(part).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def put(self, part: str, value: Mapping[str, Any]) -> None:
        """Raises `OutputError` where the folder cannot be written."""
        text = json.dumps(value, ensure_ascii=False)
        make_folder(self.path)
        with atomic_path(self._file(part)) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def drop(self, part: str) -> None:
        self._file(part).unlink(missing_ok=True)

    def empty(self, *but: str) -> None:
        """Takes everything out but these parts."""
        kept = {self._file(part).name for part in but}
        for file in self.path.glob("*.json"):
            if file.name not in kept:
                file.unlink()

    def _file(self, part: str) -> Path:
        return self.path / f"{part}.json"


def make_folder(path: Path) -> None:
    """Raises `OutputError` where that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; check the folder") from None


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
