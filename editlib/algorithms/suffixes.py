"""The part of many prompts that a change at their lookup positions reaches: run again and again, the rest only once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editlib.models.anatomy import Anatomy
from editlib.models.forward import encode_prefix, forward, split
from editlib.models.prefix import Prefix
from editlib.models.prompts import TokenBatch, TokenRow, pad


@dataclass(frozen=True)
class Reading:
    """Where logits are read: at `column [m]` of `rows[row]`, with `row [m]` an index into `rows [r]`, which number rows
    of a batch; `owner [r]` says which column of a change each of the rows gets."""

    rows: Tensor
    owner: Tensor
    row: Tensor
    column: Tensor


@dataclass
class Suffixes:
    """What stands from the lookup position on in each row of a batch, as it enters the layers above the edit."""

    batch: TokenBatch
    hidden: Tensor  # [n, T, d_model], leaving the edited layer
    prefix: Prefix | None
    scored: Tensor  # [n], how many positions of a row may be read: the prompt's end and what was appended

    @classmethod
    def of(cls, anat: Anatomy, rows: Sequence[TokenRow], layer: int) -> Suffixes:
        """Runs everything that does not change, once."""
        fronts, rests = split(list(rows), [row.lookup for row in rows])
        # One token at least must stand in front for a prefix to exist.
        prefix = encode_prefix(anat, fronts) if all(len(front) for front in fronts) else None
        if prefix is None:
            rests = list(rows)
        batch = pad(rests, device=anat.device)
        with torch.no_grad():
            hidden = forward(anat, batch, stop=layer + 1, prefix=prefix)
        scored = torch.tensor([row.extra + 1 for row in rests], device=batch.last.device)
        return cls(batch, hidden, prefix, scored)

    def last(self, rows: Tensor, owner: Tensor, counts: Tensor) -> Reading:
        """The last `counts [r]` positions of each of `rows`, in order; fewer of them where they end before the row."""
        row = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)
        back = counts.cumsum(0)[row] - 1 - torch.arange(len(row), device=rows.device)
        return Reading(rows, owner, row, self.batch.last[rows][row] - back)

    def logits(self, anat: Anatomy, layer: int, delta: Tensor, reading: Reading) -> Tensor:
        """Logits `[m, vocab]` where `reading` says, the owner's row of `delta [n, d_model]` added at the lookup."""
        rows, change = reading.rows, delta[reading.owner]
        batch = TokenBatch(
            *(t[rows] for t in (self.batch.input_ids, self.batch.attention_mask, self.batch.lookup, self.batch.last))
        )
        width = int(batch.last.max()) + 1
        batch = TokenBatch(batch.input_ids[:, :width], batch.attention_mask[:, :width], batch.lookup, batch.last)
        hidden = self.hidden[rows, :width].clone()
        index = torch.arange(len(rows), device=hidden.device)
        hidden[index, batch.lookup] = (hidden[index, batch.lookup].to(delta.dtype) + change).to(hidden.dtype)
        prefix = None if self.prefix is None else self.prefix.select(rows)
        return forward(
            anat, batch, start=layer + 1, hidden=hidden, prefix=prefix, score=(reading.row, reading.column)
        ).to(delta.dtype)


def read(anat: Anatomy, layer: int, delta: Tensor, asked: Sequence[tuple[Suffixes, Reading]]) -> list[Tensor]:
    """The logits of several readings; those of one batch share a pass."""
    if len(asked) < 2 or any(suffixes is not asked[0][0] for suffixes, _ in asked):
        return [suffixes.logits(anat, layer, delta, reading) for suffixes, reading in asked]
    readings = [reading for _, reading in asked]
    starts = [0, *torch.tensor([len(reading.rows) for reading in readings]).cumsum(0).tolist()]
    joined = Reading(
        torch.cat([reading.rows for reading in readings]),
        torch.cat([reading.owner for reading in readings]),
        torch.cat([reading.row + start for reading, start in zip(readings, starts, strict=False)]),
        torch.cat([reading.column for reading in readings]),
    )
    return list(asked[0][0].logits(anat, layer, delta, joined).split([len(reading.row) for reading in readings]))
