"""Write files and folders atomically, so that no half-written one is ever visible."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from editlib.errors import EditlibError, OutputError

log = logging.getLogger(__name__)

CANNOT_SYNC = {errno.EBADF, errno.EINVAL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTSUP, errno.ENOSYS}
"""Error numbers of systems that cannot sync such a handle, in contrast to a failed disk."""


@contextmanager
def atomic_path(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Yields a temporary file beside `path` to write; synced and renamed onto it on success, removed otherwise.

    A `private` one keeps the mode with which it was opened."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _one_line_errors(path):
        try:
            yield temporary
            if not private:
                _open_up(temporary)
            sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `path` to fill; renamed onto it on success, removed otherwise.

    Raises:
        OutputError: `path` is a file, a folder that is not empty (without `overwrite`), or cannot be written.
    """
    check_output(path, overwrite=overwrite)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    with _one_line_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _open_up(file)
                    sync(file)
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
        finally:
            if old.exists() and not path.exists():
                os.replace(old, path)  # stopped between the two renames
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    """Turns the system's error about a file that cannot be written into an `OutputError` of one line."""
    try:
        yield
    except EditlibError:
        raise
    except (OSError, SafetensorError) as error:  # safetensors has its own class for a full disk
        raise OutputError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}; check the folder and the free space"
        ) from None


def check_output(path: Path, *, overwrite: bool = False, inputs: Iterable[str | Path | None] = ()) -> None:
    """Raises `OutputError` if no new folder can be written at `path`, or if replacing it would delete one of `inputs`
    (files, folders, or names of models); call it before long work."""
    if path.exists() and not path.is_dir():
        raise OutputError(f"--out {path} is a file; give the name of a folder that does not exist yet")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise OutputError(f"--out {path} exists and is not empty; choose another folder or add --overwrite")
    if path.is_dir() and overwrite:
        _check_replaceable(path)
        _check_spares(path, inputs)
    check_parents(path)


def _check_replaceable(path: Path) -> None:
    """Raises `OutputError` for a folder that must never be replaced: one that contains the working directory, the
    user's home or a repository."""
    whole = path.resolve()
    if whole in (Path.cwd(), *Path.cwd().parents) or whole in (Path.home(), *Path.home().parents):
        raise OutputError(f"--out {path} holds the working directory or your home; give a folder of its own")
    if (path / ".git").exists():
        raise OutputError(
            f"--out {path} holds a repository (.git), which --overwrite would delete; give another folder"
        )


def _check_spares(path: Path, inputs: Iterable[str | Path | None]) -> None:
    """Raises `OutputError` if one of `inputs` is in the folder that will be replaced, or is that folder."""
    whole = path.resolve()
    for given in inputs:
        if (
            given is not None
            and os.path.exists(given)
            and whole in (Path(given).resolve(), *Path(given).resolve().parents)
        ):
            what = "is" if whole == Path(given).resolve() else "holds"
            raise OutputError(f"--out {path} {what} {given}, which is read here; give another folder, or move it first")


def make_folder(path: Path) -> None:
    """Raises `OutputError` where that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; check the folder") from None


def check_folder(path: Path, option: str = "--out", *, write: bool = True) -> None:
    """Raises `OutputError` if `path` is neither a usable folder nor can become one; call it before long work.

    Args:
        write: files will be written to it; otherwise a read-only folder is accepted.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{option} {path} is a file; give the name of a folder")
    if not path.exists():
        check_parents(path)
    elif write and not os.access(path, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {path}: no permission; choose another folder")


def check_parents(path: Path) -> None:
    """Raises `OutputError` if nothing can be created at `path`: a parent is a file, or may not be written."""
    above = next(folder for folder in path.absolute().parents if folder.exists() or not folder.name)
    if not above.is_dir():
        raise OutputError(f"cannot write {path}: {above} is not a folder; choose another folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {path}: no permission to write {above}; choose another folder")


def check_room(path: Path, needed: int) -> None:
    """Raises `OutputError` if the disk of `path` has fewer than `needed` bytes free; call it before long work."""
    above = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists() or not folder.name)
    try:
        free = shutil.disk_usage(above).free
    except OSError as error:  # a system that does not report it
        log.debug("free space of %s: %s", above, error)
        return
    if free < needed:
        raise OutputError(
            f"cannot write {path}: it takes {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free; free some space, "
            "or choose another disk"
        )


def _open_up(path: Path) -> None:
    """Makes a file as readable as any new one: safetensors writes 0600, whatever the umask says."""
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on disk; skipped on a system that cannot do that.

    Windows cannot sync a folder, and a file only if it is writable; some network drives cannot sync at all.

    Raises:
        OSError: the disk failed.
    """
    try:
        handle = _opened(path)
    except PermissionError as error:
        log.debug("%s is not synced: %s", path, error)
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
        log.debug("%s is not synced: %s", path, error)
    finally:
        os.close(handle)


def _opened(path: Path) -> int:
    binary = getattr(os, "O_BINARY", 0)  # Windows would open it in text mode
    if path.is_dir():
        return os.open(path, os.O_RDONLY | binary)
    try:
        return os.open(path, os.O_RDWR | binary)
    except PermissionError:  # a file that is read-only already
        return os.open(path, os.O_RDONLY | binary)


def check_file(path: Path, *, overwrite: bool = False) -> None:
    """Raises `OutputError` if no new file can be written at `path`; call it before long work."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file that does not exist yet")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists; choose another name or add --overwrite")
    check_parents(path)


def write_json(path: Path, value: Any, *, sort_keys: bool = False) -> None:
    """Writes a JSON file, atomically. Numbers that JSON does not have (NaN, infinities) become `null`.

    Raises:
        OutputError: it cannot be written.
    """
    layout = partial(json.dumps, indent=1, ensure_ascii=False, allow_nan=False, sort_keys=sort_keys)
    try:
        text = layout(value)
    except ValueError:
        text = layout(_finite(value))
    make_folder(path.parent)
    with atomic_path(path) as temporary:
        temporary.write_bytes((text + "\n").encode("utf-8", "replace"))  # a model may write half a surrogate pair


def _finite(value: Any) -> Any:
    """Returns the value with `None` in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
