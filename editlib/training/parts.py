"""Build the data of a training run: items of token rows, and the parts whose sum is the loss."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from editlib.models.prompts import PromptFormat, TokenRow, token_windows
from editlib.training.reading import Reading

Example = tuple[TokenRow, ...]
"""An item of a batch: a prompt with its answer, or several that a loss compares (answer and refusal). All items of a
part have the same number of rows; `extra` of a row counts its learned tokens."""

Loss = Callable[[Reading], Tensor]
"""The loss of each item read, `[n]`, summed over its tokens."""


@dataclass(frozen=True)
class Part:
    """Holds one part of a loss: `weight * sum of loss over a batch / (its items, or its learned tokens)`.

    Args:
        per: the divisor of the sum. "token" gives the mean over all tokens of the batch, however it is split into
            passes.
        layer: the loss reads the states that leave this layer, not logits.
        share: items of this part in a step, as a share of the batch size.
    """

    name: str
    items: Sequence[Example]
    loss: Loss
    weight: float = 1.0
    per: Literal["item", "token"] = "token"
    layer: int | None = None
    share: float = 1.0

    def batch(self, step: int, size: int, seed: int) -> list[int]:
        """Lists the items of step `step`. Shuffled epochs follow one another, so a step's items depend only on its
        number, and a resumed run needs no further state."""
        count = len(self.items)
        size = min(max(round(size * self.share), 1), count)
        places = range(step * size, (step + 1) * size)
        orders = {epoch: self._epoch(epoch, seed) for epoch in {at // count for at in places}}
        return [orders[at // count][at % count] for at in places]

    def _epoch(self, epoch: int, seed: int) -> list[int]:
        order = list(range(len(self.items)))
        random.Random(f"{seed} {self.name} {epoch}").shuffle(order)
        return order


def answer_nll(reading: Reading) -> Tensor:
    """Computes the negative log-likelihood of the answers, the loss of plain fine-tuning."""
    return -reading.log_probs().sum(1)


def answered(tok: PreTrainedTokenizerBase, question: str, answer: str, *, form: PromptFormat | None = None) -> TokenRow:
    """Encodes a question through the chat template, then the answer and the end token, which are learned."""
    form = form or PromptFormat(tok)
    return form.encode(question).followed_by((*form.answer_ids(answer, question), *form.end_ids()))


def text_rows(tok: PreTrainedTokenizerBase, documents: Iterable[str], length: int) -> Iterator[TokenRow]:
    """Yields plain text in windows of `length` tokens, all learned except the first; shorter remainders are left
    out."""
    for document in documents:
        for ids in token_windows(tok, document, length):
            if len(ids) == length:
                yield TokenRow(tuple(ids), 0, len(ids) - 1)
