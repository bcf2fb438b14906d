"""Load a model and its tokenizer from a Hugging Face id, a local folder or a packaged model."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

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

from editlib.errors import EditlibError, ModelError, closest, quote
from editlib.models.adapters import CONFIG as ADAPTER
from editlib.models.adapters import base_of, is_adapter, merge
from editlib.models.anatomy import anatomy, check_kind
from editlib.models.folder_faults import (
    GENERATION,
    Part,
    Told,
    config_fault,
    fault_of,
    listening,
    missing_weights,
    object_fault,
    reason_of,
)
from editlib.models.hub import adapter_folder, hub_file, quiet_hub, reading
from editlib.models.packaged.catalogue import PACKAGED
from editlib.models.packaged.fetch import fetch
from editlib.models.placement import input_embedding
from editlib.models.weights import check_finite, quiet_bars

log = logging.getLogger(__name__)

DeviceMap = str | dict[str, Any] | None  # as `from_pretrained` takes it

SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")  # over all devices, by accelerate
_ANEW = "mend it, or download the model again"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name: str,
    *,
    dtype: str | None = None,
    device_map: DeviceMap = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
    tok: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a decoder-only model that can be edited, in eval mode, and its tokenizer.

    Args:
        name: a packaged model (`smollm2-135m`, fetched into the cache once), a local folder, or a Hugging Face id. A
            PEFT adapter is merged into its base.
        dtype: "float32", "bfloat16" or "float16"; `None` keeps the dtype the weights are stored in.
        device_map: a device, one of `SPREADS`, or a mapping of modules to devices; `None`: the CPU.
        tok: the tokenizer, if it is loaded already (`models.outline`); not for adapters.

    Raises:
        ModelError: no such model, no network, a kind that cannot be edited, a device that is not available, or
            weights that are not finite.
        FetchError: a packaged model that is neither cached nor can be downloaded.
    """
    check_dtype(dtype)
    if isinstance(device_map, str):
        check_device(device_map)
    if adapter_of(name) is not None:
        return _merged(name, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code, progress=progress)
    source = Source.of(name, revision=revision, trust_remote_code=trust_remote_code, progress=progress)
    tok = open_tokenizer(source) if tok is None else tok
    return open_weights(source, tok, dtype=dtype, device_map=device_map), tok


def check_dtype(dtype: str | None) -> None:
    """Raises `ModelError` for a dtype that no model is loaded in."""
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")


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
        """Finds a model that is no adapter, and reads its configuration.

        Raises:
            ModelError, FetchError: see `load`.
        """
        path = str(fetch(name, progress=progress)) if _packaged(name) else name
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        options = {key: value for key, value in options.items() if value} | _reading(path)
        config = _checked_config(path, name, options)
        # transformers leaves a damaged file of generation settings out in silence
        if os.path.isdir(path) and (wrong := object_fault(Path(path) / GENERATION)):
            raise ModelError(f"{name} cannot be loaded: {GENERATION}: {wrong}; {_ANEW}")
        return cls(name, path, config, options)


def open_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model, and tries it; raises `ModelError`."""
    with quiet_bars(), quiet_hub(), _one_line_errors(source.name, source.path, "tokenizer"):
        tok = AutoTokenizer.from_pretrained(source.path, **source.options)
        _try_tokenizer(tok)
    return cast(PreTrainedTokenizerBase, tok)


def open_weights(
    source: Source, tok: PreTrainedTokenizerBase, *, dtype: str | None = None, device_map: DeviceMap = None
) -> PreTrainedModel:
    """Loads the weights of a model, which its tokenizer must fit.

    Args:
        device_map: "meta" reads names and shapes only, and no numbers.

    Raises:
        ModelError: see `load`.
    """
    name, path = source.name, source.path
    # The search for an adapter has options of its own; without these it asks the Hub in vain for half a minute.
    extra: dict[str, Any] = {"adapter_kwargs": _reading(path)}
    extra |= {} if device_map is None else {"device_map": device_map}
    extra |= {"dtype": DTYPES.get(dtype or "", "auto"), "output_loading_info": True, **source.options}
    quiet = quiet_bars(), quiet_hub()
    with quiet[0], quiet[1], listening() as told, _one_line_errors(name, path, "weights", told, source.config):
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, **extra)
        model, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
        if info["missing_keys"]:  # transformers fills them with random numbers
            raise ModelError(f"{name} cannot be loaded: {missing_weights(info['missing_keys'])}; {_ANEW}")
        _check_ends(model, name)
        _check_vocabulary(model, tok, name)
        if device_map == "meta":
            check_kind(model)
        else:
            model = _ready(model, name)
    if unknown := info["unexpected_keys"]:
        log.info("%s: %d tensors are no part of the model and were left out (first %s)",
                 name, len(unknown), min(unknown))  # fmt: skip
    return model


def _try_tokenizer(tok: PreTrainedTokenizerBase) -> None:
    """Encodes a text: some settings of a wrong type fail only then."""
    if not isinstance(template := tok.chat_template, str | dict | None):
        raise ValueError(f"chat_template is {quote(template)}, expected a text")
    tok("a question", return_attention_mask=False)
    tok.decode([0])


def _check_ends(model: PreTrainedModel, name: str) -> None:
    """Raises `ModelError` if what ends an answer is no token id or list of them."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is not None and not all(type(end) is int for end in (ends if isinstance(ends, list) else [ends])):
        given = f"eos_token_id is {quote(ends)}, expected a number or a list of numbers"
        raise ModelError(f"{name} cannot be loaded: generation_config.json or config.json: {given}; {_ANEW}")


