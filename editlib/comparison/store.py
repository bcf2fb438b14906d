"""What is done, kept part by part under the hash of all that decides it; whole files only, and one worker at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from editlib.errors import OutputError
from editlib.models.files import atomic_path

FAILED = "failed"


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


class Store:
    """The shelves of one comparison: `cells/<hash>/`, `sets/<hash>/`, `searches/<hash>/`."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def cell(self, identity: Mapping[str, Any]) -> Shelf:
        """The shelf of a cell; `identity` decides what stands in it."""
        return Shelf(self.root / "cells" / digest(identity)[:24])

    def set(self, identity: Mapping[str, Any]) -> Shelf:
        return Shelf(self.root / "sets" / digest(identity)[:24])

    def search(self, identity: Mapping[str, Any]) -> Shelf:
        return Shelf(self.root / "searches" / digest(identity)[:24])


@contextmanager
def taken(shelf: Shelf, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process has the shelf to itself inside the block; a process that died holds nothing.

    Args:
        wait: until it is free.
    """
    make_folder(shelf.path)
    lock = FileLock(str(shelf.path / ".lock"))
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def make_folder(path: Path) -> None:
    """Raises `OutputError` where that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; check the folder") from None
