"""Store the folder of a chain on disk: checked by hashes when read, and intact after a kill at any moment.

`chain.json` names the files that belong to the chain. New files are written and synced next to the old ones, under
names that contain their hash. Replacing `chain.json` is the commit; files that it no longer names are removed after
it, or by the next writer.
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
from editlib.errors import ChainError, HparamsError, OutputError
from editlib.files import atomic_path, sync

log = logging.getLogger(__name__)
T = TypeVar("T")

RECORD, BATCHES, TOKEN, RETAIN, LOCK = "chain.json", "batches", "token.safetensors", "retain.jsonl", ".lock"
OURS = re.compile(r"\d{4,}-[0-9a-f]{12}\.safetensors|\..+\.tmp")
"""File names in `batches/` that only this module writes; any other file there belongs to the user."""


class Store:
    """Reads and writes one chain's folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def record(self) -> ChainRecord:
        """Reads `chain.json`.

        Raises:
            ChainError: no such file, or a damaged one.
        """
        path = self.path / RECORD
        if not path.is_file():
            raise ChainError(f"{self.path} is not a chain: it has no {RECORD}; start one with `editlib chain init`")
        return ChainRecord.from_bytes(_bytes(path), str(path))

    def read(self, name: str, wanted: str) -> bytes:
        """Reads a file of the chain and checks that its hash is `wanted`.

        Raises:
            ChainError: a missing or damaged file; names it.
        """
        path = self.path / name
        raw = _bytes(path)
        if sha256(raw) != wanted:
            raise ChainError(
                f"{path}: damaged: its hash is {sha256(raw)[:12]}, expected {wanted[:12]} ({RECORD}); restore it from "
                "a copy"
            )
        return raw

    def read_all(self, parse: Callable[[BatchEntry, bytes], T]) -> tuple[ChainRecord, list[T]]:
        """Reads and checks every file of the chain; returns the record, and `parse(entry, bytes)` of each batch.

        Needs no lock: if a writer replaced the chain meanwhile, the new one is read.
        """
        while True:
            record = self.record()
            try:
                for name, wanted in record.files.items():
                    self.read(name, wanted)
                return record, [parse(entry, self.read(entry.file, entry.sha256)) for entry in record.batches]
            except ChainError:
                if self.record() == record:
                    raise

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Holds the chain's lock inside the block; first removes files that a killed writer left.

        The operating system releases the lock when its process ends.

        Raises:
            ChainError: another process is writing.
            OutputError: the folder cannot be written.
        """
        self.record()  # no lock file in a folder that is not a chain
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
        """Writes a batch that no record names yet; returns its file's name and hash."""
        digest = sha256(raw)
        name = f"{BATCHES}/{number:04d}-{digest[:12]}.safetensors"
        with atomic_path(self.path / name) as temporary:
            temporary.write_bytes(raw)
        return name, digest

    def commit(self, record: ChainRecord) -> None:
        """Replaces the chain's record, in one step.

        Raises:
            OutputError: the file cannot be written; the chain is unchanged.
        """
        sync(self.path / BATCHES)  # the names of new batches are on disk before anything refers to them
        with atomic_path(self.path / RECORD) as temporary:
            temporary.write_bytes(record.to_bytes())
        sync(self.path)
        self._sweep()

    def discard(self) -> None:
        """Removes batches that were written but not committed."""
        self._sweep()

    def size(self, entry: BatchEntry) -> int:
        """Returns the size of a batch's file, in bytes."""
        return (self.path / entry.file).stat().st_size

    def _sweep(self) -> None:
        named = {Path(entry.file).name for entry in self.record().batches}
        ours = [path for path in (self.path / BATCHES).glob("*") if OURS.fullmatch(path.name)]
        ours += self.path.glob(f".{RECORD}.*.tmp")
        for path in ours:
            if path.name not in named:
                try:
                    path.unlink()
                except OSError as error:  # it takes space but is harmless
                    log.debug("cannot remove %s: %s", path, error)


def create_folder(folder: Path, record: ChainRecord) -> None:
    """Completes the `folder` of a new chain, which holds token and retain prompts already."""
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
    """Summarises a chain and its batches, JSON-ready.

    `ratio` is the norm of a batch's update divided by the norm of the weight before it, in the layer where it is
    largest.
    """
    try:
        layers = sorted(record.settings.edited_layers)
    except HparamsError as error:
        raise ChainError(f"{store.path}: {error}; restore chain.json from a copy") from None
    batches = [
        {
            "number": entry.number,
            "time": entry.time,
            "editlib": entry.editlib,
            "ids": list(entry.ids),
            "keys": entry.keys,
            "ratio": max(float(layer["ratio"]) for layer in entry.layers.values()),
            "file": entry.file,
            "left_out": {name: list(rows) for name, rows in entry.left_out.items()},
            "guessed_subjects": dict(entry.guessed_subjects),
            "bytes": store.size(entry),
        }
        for entry in record.batches
    ]
    return {
        "path": str(store.path),
        "created": record.created,
        "base": {key: record.base[key] for key in ("name", "sha256", "dtype")},
        "algorithm": record.algorithm,
        "layers": layers,
        "seed": record.seed,
        "requests": len(record.ids),
        "bytes": sum(batch["bytes"] for batch in batches),
        "batches": batches,
        "revoked": [
            {"time": revocation.time, "ids": list(revocation.ids), "batches": list(revocation.batches)}
            for revocation in record.revoked
        ],
    }
