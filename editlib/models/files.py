"""Writing so that nobody ever sees half a file, and the hash of a model's weights."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from editlib.errors import EditlibError, OutputError
from editlib.models.placement import stored_tensors


@contextmanager
def atomic_path(path: Path, *, private: bool = False) -> Iterator[Path]:
    """A temporary file beside `path` to write; synced and renamed onto it on success, removed otherwise.

    A `private` one keeps the mode that it was opened with."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if not private:
            _open_up(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    except EditlibError:
        raise
    except (OSError, SafetensorError) as error:  # safetensors has a kind of its own for a full disk
        raise OutputError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}; check the folder and the free space"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` to fill; renamed onto it on success, removed otherwise.

    Raises:
        OutputError: `path` is a file, a folder that is not empty (without `overwrite`), or cannot be written.
    """
    check_output(path, overwrite=overwrite)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _open_up(file)
                _sync(file)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    except EditlibError:
        raise
    except (OSError, SafetensorError) as error:  # safetensors has a kind of its own for a full disk
        raise OutputError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}; check the folder and the free space"
        ) from None
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)  # stopped between the two renames
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_output(path: Path, *, overwrite: bool = False) -> None:
    """Raises `OutputError` when `path` is no place for a new folder; call it before long work starts."""
    if path.exists() and not path.is_dir():
        raise OutputError(f"--out {path} is a file; give the name of a folder that does not exist yet")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise OutputError(f"--out {path} exists and is not empty; choose another folder or add --overwrite")


def _open_up(path: Path) -> None:
    """Makes a file as readable as any new one: safetensors writes 0600, whatever the umask says."""
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def weights_sha256(model: PreTrainedModel) -> str:
    """Hash over names, dtypes, shapes and bytes of all parameters and persistent buffers, in the order of their names.

    Does not depend on how a folder is sharded, on metadata in its files, or on what of the model is offloaded.
    """
    digest = hashlib.sha256()
    for name, tensor in stored_tensors(model):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        raw = tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor
        digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()


def save_model(model: PreTrainedModel, tok: PreTrainedTokenizerBase, folder: Path) -> None:
    """An ordinary Hugging Face folder: safetensors, configuration, generation settings and tokenizer."""
    with quiet_bars():
        model.save_pretrained(folder)
        tok.save_pretrained(folder)


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Keeps transformers' own loading and writing bars off stderr."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
