"""Find a model by its name and read its configuration, before any weight is loaded."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from editlib.errors import EditlibError, ModelError, closest
from editlib.models.adapters import CONFIG as ADAPTER
from editlib.models.adapters import base_of, is_adapter
from editlib.models.folder_faults import (
    GENERATION,
    FolderPart,
    LoadWarnings,
    config_fault,
    fault_of,
    load_warnings,
    object_fault,
    reason_of,
)
from editlib.models.hub import hub_file, quiet_hub, reading
from editlib.models.packaged.catalogue import PACKAGED
from editlib.models.packaged.fetch import fetch
from editlib.models.weights import quiet_bars

log = logging.getLogger(__name__)

AGAIN = "fix it, or download the model again"  # what to do about a damaged file


@dataclass(frozen=True)
class Source:
    """Names the origin of a model: its name, its folder or id, configuration, and options of `from_pretrained`."""

    name: str
    path: str
    config: PreTrainedConfig
    options: Mapping[str, Any]

    @classmethod
    def of(
        cls, name: str, *, revision: str | None = None, trust_remote_code: bool = False, progress: bool = True
    ) -> Source:
        """Finds a model that is not an adapter, and reads its configuration.

        Raises:
            ModelError, FetchError: see `loading.load`.
        """
        path = str(fetch(name, progress=progress)) if is_packaged(name) else name
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        options = {key: value for key, value in options.items() if value} | read_options(path)
        config = _checked_config(path, name, options)
        # transformers silently ignores a damaged file of generation settings
        if os.path.isdir(path) and (wrong := object_fault(Path(path) / GENERATION)):
            raise ModelError(f"{name} cannot be loaded: {GENERATION}: {wrong}; {AGAIN}")
        return cls(name, path, config, options)


def adapter_of(name: str) -> Path | None:
    """Returns the folder with the config of the adapter `name`, a local folder or an id on the Hub; `None` for a model.

    From the Hub only the adapter's config is fetched, and only if there is no model of this name.
    """
    if os.path.exists(name) or is_packaged(name):
        return Path(name) if is_adapter(name) else None
    return _hub_adapter(name)


@cache
def _hub_adapter(name: str) -> Path | None:
    """Fetches the config of an adapter on the Hub and returns its folder; asked once for each name."""
    if hub_file(name, "config.json") is not None:
        return None
    config_file = hub_file(name, ADAPTER)
    return None if config_file is None else config_file.parent


def model_of(name: str) -> str:
    """Returns the base model of an adapter; any other model itself.

    Raises:
        ModelError: an adapter that names no base, or an adapter of an adapter.
    """
    folder = adapter_of(name)
    if folder is None:
        return name
    base = base_of(folder)
    if adapter_of(base) is not None:
        raise ModelError(f"{name} is an adapter of {base}, an adapter itself; merge that into its model first")
    return base


def check_model(name: str) -> None:
    """Raises `ModelError` for a missing model or a kind that cannot be edited; call it before long work.

    Reads the configuration only, no weights.
    """
    read_config(name)


def check_models(*names: str) -> None:
    """Runs `check_model` on each of several models."""
    for name in names:
        check_model(name)


def read_config(name: str) -> PreTrainedConfig | None:
    """Reads the configuration of the model that `loading.load` would load, without its weights.

    `None` for a packaged model, which may not be fetched yet.

    Raises:
        ModelError: a missing model, or a kind that cannot be edited.
    """
    name = model_of(name)
    return None if is_packaged(name) else _checked_config(name, name, read_options(name))


def read_options(path: str) -> dict[str, Any]:
    """Returns the options with which `from_pretrained` reads `path`.

    None for a local folder; an id is looked for in the cache alone when the Hub cannot be reached.
    """
    return {} if os.path.exists(path) else reading()


def read_config_file(path: str) -> PreTrainedConfig:
    """Reads the configuration in a JSON file of any name.

    Raises:
        ModelError: not a configuration, or one of a kind that cannot be edited.
    """
    with one_line_errors(path), quiet_bars(), load_warnings():
        if not isinstance(json.loads(Path(path).read_text(encoding="utf-8")), dict):
            raise ValueError("not a JSON object")
        config: PreTrainedConfig = AutoConfig.from_pretrained(path)
        _check_config(config, path)
    return config


def is_packaged(name: str) -> bool:
    """Returns whether `name` is a packaged model and not a folder in the working directory."""
    return name in PACKAGED and not os.path.isdir(name)


def _checked_config(path: str, name: str, options: dict[str, Any]) -> PreTrainedConfig:
    _check_folder(path)
    with one_line_errors(name, path, "config"), quiet_bars(), quiet_hub():
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, **options)
        _check_config(config, name)
    return config


def _check_folder(path: str) -> None:
    """Raises `ModelError` for a path that holds no model, before transformers takes it for an id on the Hub."""
    if not path:
        raise ModelError(f"the model has no name; give a folder, a Hugging Face id or one of {', '.join(PACKAGED)}")
    exists = os.path.exists(path)  # false for a name that is too long for a file, too
    if not exists and path.startswith((".", "/", "~")):
        raise ModelError(f"{path}: no such folder; give one written by save_pretrained, or a model id")
    if not exists and "/" not in path and closest(path, PACKAGED, cutoff=0.8):
        raise ModelError(f"{path}: no such folder, and no packaged model, which are {', '.join(PACKAGED)}")
    if os.path.isfile(path):
        raise ModelError(f"{path} is a file; give the folder that holds config.json and the weights")
    if exists and not os.path.isfile(os.path.join(path, "config.json")):
        raise ModelError(f"{path} holds no config.json; give a folder written by save_pretrained, or a model id")


def _check_config(config: PreTrainedConfig, name: str) -> None:
    """Raises `ModelError` for a configuration that is damaged, or of a kind of model that cannot be edited."""
    if wrong := config_fault(config):
        where = name if os.path.isfile(name) else f"{name}, config.json"
        raise ModelError(f"{where}: {wrong}; {AGAIN}")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder model; editlib edits decoder-only causal language models")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{name} has quantised weights; give the unquantised model, since an edit needs full weights")


@contextlib.contextmanager
def one_line_errors(
    name: str,
    path: str | None = None,
    part: FolderPart | None = None,
    warned: LoadWarnings | None = None,
    config: PreTrainedConfig | None = None,
) -> Iterator[None]:
    """Turns any exception of transformers into a `ModelError` of one line that names the damaged file.

    Exceptions of every class are caught: a damaged file raises different ones, depending on where it is first used.

    Args:
        path: the folder of the model `name`, if there is one; its files of the kind `part` are checked.
        warned: the warnings of transformers while it loaded.
        config: the model's configuration, which may be the cause.
    """
    try:
        yield
    except EditlibError:
        raise
    except Exception as error:
        log.debug("", exc_info=True)
        reason = reason_of(error)
        if path is not None and part is not None and os.path.isdir(path) and not _is_lack(error):
            fault = fault_of(Path(path), part)
            if fault is None and warned is not None and warned.mismatch:
                fault = "the weights", warned.mismatch
            if fault is None and part == "tokenizer":
                fault = "its tokenizer", reason
            if fault is None and (part == "config" or (config is not None and _cannot_be_built(config))):
                fault = "config.json", reason
            if fault is not None:
                raise ModelError(f"{name} cannot be loaded: {fault[0]}: {fault[1]}; {AGAIN}") from None
        known = ", ".join(PACKAGED)
        raise ModelError(
            f"{name} cannot be loaded ({reason}); give a local folder, a Hugging Face id (needs a network or its "
            f"cache), or a packaged model ({known})"
        ) from None


def _is_lack(error: Exception) -> bool:
    """Returns whether the cause is a missing package or too little memory, and not a file."""
    return isinstance(error, ImportError | MemoryError) or "memory" in str(error).lower()


def _cannot_be_built(config: PreTrainedConfig) -> bool:
    """Returns whether no model can be built from this configuration, whatever its weights."""
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception:
        return True
    return False
