"""What the model said before it was trained, computed once: no second model stays in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from editlib.models.anatomy import Anatomy
from editlib.models.freezing import frozen
from editlib.training import Item, Reading, read
from editlib.training.reading import passes
from editlib.training.trainer import PASS_LEARNED, PASS_TOKENS

LIKELIEST = 256

T = TypeVar("T")


def collect(
    anat: Anatomy,
    items: Sequence[Item],
    look: Callable[[Reading], T],
    *,
    layer: int | None = None,
    dtype: torch.dtype | None = None,
) -> list[T]:
    """What `look` takes from the reading of every single item, in their order; no logits are kept."""
    found: dict[int, T] = {}
    with frozen(anat.model), torch.no_grad():
        for some in passes(items, range(len(items)), tokens=PASS_TOKENS, learned=PASS_LEARNED):
            reading = read(anat, [items[i] for i in some], some, layer=layer, dtype=dtype)
            rows, start = len(reading.counts) // len(some), 0
            for j, number in enumerate(some):
                counts = reading.counts[j * rows : (j + 1) * rows]
                end = start + sum(counts)
                found[number] = look(Reading(reading.out[start:end], reading.wanted[start:end], counts, (number,)))
                start = end
    return [found[i] for i in range(len(items))]


def log_probs(anat: Anatomy, items: Sequence[Item], *, dtype: torch.dtype | None = None) -> Tensor:
    """`log p_ref(answer | prompt)` of every item's rows, `[items, rows]`."""
    return torch.cat(collect(anat, items, Reading.log_probs, dtype=dtype))


@dataclass(frozen=True)
class Likeliest:
    """Of every item the likeliest tokens at its learned places and their log-probabilities, `[m_i, k]` each.

    Whole rows of a vocabulary would take some 100 kB a token; 256 numbers hold nearly all of the probability.
    """

    pairs: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(
        cls, anat: Anatomy, items: Sequence[Item], *, k: int = LIKELIEST, dtype: torch.dtype | None = None
    ) -> Likeliest:
        """The `k` likeliest (or all, in a smaller vocabulary) by the model as it is now."""

        def look(reading: Reading) -> tuple[Tensor, Tensor]:
            best = reading.log_softmax.topk(min(k, reading.out.shape[-1]))
            return best.indices, best.values

        return cls(tuple(collect(anat, items, look, dtype=dtype)))

    def at(self, items: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities of some items, `[m, k]` each."""
        return torch.cat([self.pairs[i][0] for i in items]), torch.cat([self.pairs[i][1] for i in items])


def states(anat: Anatomy, items: Sequence[Item], layer: int, *, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The states of every item that leave `layer`, `[m_i, d_model]` each, fp32."""
    return collect(anat, items, lambda reading: reading.out.clone(), layer=layer, dtype=dtype)
