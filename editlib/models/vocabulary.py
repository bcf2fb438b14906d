"""Add one token to a model and its tokenizer, and read and write its rows in the embedding matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib.errors import ModelError, TokenError
from editlib.models.anatomy import Anatomy
from editlib.models.placement import input_embedding
from editlib.models.tracing import edit_output


def token_id(tok: PreTrainedTokenizerBase, token: str) -> int | None:
    """The id of a special token, or `None` if the tokenizer lacks it."""
    added: dict[str, int] = tok.get_added_vocab()
    return added.get(token)


def add_token(model: PreTrainedModel, tok: PreTrainedTokenizerBase, token: str) -> int:
    """Adds `token` as a special token, with rows for it in the embedding matrices; returns its id.

    Spare rows (of a vocabulary padded to a round size) are used before the matrices grow.

    Raises:
        TokenError: the text is already an ordinary token.
    """
    unl_id = extend_tokenizer(tok, token)
    if unl_id >= input_embedding(model).weight.shape[0]:
        # transformers fills new rows at random: the same each time, and without touching the caller's generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.resize_token_embeddings(unl_id + 1, mean_resizing=False)
    return unl_id


def extend_tokenizer(tok: PreTrainedTokenizerBase, token: str) -> int:
    """Adds `token` as a special token to `tok` alone; returns its id.

    Raises:
        TokenError: the text is already an ordinary token.
    """
    unl_id = token_id(tok, token)
    if unl_id is None:
        if token in tok.get_vocab():
            raise TokenError(f"token {token!r} is already an ordinary token of this tokenizer; choose another text")
        tok.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
        unl_id = cast(int, tok.convert_tokens_to_ids(token))
    return unl_id


def embedding_names(anat: Anatomy) -> tuple[str, ...]:
    """The names of the modules that hold a row per token: the input embedding, and the head unless it is tied."""
    wanted = [anat.embedding] if anat.tied else [anat.embedding, anat.head]
    names = {id(module): name for name, module in anat.model.named_modules()}
    return tuple(names[id(module)] for module in wanted)


@contextmanager
def rows_in_place(anat: Anatomy, token: int, row_in: Tensor, row_out: Tensor) -> Iterator[None]:
    """Lets the model use `row_in [d_model]` and `row_out [d_model]` for `token`, with gradients to both.

    The outputs of embedding and head are changed, not their weights, so that no gradient of a whole matrix is stored.
    """

    def embed(ids: Tensor, output: Tensor) -> Tensor:
        return torch.where((ids == token)[..., None], _scaled(row_in, output), output)  # [n, T, d_model]

    def logits(hidden: Tensor, output: Tensor) -> Tensor:
        logit = hidden @ row_out.to(hidden.dtype)  # [n, T]
        bias = getattr(anat.head, "bias", None)
        logit = logit if bias is None else logit + bias[token]
        return torch.cat([output[..., :token], logit[..., None], output[..., token + 1 :]], dim=-1)  # [n, T, vocab]

    scale = getattr(anat.embedding, "embed_scale", None)  # Gemma multiplies inside the embedding module

    def _scaled(row: Tensor, like: Tensor) -> Tensor:
        row = row.to(like.dtype)
        return row if scale is None else row * torch.as_tensor(scale, dtype=like.dtype, device=like.device)

    with ExitStack() as stack:
        stack.enter_context(edit_output(anat.embedding, embed))
        stack.enter_context(edit_output(anat.head, logits))
        yield


def check_rows(anat: Anatomy) -> None:
    """Raises `ModelError` if the embedding matrices are offloaded, so that no row can be read or written."""
    if anat.embedding.weight.is_meta or anat.head.weight.is_meta:
        raise ModelError(
            f"{type(anat.model).__name__} has its embeddings or its head offloaded, where no unlearning token can be "
            'added; load it with a device_map that keeps them in memory, e.g. device_map={"": "cpu"}, or in bfloat16'
        )


def write_rows(anat: Anatomy, token: int, row_in: Tensor, row_out: Tensor | None) -> None:
    """Writes the rows of `token`, `[d_model]` each, into the embedding matrices; tied matrices have `row_in` only.

    Raises:
        ModelError: the matrices are offloaded.
    """
    check_rows(anat)
    with torch.no_grad():
        anat.embedding.weight[token] = row_in.to(anat.embedding.weight)
        if not anat.tied and row_out is not None:
            anat.head.weight[token] = row_out.to(anat.head.weight)
