"""Run passes through one random layer of a model's shape, to be timed for a plan."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from editlib.models.size import model_from_config

Pass = Callable[[], object]


def one_layer(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Builds a model of the first decoder layer alone, with random weights and a vocabulary of 64 tokens."""
    small = copy.deepcopy(config)
    text = small.get_text_config(decoder=True)
    text.num_hidden_layers, text.vocab_size = 1, 64
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):  # ids outside the small vocabulary would be refused
        setattr(text, name, None)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    with device:
        model = model_from_config(small, dtype=dtype)
    module: nn.Module = model
    module.eval().requires_grad_(False)
    return model


def text_pass(model: PreTrainedModel, rows: int, width: int) -> Pass:
    """Returns a pass over `rows` rows of `width` tokens of running text."""
    ids = torch.zeros(rows, width, dtype=torch.long, device=model.device)
    return without_grad(lambda: model(input_ids=ids, use_cache=False))


def step_pass(model: PreTrainedModel, rows: int, width: int, front: int, *, grad: bool) -> Pass:
    """Returns a pass over `rows` rows of `width` tokens after `front` cached ones; with `grad`, also the gradient of
    the states `[rows, width, d_model]` that enter it."""
    embedding = next(module for module in model.modules() if isinstance(module, nn.Embedding)).weight
    ids = torch.zeros(rows, front, dtype=torch.long, device=model.device)
    states = torch.randn(
        rows, width, embedding.shape[1], dtype=embedding.dtype, device=model.device, requires_grad=grad
    )
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    cached = cache if isinstance(cache, DynamicCache) else None  # other kinds of cache are not passed on

    def run() -> Tensor:
        past = copy.deepcopy(cached)  # a pass extends its cache
        logits: Tensor = model(inputs_embeds=states, past_key_values=past, use_cache=past is not None).logits
        return torch.autograd.grad(logits.sum(), states)[0] if grad else logits

    return run if grad else without_grad(run)


def without_grad(work: Pass) -> Pass:
    """Returns `work` without gradients."""

    @torch.no_grad()
    def run() -> object:
        return work()

    return run
