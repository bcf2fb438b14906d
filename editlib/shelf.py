"""Store finished results in files: JSON parts under the hash of their job, and points, one per line."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from editlib.errors import OutputError, quote
from editlib.files import atomic_path, check_output, make_folder, write_json

T = TypeVar("T")
FINISHED = "finished"
SEAL = "content_sha256"


def digest(value: Any) -> str:
    """Computes the SHA-256 (hex) of a JSON value, the same on every machine and in every run."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def read_kept(path: Path) -> dict[str, Any] | None:
    """Reads the JSON object in a file that an earlier run wrote; a damaged file counts as missing."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def differing(kept: Mapping[str, Any], job: Mapping[str, Any]) -> str:
    """Lists the keys in which the job of an earlier run differs, for a message."""
    return ", ".join(sorted(key for key in {*kept, *job} if kept.get(key) != job.get(key)))


def check_same_job(
    folder: Path, kept: Mapping[str, Any] | None, job: Mapping[str, Any], *, held: str, remedy: str
) -> None:
    """Raises `OutputError` with the differing keys if `folder` holds results of another job than `job`.

    Args:
        kept: the job of the results in `folder`; `None`: there are none.
        held: name of these results in the message.
    """
    if kept is not None and (what := differing(kept, job)):
        raise OutputError(f"{folder} holds {held} (other {what}); {remedy}")


def from_json(kind: type[T], values: object) -> T:
    """Builds the dataclass `kind` from a JSON object, without converting anything.

    Raises:
        TypeError: not an object, an unknown or missing field, or a value of another type than the field's.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{quote(values)} is not an object")
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name in hints and not _is_a(value, hints[name]):
            raise TypeError(f"{name} is {quote(value)}")
    return kind(**values)


def _is_a(value: object, hint: Any) -> bool:
    """Returns whether a value read from JSON is of a field's type; the content of mappings is not checked."""
    if hint is Any:
        return True
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is_a(value, kind) for kind in inner)
    if origin is tuple:
        each = inner if inner[-1] is not ... else [inner[0]] * len(value) if isinstance(value, list | tuple) else ()
        return (
            isinstance(value, list | tuple)
            and len(value) == len(each)
            and all(_is_a(item, of) for item, of in zip(value, each, strict=True))
        )
    wanted = origin or hint
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, wanted) and (wanted is not int or not isinstance(value, bool))


@dataclass(frozen=True)
class JsonStore:
    """Stores parts in a folder, each as a JSON file; damaged parts count as missing.

    Every file contains the hash of its content, so a part that was changed counts as damaged, too. Files without a hash
    are accepted, since earlier versions wrote them.
    """

    path: Path

    def get(self, part: str) -> dict[str, Any] | None:
        kept = read_kept(self._file(part))
        if kept is None or SEAL not in kept:
            return kept
        return kept if kept.pop(SEAL) == digest(kept) else None

    def put(self, part: str, value: Mapping[str, Any]) -> None:
        """Raises `OutputError` if the folder cannot be written."""
        read_again = json.loads(json.dumps(value))  # as in `get`, keys become texts and tuples lists
        text = json.dumps({**read_again, SEAL: digest(read_again)}, ensure_ascii=False)
        make_folder(self.path)
        with atomic_path(self._file(part)) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def drop(self, part: str) -> None:
        self._file(part).unlink(missing_ok=True)

    def empty(self, *but: str) -> None:
        """Removes all parts except these."""
        kept = {self._file(part).name for part in but}
        for file in self.path.glob("*.json"):
            if file.name not in kept:
                file.unlink()

    def _file(self, part: str) -> Path:
        return self.path / f"{part}.json"


class Finished:
    """Stores measurements in the folder `out/finished`, each in its own file, found by the hash of its job.

    Args:
        out: the folder; `None`: nothing is stored.
        overwrite: measure everything again; also accept a folder with other content.

    Raises:
        OutputError: `out` is a file, or a folder with something else in it.
    """

    def __init__(self, out: Path | None, *, overwrite: bool = False) -> None:
        self.folder = None if out is None else out / FINISHED
        self.overwrite = overwrite
        if out is not None and not (out / FINISHED).is_dir():
            check_output(out, overwrite=overwrite)

    def find(self, job: Mapping[str, Any], read: Callable[[Mapping[str, Any]], T]) -> T | None:
        """Finds the result of an earlier run of the same job, converted from JSON by `read`; `None` if there is
        none."""
        if self.folder is None or self.overwrite:
            return None
        for path in sorted(self.folder.glob(f"*.{_short_digest(job)}.json")):  # the same job may have had another label
            try:
                kept = read_kept(path) or {}
                if kept["job"] == job:
                    return read(kept["measured"])
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
        return None

    def keep(self, label: str, job: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
        """Writes one measurement; its file name has the label for readers and the hash for lookup."""
        if self.folder is not None:
            name = re.sub(r"[^A-Za-z0-9.-]+", "-", label)[-60:].strip("-")
            write_json(self.folder / f"{name}.{_short_digest(job)}.json", {"job": job, "measured": measured})


def _short_digest(job: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]


def read_cells(path: Path, kind: type[T]) -> list[T]:
    """Reads the points of earlier runs; a last line that was cut off is removed from the file.

    Args:
        kind: the dataclass of a point.

    Raises:
        OutputError: the file has other content.
    """
    other = "not written by an earlier run; choose another --out, or remove the file"
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError):
        raise OutputError(f"{path}: {other}") from None
    whole, end, cut = text.rpartition("\n")
    try:
        points = [from_json(kind, json.loads(row)) for row in whole.split("\n") if row]
    except (ValueError, TypeError, RecursionError):
        raise OutputError(f"{path}: {other}") from None
    if cut:
        with atomic_path(path) as temporary:
            temporary.write_text(whole + end, encoding="utf-8")
    return points


def append_cell(path: Path, cell: Mapping[str, Any]) -> None:
    """Adds one point."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(cell) + "\n")
