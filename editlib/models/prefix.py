"""Hold a batch's fixed prefix: a KV cache, or token ids to run again for models whose cache cannot be reused."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache


@dataclass
class TokenReplay:
    """Replaces a cache for models that cannot continue from keys and values: every pass runs the tokens again.

    Slow, but correct for any model.
    """

    input_ids: Tensor  # [n, P]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows; the name is that of a cache's method."""
        self.input_ids = self.input_ids[indices]


KVCache = DynamicCache | TokenReplay


@dataclass(frozen=True)
class Prefix:
    """Holds the tokens before a batch in the form that a pass needs, one row for each of the batch's or one for all.

    `layers` holds the keys and values of every layer. It is empty for a model that cannot continue from them, whose
    `input_ids` are kept instead. Columns that the mask hides are moved to the left, since sliding windows and some
    position biases count all columns.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]  # [n or 1, heads, P, head_dim] each
    attention_mask: Tensor  # [n or 1, P]
    input_ids: Tensor | None = None  # [n or 1, P]

    def __post_init__(self) -> None:
        mask = self.attention_mask
        if not bool((mask[:, 1:] < mask[:, :-1]).any()):
            return
        # Stable: the tokens keep their order, and only the padding moves to the left.
        order = mask.argsort(dim=1, stable=True)
        layers = tuple((_reordered(keys, order), _reordered(values, order)) for keys, values in self.layers)
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "attention_mask", mask.gather(1, order))
        if self.input_ids is not None:
            object.__setattr__(self, "input_ids", self.input_ids.gather(1, order))

    @classmethod
    def of(cls, past: KVCache, attention_mask: Tensor) -> Prefix:
        """Copies the contents of a cache; `attention_mask` tells which of its columns hold tokens."""
        if isinstance(past, TokenReplay):
            return cls((), attention_mask, past.input_ids)
        return cls(tuple((layer[0], layer[1]) for layer in past), attention_mask)

    @property
    def lengths(self) -> Tensor:
        """Counts the visible tokens of each row, `[n or 1]`."""
        return self.attention_mask.sum(1)

    def select(self, rows: Tensor) -> Prefix:
        """Returns the prefix of some rows; a shared prefix is repeated for each."""
        shared = self.attention_mask.shape[0] == 1
        pick = torch.zeros_like(rows) if shared else rows
        ids = None if self.input_ids is None else self.input_ids[pick]
        return Prefix(tuple((k[pick], v[pick]) for k, v in self.layers), self.attention_mask[pick], ids)

    def cache(self) -> KVCache:
        """Makes a new cache that a pass may append to; the prefix itself is never changed."""
        return DynamicCache(list(self.layers)) if self.input_ids is None else TokenReplay(self.input_ids)


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    """Returns `x [n, heads, P, head_dim]` with the columns of each row in `order [n, P]`."""
    # Indexing copies whole columns; `take_along_dim` copies single numbers and takes six times as long.
    rows, heads = torch.arange(len(x), device=x.device), torch.arange(x.shape[1], device=x.device)
    return x[rows[:, None, None], heads[None, :, None], order.to(x.device)[:, None]]
