"""Run one pass over items, and read logits or states of the learned tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from editlib.models.anatomy import Anatomy
from editlib.models.forward import forward, shared_prefix
from editlib.models.prompts import TokenRow, pad


@dataclass(frozen=True)
class Reading:
    """Holds the model's predictions at the learned tokens of `n` items with `r` rows each, `m` tokens in all, row after
    row.

    `out` is `[m, vocab]`, the logits of each learned token, or `[m, d_model]`, the states from which these are
    predicted; fp32. `wanted [m]` are the tokens; `counts` has one number per row; `items` are the items' indices in the
    part.
    """

    out: Tensor
    wanted: Tensor
    counts: tuple[int, ...]
    items: tuple[int, ...]

    @cached_property
    def log_softmax(self) -> Tensor:
        """Log-probabilities of all tokens, `[m, vocab]`."""
        return self.out.log_softmax(-1)

    def sums(self, values: Tensor) -> Tensor:
        """Sums `values [m]`, one per token, over each row: `[n, r]`."""
        rows = torch.arange(len(self.counts), device=values.device).repeat_interleave(
            torch.tensor(self.counts, device=values.device)
        )
        summed = torch.zeros(len(self.counts), dtype=values.dtype, device=values.device).index_add(0, rows, values)
        return summed.reshape(len(self.items), -1)

    def log_probs(self) -> Tensor:
        """Computes `log p(answer | prompt)` of each row, a sum over its tokens: `[n, r]`."""
        return self.sums(-torch.nn.functional.cross_entropy(self.out, self.wanted, reduction="none"))

    @property
    def lengths(self) -> Tensor:
        """Learned tokens of each row, `[n, r]`."""
        return torch.tensor(self.counts, device=self.out.device).reshape(len(self.items), -1)


def read(
    anat: Anatomy,
    items: Sequence[Sequence[TokenRow]],
    numbers: Sequence[int],
    *,
    layer: int | None = None,
    dtype: torch.dtype | None = None,
) -> Reading:
    """Reads `items`, whose indices in their part are `numbers`, in one pass; the gradient flows through all of it.

    The tokens that all rows begin with (of the chat template) are run once, and logits are computed at the learned
    tokens only: the head of a small model with a large vocabulary costs more than its layers.

    Args:
        layer: read the states that leave this layer instead of logits.
        dtype: dtype of the matrix products (autocast); `None`: that of the weights.
    """
    rows = [row for item in items for row in item]
    device = anat.device
    with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        # A learned token at column t is predicted at column t - 1, which must therefore not be part of the prefix.
        most = min(len(row) - row.extra - 1 for row in rows) if len(rows) > 1 else 0
        prefix, rests = shared_prefix(anat, rows, most=most, grad=True)
        batch = pad(rests, device=device)
        places = [(r, at - 1) for r, row in enumerate(rests) for at in range(len(row) - row.extra, len(row))]
        row, column = torch.tensor(places, device=device).T
        if layer is None:
            out = forward(anat, batch, prefix=prefix, score=(row, column))
        else:
            hidden = forward(anat, batch, prefix=prefix, stop=layer + 1)
            out = hidden[row.to(hidden.device), column.to(hidden.device)]
    wanted = batch.input_ids[row, column + 1].to(out.device)
    return Reading(out.float(), wanted, tuple(row.extra for row in rows), tuple(numbers))


def passes(
    items: Sequence[Sequence[TokenRow]], numbers: Sequence[int], *, tokens: int, learned: int
) -> list[list[int]]:
    """Splits `numbers` into passes of rows of similar length with at most `tokens` tokens (with padding) and `learned`
    learned tokens, each of which costs a row of logits as wide as the vocabulary; items are never split."""
    order = sorted(numbers, key=lambda i: (max(len(row) for row in items[i]), i))
    groups: list[list[int]] = []
    width = rows = scored = 0
    for i in order:
        longest, count = max(len(row) for row in items[i]), sum(row.extra for row in items[i])
        fits = (rows + len(items[i])) * max(width, longest) <= tokens and scored + count <= learned
        if not groups or not fits:
            groups.append([])
            width = rows = scored = 0
        groups[-1].append(i)
        width, rows, scored = max(width, longest), rows + len(items[i]), scored + count
    return groups
