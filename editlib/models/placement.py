"""Locate a model's tensors: on one device, spread over several, or offloaded by accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from editlib.errors import ModelError


def input_embedding(model: PreTrainedModel) -> nn.Embedding:
    """Returns the input embedding, which transformers types as any module."""
    return cast(nn.Embedding, model.get_input_embeddings())


def input_device(model: PreTrainedModel) -> torch.device:
    """Returns the device for token ids: the one on which the embedding runs, offloaded or not."""
    embedding = input_embedding(model)
    if embedding.weight.device.type != "meta":
        return embedding.weight.device
    # An offloaded embedding is on the meta device; accelerate's hook names the one it is copied to.
    devices = [device for hook in _hooks(embedding) if (device := getattr(hook, "execution_device", None)) is not None]
    return torch.device(devices[0]) if devices else torch.device("cpu")


def stored_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yields `(name, tensor on the CPU)` of all parameters and persistent buffers, sorted by name.

    Tensors that accelerate has offloaded are on the meta device; they are read from its store, one at a time.

    Raises:
        ModelError: a tensor on the meta device that is in no store.
    """
    for name, tensor in sorted(model.state_dict().items()):
        yield name, (_offloaded(model, name) if tensor.device.type == "meta" else tensor).detach().cpu()


def in_memory(module: nn.Module, name: str) -> Tensor | None:
    """Returns the data of a parameter of `module` that its next forward pass will use; `None` if it is in a file.

    accelerate keeps a parameter that it offloads on the meta device and copies it in for each pass: from CPU memory,
    where a change lasts, or from a file, where it would be lost.
    """
    parameter: Tensor = getattr(module, name).data
    if not parameter.is_meta:
        return parameter
    stored = next((h.weights_map for h in _hooks(module) if getattr(h, "weights_map", None) is not None), None)
    if stored is None:
        return None
    once: Tensor = stored[name]
    again: Tensor = stored[name]  # both are alive: equal addresses mean one tensor, not two reads of a file
    return once if once.data_ptr() == again.data_ptr() else None


def _offloaded(model: PreTrainedModel, name: str) -> Tensor:
    """Reads an offloaded tensor from accelerate's store: that of its module, or of a module around it."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, -1, -1):
        for hook in _hooks(model.get_submodule(".".join(parts[:cut]))):
            if getattr(hook, "weights_map", None) is not None and hook.offload:
                tensor: Tensor = hook.weights_map[".".join(parts[cut:])]
                return tensor
    raise ModelError(f"{name} of {type(model).__name__} holds no data (meta device); load the model with its weights")


def _hooks(module: nn.Module) -> list[Any]:
    """Returns the hooks that accelerate has put on a module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))
