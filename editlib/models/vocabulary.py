"""Add tokens to a model and its tokenizer, and read and write their rows in the embedding matrices."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib.errors import ModelError, TokenError
from editlib.models.anatomy import Anatomy, anatomy
from editlib.models.placement import input_embedding
from editlib.models.tracing import edit_output


def token_id(tok: PreTrainedTokenizerBase, token: str) -> int | None:
    """Returns the id of a special token, or `None` if the tokenizer lacks it."""
    added: dict[str, int] = tok.get_added_vocab()
    return added.get(token)


def numbered(tok: PreTrainedTokenizerBase, token: str) -> dict[str, int]:
    """Returns the ids, by text, of `token` and of the tokens that were numbered after it: `[UNL]`, `[UNL2]`, `[UNL3]`,
    ..."""
    stem = re.escape(token[:-1]) + r"\d*" + re.escape(token[-1:])
    return {text: number for text, number in tok.get_added_vocab().items() if re.fullmatch(stem, text)}


def free_tokens(tok: PreTrainedTokenizerBase, token: str, count: int) -> list[str]:
    """Returns the texts of `count` tokens that `tok` does not have yet: `token`, then numbered ones (see
    `numbered`)."""
    taken = numbered(tok, token)
    texts: list[str] = []
    number = 1
    while len(texts) < count:
        text = token if number == 1 else f"{token[:-1]}{number}{token[-1:]}"
        if text not in taken:
            texts.append(text)
        number += 1
    return texts


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


@dataclass(frozen=True)
class Vocabulary:
    """Holds a model's vocabulary before tokens were added, to restore it."""

    tok: PreTrainedTokenizerBase
    rows: int  # of the embedding matrices
    spare: tuple[Tensor, ...]  # rows past the tokenizer's own tokens, of each matrix

    @classmethod
    def of(cls, model: PreTrainedModel, tok: PreTrainedTokenizerBase) -> Vocabulary:
        """Copies the tokenizer, and the rows that new tokens would use."""
        matrices = _matrices(model)
        return cls(copy.deepcopy(tok), len(matrices[0]), tuple(matrix[len(tok) :].clone() for matrix in matrices))

    def restore(self, model: PreTrainedModel) -> PreTrainedTokenizerBase:
        """Removes the rows of all later tokens from `model`, bit for bit; returns a tokenizer without these tokens."""
        if len(_matrices(model)[0]) != self.rows:
            model.resize_token_embeddings(self.rows, mean_resizing=False)
        for matrix, spare in zip(_matrices(model), self.spare, strict=True):
            matrix[len(matrix) - len(spare) :] = spare
        return copy.deepcopy(self.tok)


def _matrices(model: PreTrainedModel) -> list[Tensor]:
    """Returns the embedding matrices, one where they are tied."""
    anat = anatomy(model)
    both = (anat.embedding.weight, anat.head.weight)
    return [matrix.detach() for matrix in {id(matrix): matrix for matrix in both}.values()]


def embedding_names(anat: Anatomy) -> tuple[str, ...]:
    """Returns the names of the modules that hold a row per token: the input embedding, and the head unless it is
    tied."""
    wanted = [anat.embedding] if anat.tied else [anat.embedding, anat.head]
    names = {id(module): name for name, module in anat.model.named_modules()}
    return tuple(names[id(module)] for module in wanted)


@contextmanager
def rows_in_place(anat: Anatomy, tokens: Sequence[int], rows_in: Tensor, rows_out: Tensor) -> Iterator[None]:
    """Lets the model use `rows_in [k, d_model]` and `rows_out [k, d_model]` for `k` tokens, with gradients to both."""
    numbers = torch.tensor(tokens, device=rows_in.device)
    scale = getattr(anat.embedding, "embed_scale", None)  # Gemma multiplies inside the embedding module

    def embed(ids: Tensor, output: Tensor) -> Tensor:
        match = ids[..., None] == numbers  # [..., k]
        # One row for each position; positions of other tokens get the first row, which is then masked out.
        new_rows = rows_in.to(output.dtype)[match.to(torch.uint8).argmax(-1)]
        if scale is not None:
            new_rows = new_rows * torch.as_tensor(scale, dtype=output.dtype, device=output.device)
        return torch.where(match.any(-1, keepdim=True), new_rows, output)

    def logits(hidden: Tensor, output: Tensor) -> Tensor:
        new_logits = hidden @ rows_out.to(hidden.dtype).T  # [..., k]
        bias = getattr(anat.head, "bias", None)
        if bias is not None:
            new_logits = new_logits + bias[numbers]
        return output.index_copy(-1, numbers, new_logits)

    with ExitStack() as stack:
        stack.enter_context(edit_output(anat.embedding, embed))
        stack.enter_context(edit_output(anat.head, logits))
        yield


def silence(anat: Anatomy, tokens: Sequence[int]) -> None:
    """Makes `tokens` tokens that greedy decoding never generates: their rows become the mean of all others."""
    silenced = list(tokens)
    for matrix in _matrices(anat.model):
        others = matrix.sum(0, dtype=torch.float32) - matrix[silenced].sum(0, dtype=torch.float32)  # [d_model]
        matrix[silenced] = (others / max(len(matrix) - len(silenced), 1)).to(matrix)


def check_rows(anat: Anatomy) -> None:
    """Raises `ModelError` if the embedding matrices are offloaded, so that no row can be read or written."""
    if anat.embedding.weight.is_meta or anat.head.weight.is_meta:
        raise ModelError(
            f"{type(anat.model).__name__} has its embeddings or its head offloaded, so that no unlearning token can be "
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
