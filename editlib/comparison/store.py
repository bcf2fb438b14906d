"""Keep finished parts under the hash of everything that determines them; whole files only, one worker at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from editlib.files import make_folder
from editlib.shelf import JsonStore, digest

FAILED = "failed"


class ResultStore:
    """Finds the shelves of one comparison: `cells/<hash>/`, `sets/<hash>/`, `searches/<hash>/`."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def cell(self, identity: Mapping[str, Any]) -> JsonStore:
        """Returns the shelf of a cell; `identity` decides which one."""
        return JsonStore(self.root / "cells" / digest(identity)[:24])

    def set(self, identity: Mapping[str, Any]) -> JsonStore:
        return JsonStore(self.root / "sets" / digest(identity)[:24])

    def search(self, identity: Mapping[str, Any]) -> JsonStore:
        return JsonStore(self.root / "searches" / digest(identity)[:24])


@contextmanager
def try_lock(shelf: JsonStore, *, wait: bool = False) -> Iterator[bool]:
    """Yields whether this process has locked the shelf for the block; a process that died holds no lock.

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
