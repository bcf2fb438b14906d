"""The Hugging Face Hub: asked quietly, and only its cache where it is out of reach."""

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

ADAPTER_FILES = ("adapter_*", "*.json", "*.jinja", "*.model", "*.txt")  # of an adapter's own: no checkpoints, no logs


@cache
def in_reach() -> bool:
    """Whether the Hub can be asked at all: its host has an address, or a proxy is set. Without this its
    library tries for half a minute."""
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
    """The options of `from_pretrained` by which a model that was loaded before is found without the Hub."""
    return {} if in_reach() else {"local_files_only": True}


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keeps the library's warnings of every try off stderr: what goes wrong is said in one line of ours."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def hub_file(name: str, file: str) -> Path | None:
    """A file of the Hub's model `name`, fetched into its cache; `None` where there is none, or it cannot be asked."""
    from huggingface_hub import hf_hub_download

    try:
        with quiet_hub():
            return Path(hf_hub_download(name, file, **reading()))
    except (OSError, ValueError):  # no such repository or file in it, no access, no network, no id at all
        return None


def adapter_folder(name: str) -> Path:
    """The folder of an adapter on the Hub, fetched into its cache.

    Raises:
        OSError: the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    with quiet_hub():
        return Path(snapshot_download(name, allow_patterns=list(ADAPTER_FILES), **reading()))
