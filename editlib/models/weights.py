"""A model's weights as a whole: their hash, and the folder that they are saved in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from editlib.models.placement import stored_tensors


def weights_sha256(model: PreTrainedModel) -> str:
    """Hash over names, dtypes, shapes and bytes of all parameters and persistent buffers, in the order of their names.

    Does not depend on how a folder is sharded, on metadata in its files, or on what of the model is offloaded.
    """
    digest = hashlib.sha256()
    for name, tensor in stored_tensors(model):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        raw = tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def stored_bytes(model: PreTrainedModel) -> int:
    """What the weights take on disk, about; offloaded ones are not read."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def save_model(model: PreTrainedModel, tok: PreTrainedTokenizerBase, folder: Path) -> None:
    """An ordinary Hugging Face folder: safetensors, configuration, generation settings and tokenizer."""
    with quiet_bars():
        model.save_pretrained(folder)
        tok.save_pretrained(folder)


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Keeps transformers' own loading and writing bars off stderr."""
    shown = transformers_logging.is_progress_bar_enabled()
    hide: Callable[[], None] = transformers_logging.disable_progress_bar
    show: Callable[[], None] = transformers_logging.enable_progress_bar
    hide()
    try:
        yield
    finally:
        if shown:
            show()
