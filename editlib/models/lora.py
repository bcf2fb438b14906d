"""Put a fresh LoRA adapter into a model for the length of a block; only this file needs `peft`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from editlib.errors import ModelError
from editlib.models.anatomy import Anatomy
from editlib.models.quantization import check_in_memory, linear_maps
from editlib.version import install_line


def peft_missing() -> bool:
    """Returns whether the optional package `peft` is not installed."""
    return importlib.util.find_spec("peft") is None


@contextmanager
def lora_adapter(anat: Anatomy, *, rank: int, seed: int) -> Iterator[list[nn.Parameter]]:
    """Adds a LoRA adapter (arXiv 2106.09685) of `rank` to every linear map of the decoder layers inside the block.

    Yields its parameters, the only ones that require gradients. Afterwards the original modules are restored. The
    adapter starts as no change (`B = 0`); `A` is drawn from `seed`. PEFT's scaling is 1.

    Raises:
        ModelError: `peft` is missing, or a weight is offloaded.
    """
    if peft_missing():
        raise ModelError(f"a LoRA adapter needs the package peft: {install_line('lora')}")
    from peft import LoraConfig, inject_adapter_in_model

    check_in_memory(anat)
    model: nn.Module = anat.model
    maps = linear_maps(anat)
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = {module: module.training for module in model.modules()}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # PEFT scales by alpha / r
        lora_dropout=0.0,
        target_modules=sorted(maps),
        fan_in_fan_out=not all(isinstance(module, nn.Linear) for module in maps.values()),  # GPT-2's Conv1D
    )
    try:
        with torch.random.fork_rng(devices=[]):  # the caller's generator is left alone
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model)
        model.eval()
        yield [p for name, p in model.named_parameters() if p not in wanted and p.requires_grad and "lora_" in name]
    finally:
        # PEFT's own unloading would leave new modules: a caller's references must stay valid.
        for name, module in maps.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
        if hasattr(model, "peft_config"):
            del model.peft_config
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
        for part, mode in training.items():
            part.training = mode
