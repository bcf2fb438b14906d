"""Compute reference values of the model before training once, so that no second model stays in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from editlib.models.anatomy import Anatomy
from editlib.models.freezing import no_param_grad
from editlib.training import Example, Reading, read
from editlib.training.reading import passes
from editlib.training.trainer import PASS_LEARNED, PASS_TOKENS

LIKELIEST = 256

T = TypeVar("T")


def collect(
    anat: Anatomy,
    items: Sequence[Example],
    look: Callable[[Reading], T],
    *,
    layer: int | None = None,
    dtype: torch.dtype | None = None,
) -> list[T]:
    """Applies `look` to the reading of each item, in order; logits are not kept."""
    results: dict[int, T] = {}
    with no_param_grad(anat.model), torch.no_grad():
        for numbers in passes(items, range(len(items)), tokens=PASS_TOKENS, learned=PASS_LEARNED):
            reading = read(anat, [items[i] for i in numbers], numbers, layer=layer, dtype=dtype)
            rows, start = len(reading.counts) // len(numbers), 0  # rows per item
            for j, number in enumerate(numbers):
                counts = reading.counts[j * rows : (j + 1) * rows]
                end = start + sum(counts)
                item = Reading(reading.out[start:end], reading.wanted[start:end], counts, (number,))
                results[number] = look(item)
                start = end
    return [results[i] for i in range(len(items))]


def log_probs(anat: Anatomy, items: Sequence[Example], *, dtype: torch.dtype | None = None) -> Tensor:
    """Returns `log p_ref(answer | prompt)` of every item's rows, `[items, rows]`."""
    return torch.cat(collect(anat, items, Reading.log_probs, dtype=dtype))


@dataclass(frozen=True)
class Likeliest:
    """Holds the likeliest tokens at each item's learned positions, and their log-probabilities, `[m_i, k]` each.

    Whole rows of a vocabulary would take some 100 kB per token; 256 numbers cover nearly all of the probability.
    """

    pairs: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(
        cls, anat: Anatomy, items: Sequence[Example], *, k: int = LIKELIEST, dtype: torch.dtype | None = None
    ) -> Likeliest:
        """Computes the `k` likeliest tokens (or all, in a smaller vocabulary) under the current model."""

        def look(reading: Reading) -> tuple[Tensor, Tensor]:
            best = reading.log_softmax.topk(min(k, reading.out.shape[-1]))
            return best.indices, best.values

        return cls(tuple(collect(anat, items, look, dtype=dtype)))

    def at(self, items: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns tokens and log-probabilities of the given items, `[m, k]` each."""
        return torch.cat([self.pairs[i][0] for i in items]), torch.cat([self.pairs[i][1] for i in items])


def states(anat: Anatomy, items: Sequence[Example], layer: int, *, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Returns hidden states of every item after `layer`, `[m_i, d_model]` each, fp32."""
    return collect(anat, items, lambda reading: reading.out.clone(), layer=layer, dtype=dtype)