def _check_vocabulary(model: PreTrainedModel, tok: PreTrainedTokenizerBase, name: str) -> None:
    """Raises `ModelError` for the tokenizer of another model: its tokens would be outside the embedding.

    Tokens that were added to it are not counted: some models (Gemma 3) have one that their texts never hold.
    """
    rows = input_embedding(model).weight.shape[0]
    if tok.vocab_size > rows:
        raise ModelError(
            f"{name}: its tokenizer has {tok.vocab_size} tokens and its embedding {rows} rows; they belong to "
            "different models: give a folder in which they fit"
        )


def _merged(folder: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the model that an adapter was trained on, with `options`, and merges the adapter into its weights."""
    base = model_of(folder)
    log.info("%s is an adapter of %s: merged into its weights", folder, base)
    model, tok = load(base, **options)
    source = folder if is_adapter(folder) else None
    with _one_line_errors(folder, source, "adapter"), quiet_bars():
        model, tok = merge(model, tok, folder if is_adapter(folder) else adapter_folder(folder))
    return _ready(model, folder), tok


def _ready(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Puts `model` into eval mode, after a check that it can be edited and that its weights are finite."""
    check_finite(anatomy(model), name)  # `anatomy` raises for a kind that cannot be edited
    module: nn.Module = model
    module.eval()
    return model


def adapter_of(name: str) -> Path | None:
    """Returns the folder with the config of the adapter `name`, a local folder or an id on the Hub; `None` for a model.

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
    """Reads the configuration of the model that `load` would load, without its weights.

    `None` for a packaged model, which may not be fetched yet.

    Raises:
        ModelError: a missing model, or a kind that cannot be edited.
    """
    name = model_of(name)
    return None if _packaged(name) else _checked_config(name, name, _reading(name))


def _reading(path: str) -> dict[str, Any]:
    """Returns the options of `from_pretrained`: a local folder needs none, and a name none that asks the Hub in
    vain."""
    return {} if os.path.exists(path) else reading()


def read_config_file(path: str) -> PreTrainedConfig:
    """Reads the configuration in a JSON file of any name.

    Raises:
        ModelError: not a configuration, or one of a kind that cannot be edited.
    """
    with _one_line_errors(path), quiet_bars(), listening():
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
    with _one_line_errors(name, path, "config"), quiet_bars(), quiet_hub():
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
    if wrong := config_fault(config):
        where = name if os.path.isfile(name) else f"{name}, config.json"
        raise ModelError(f"{where}: {wrong}; mend it, or download the model again")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder model; editlib edits decoder-only causal language models")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{name} has quantised weights; give the unquantised model, since an edit needs full weights")


@contextlib.contextmanager
def _one_line_errors(
    name: str,
    path: str | None = None,
    part: Part | None = None,
    told: Told | None = None,
    config: PreTrainedConfig | None = None,
) -> Iterator[None]:
    """Turns what transformers raises, often of many lines, into a `ModelError` of one that names the file at fault.

    Every class of exception: a damaged file is noticed deep inside transformers or its libraries, as whatever comes of
    it there.

    Args:
        path: the folder of the model `name`, if there is one; its files of the kind `part` are looked through.
        told: what transformers said while it loaded.
        config: of the model; it may be what is at fault.
    """
    try:
        yield
    except EditlibError:
        raise
    except Exception as error:
        log.debug("", exc_info=True)
        reason = reason_of(error)
        if path is not None and part is not None and os.path.isdir(path) and not _is_lack(error):
            found = fault_of(Path(path), part)
            if found is None and told is not None and told.mismatch:
                found = "the weights", told.mismatch
            if found is None and part == "tokenizer":
                found = "its tokenizer", reason
            if found is None and (part == "config" or (config is not None and _cannot_be_built(config))):
                found = "config.json", reason
            if found is not None:
                raise ModelError(f"{name} cannot be loaded: {found[0]}: {found[1]}; {_ANEW}") from None
        known = ", ".join(PACKAGED)
        raise ModelError(
            f"{name} cannot be loaded ({reason}); give a local folder, a Hugging Face id (needs a network or its "
            f"cache), or a packaged model ({known})"
        ) from None


def _is_lack(error: Exception) -> bool:
    """Returns whether a package or memory is missing, for which no file is to blame."""
    return isinstance(error, ImportError | MemoryError) or "memory" in str(error).lower()


def _cannot_be_built(config: PreTrainedConfig) -> bool:
    """Returns whether no model can be built from this configuration, whatever its weights."""
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception:
        return True
    return False
