"""Hash all weights of a model, check that they are finite, and save it as a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from editlib.errors import ModelError
from editlib.models.anatomy import Anatomy
from editlib.models.placement import stored_tensors


def weights_sha256(model: PreTrainedModel) -> str:
    """Hashes names, dtypes, shapes and bytes of all parameters and persistent buffers, sorted by name.

    Independent of how a folder is sharded, of metadata in its files, and of offloading.
    """
    digest = hashlib.sha256()
    for name, tensor in stored_tensors(model):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        # As bytes: numpy has no bf16, and an empty tensor cannot be viewed.
        raw = tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def stored_bytes(model: PreTrainedModel) -> int:
    """Estimates the bytes of the weights on disk; offloaded ones are not read."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def check_finite(anat: Anatomy, name: str) -> None:
    """Raises `ModelError` where a weight that edits and answers depend on is NaN or infinite.

    Checks embeddings, head, norms, biases and the MLP output matrices, once each: about 40 % of the weights of a small
    model, in about 2 % of its loading time. Offloaded weights are not read.
    """
    wide = {f"{module}.weight" for module in anat.mlp_output_names}
    ends = {id(anat.embedding.weight), id(anat.head.weight)}
    for key, weight in anat.model.named_parameters():
        if weight.is_meta or not (weight.dim() == 1 or key in wide or id(weight) in ends):
            continue
        if not _finite(weight.detach()):
            raise ModelError(
                f"{name}: {key} holds numbers that are not finite (NaN or infinite); give a model with finite "
                "weights, or download it again"
            )


def _finite(weight: Tensor) -> bool:
    """Returns whether all numbers of a matrix or vector are finite."""
    if weight.dim() == 2:  # the mean of a row is finite only if all its numbers are; far faster than `isfinite` of all
        weight = weight @ weight.new_full((weight.shape[1],), 1 / max(weight.shape[1], 1))
    return bool(torch.isfinite(weight).all())


def save_model(model: PreTrainedModel, tok: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes an ordinary Hugging Face folder: safetensors, configuration, generation settings and tokenizer."""
    with quiet_bars():
        model.save_pretrained(folder)
        tok.save_pretrained(folder)


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Hides transformers' own progress bars of loading and writing."""
    shown = transformers_logging.is_progress_bar_enabled()
    hide: Callable[[], None] = transformers_logging.disable_progress_bar
    show: Callable[[], None] = transformers_logging.enable_progress_bar
    hide()
    try:
        yield
    finally:
        if shown:
            show()
