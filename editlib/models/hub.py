"""Access the Hugging Face Hub without noise, or only its local cache if the Hub cannot be reached."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

ADAPTER_FILES = ("adapter_*", "*.json", "*.jinja", "*.model", "*.txt")  # without checkpoints and logs


@cache
def in_reach() -> bool:
    """Returns whether the Hub can be reached: its host has an address, or a proxy is set.

    Without this check the Hub's library retries for half a minute.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    address = urlsplit(constants.ENDPOINT)
    try:
        return bool(socket.getaddrinfo(address.hostname, address.port or 443))
    except OSError:
        return False


def reading() -> dict[str, Any]:
    """Returns the options of `from_pretrained`: if the Hub cannot be reached, only its local cache is searched."""
    return {} if in_reach() else {"local_files_only": True}


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keeps the library's warnings of every retry off stderr: the caller reports an error in one line."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def hub_file(name: str, file: str) -> Path | None:
    """Fetches a file of the Hub's model `name` into the cache; `None` if there is none or the Hub cannot be reached."""
    from huggingface_hub import hf_hub_download

    try:
        with quiet_hub():
            return Path(hf_hub_download(name, file, **reading()))
    except (OSError, ValueError):  # no such repository or file, no access, no network, or not an id
        return None


def adapter_folder(name: str) -> Path:
    """Fetches an adapter from the Hub into the cache, and returns its folder.

    Raises:
        OSError: the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    with quiet_hub():
        return Path(snapshot_download(name, allow_patterns=list(ADAPTER_FILES), **reading()))
