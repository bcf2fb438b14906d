"""The folder of a chain on disk: read with its hashes, written so that a kill at any moment leaves a whole chain.

`chain.json` says which files belong to the chain. New ones are written and synced beside the old, under names that
hold their hash; replacing `chain.json` is the one step that makes them count; what is no longer named is removed after
it, or at the next writing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from editlib.chain.record import BatchEntry, ChainRecord, sha256
from editlib.errors import ChainError, OutputError
from editlib.files import atomic_path, sync

log = logging.getLogger(__name__)
T = TypeVar("T")

RECORD, BATCHES, TOKEN, RETAIN, LOCK = "chain.json", "batches", "token.safetensors", "retain.jsonl", ".lock"
OURS = re.compile(r"\d{4,}-[0-9a-f]{12}\.safetensors|\..+\.tmp")
"""Names in `batches/` that only this module gives; anything else there is the user's."""


class Store:
    """One chain's folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def record(self) -> ChainRecord:
        """`chain.json`.

        Raises:
            ChainError: there is none, or it is damaged.
        """
        path = self.path / RECORD
        if not path.is_file():
            raise ChainError(f"{self.path} is no chain: it holds no {RECORD}; start one with `editlib chain init`")
        return ChainRecord.from_bytes(_bytes(path), str(path))

    def read(self, name: str, wanted: str) -> bytes:
        """A file of the chain whose hash must be `wanted`.

        Raises:
            ChainError: it is missing or damaged; names it.
        """
        path = self.path / name
        raw = _bytes(path)
        if sha256(raw) != wanted:
            raise ChainError(
                f"{path}: damaged: its hash is {sha256(raw)[:12]}, expected {wanted[:12]} ({RECORD}); restore it from "
                "a copy"
            )
        return raw

    def read_all(self, look: Callable[[BatchEntry, bytes], T]) -> tuple[ChainRecord, list[T]]:
        """The record and what `look` sees in each batch, every file of the chain checked.

        Needs no lock: when a writer replaced the chain meanwhile, the new one is read.
        """
        while True:
            record = self.record()
            try:
                for name, wanted in record.files.items():
                    self.read(name, wanted)
                return record, [look(entry, self.read(entry.file, entry.sha256)) for entry in record.batches]
            except ChainError:
                if self.record() == record:
                    raise

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The only writer, while it lasts; removes what a writer that was killed left behind.

        The lock is the operating system's and dies with its process.

        Raises:
            ChainError: another process writes.
            OutputError: the folder cannot be written.
        """
        self.record()  # never a lock file in a folder that is no chain
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ChainError(f"{self.path} is being written by another process; try again when it is done") from None
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror or error}; check the folder") from None
        try:
            self._sweep()
            yield
        finally:
            lock.release()

    def write_batch(self, number: int, raw: bytes) -> tuple[str, str]:
        """Writes a batch that no record names yet; its file and hash."""
        digest = sha256(raw)
        name = f"{BATCHES}/{number:04d}-{digest[:12]}.safetensors"
        with atomic_path(self.path / name) as temporary:
            temporary.write_bytes(raw)
        return name, digest

    def commit(self, record: ChainRecord) -> None:
        """Makes `record` the chain's, in one step.

        Raises:
            OutputError: it cannot be written; the chain is what it was.
        """
        sync(self.path / BATCHES)  # the names of new batches are on disk before anything refers to them
        with atomic_path(self.path / RECORD) as temporary:
            temporary.write_bytes(record.to_bytes())
        sync(self.path)
        self._sweep()

    def discard(self) -> None:
        """Removes batches that were written and will not be committed."""
        self._sweep()

    def size(self, entry: BatchEntry) -> int:
        """Bytes of a batch's file."""
        return (self.path / entry.file).stat().st_size

    def _sweep(self) -> None:
        named = {Path(entry.file).name for entry in self.record().batches}
        found = [path for path in (self.path / BATCHES).glob("*") if OURS.fullmatch(path.name)]
        found += self.path.glob(f".{RECORD}.*.tmp")
        for path in found:
            if path.name not in named:
                try:
                    path.unlink()
                except OSError as error:  # it takes room and does no harm
                    log.debug("cannot remove %s: %s", path, error)


def create_folder(folder: Path, record: ChainRecord) -> None:
    """Fills a new chain's `folder`; token and retain prompts lie there already."""
    (folder / BATCHES).mkdir()
    (folder / LOCK).touch()
    (folder / RECORD).write_bytes(record.to_bytes())


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ChainError(f"{path}: missing; restore it from a copy") from None
    except OSError as error:
        raise ChainError(f"{path}: cannot be read ({error.strerror}); check the file") from None


def summary(store: Store, record: ChainRecord) -> dict[str, Any]:
    """JSON-ready: what the chain is made of, and per batch who was asked about, when, and how large the change was.

    `ratio` is the norm of a batch's update over the norm of the weight before, in the layer where that is largest.
    """
    batches = [
        {
            "number": entry.number,
            "time": entry.time,
            "editlib": entry.editlib,
            "ids": list(entry.ids),
            "keys": entry.keys,
            "ratio": max(float(layer["ratio"]) for layer in entry.layers.values()),
            "file": entry.file,
            "bytes": store.size(entry),
        }
        for entry in record.batches
    ]
    return {
        "path": str(store.path),
        "created": record.created,
        "base": {key: record.base[key] for key in ("name", "sha256", "dtype")},
        "algorithm": record.algorithm,
        "layers": sorted(int(layer) for layer in record.base["layers"]),
        "seed": record.seed,
        "requests": len(record.ids),
        "bytes": sum(batch["bytes"] for batch in batches),
        "batches": batches,
        "revoked": [{"time": one.time, "ids": list(one.ids), "batches": list(one.batches)} for one in record.revoked],
    }
