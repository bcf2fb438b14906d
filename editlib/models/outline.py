"""Check a model's files and shapes before its weights are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from editlib.errors import ModelError
from editlib.models.adapters import is_adapter
from editlib.models.anatomy import check_kind
from editlib.models.folder_faults import fault_of
from editlib.models.loading import DeviceMap, check_device, check_dtype, load, open_tokenizer, open_weights
from editlib.models.source import Source, adapter_of, model_of


@dataclass(frozen=True)
class Outline:
    """Holds a model without weights: its modules on the meta device, and its tokenizer."""

    model: PreTrainedModel
    tok: PreTrainedTokenizerBase


def outline_of(name: str, *, dtype: str | None = None, progress: bool = True) -> Outline:
    """Outlines a model: compares names and shapes of all tensors with the configuration, as `load` does.

    For an adapter it checks the adapter's own files, and then outlines its base.

    Raises:
        ModelError, FetchError: as for `load`.
    """
    check_dtype(dtype)
    if adapter_of(name) is not None:
        if is_adapter(name) and (fault := fault_of(Path(name), "adapter")):
            raise ModelError(f"{name} cannot be loaded: {fault[0]}: {fault[1]}; fix it, or make the adapter again")
        return outline_of(model_of(name), dtype=dtype, progress=progress)
    source = Source.of(name, progress=progress)
    _check_kind(source)
    tok = open_tokenizer(source)
    return Outline(open_weights(source, tok, dtype=dtype, device_map="meta"), tok)


def load_checked(
    name: str, first: Callable[[Outline], None], *, dtype: str | None = None, device_map: DeviceMap = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model after `first` has checked its outline, and raised for anything unsuitable.

    Raises:
        ModelError, FetchError: see `load`.
    """
    if isinstance(device_map, str):
        check_device(device_map)
    outline = outline_of(name, dtype=dtype)
    first(outline)
    tok = outline.tok if adapter_of(name) is None else None
    return load(name, dtype=dtype, device_map=device_map, tok=tok)


def _check_kind(source: Source) -> None:
    """Refuses a kind of model that cannot be edited by its configuration alone: its weights may be large to fetch."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(source.config)  # type: ignore[no-untyped-call]
    except Exception:  # of any class; loading reports what is wrong
        return
    check_kind(model)
