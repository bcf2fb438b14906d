"""Run only the part of many prompts that depends on a change at their lookup positions, and the rest once.

Tokens before the lookup position do not see the change, in any layer; nor do the layers up to the edited one. Both are
computed once, so that a step of the descent costs the suffix of each prompt in the layers above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editlib.models.anatomy import Anatomy
from editlib.models.forward import encode_prefix, forward, split
from editlib.models.precision import plain_attention
from editlib.models.prefix import Prefix
from editlib.models.prompts import TokenBatch, TokenRow, pad


@dataclass(frozen=True)
class LogitPositions:
    """Holds positions whose logits are needed.

    `rows [r]`: the batch rows in use. `owner [r]`: the request whose `δ` each of these rows receives. `row`, `column`
    `[m]`: the positions; `row` indexes into `rows`.
    """

    rows: Tensor
    owner: Tensor
    row: Tensor
    column: Tensor


@dataclass
class SuffixBatch:
    """Holds each row of a batch from its lookup position on, as it enters the layers above the edit."""

    batch: TokenBatch
    hidden: Tensor  # [n, T, d_model], leaving the edited layer
    prefix: Prefix | None
    n_scored: Tensor  # [n], how many positions of a row may be read: the prompt's end and what was appended

    @classmethod
    def of(cls, anat: Anatomy, rows: Sequence[TokenRow], layer: int) -> SuffixBatch:
        """Runs once everything that does not depend on the change."""
        fronts, rests = split(list(rows), [row.lookup for row in rows])
        prefix = encode_prefix(anat, fronts) if any(len(front) for front in fronts) else None
        batch = pad(rests, device=anat.device)
        with torch.no_grad():
            hidden = forward(anat, batch, stop=layer + 1, prefix=prefix)
        n_scored = torch.tensor([row.extra + 1 for row in rests], device=batch.last.device)
        return cls(batch, hidden, prefix, n_scored)

    def last(self, rows: Tensor, owner: Tensor, counts: Tensor) -> LogitPositions:
        """Returns the last `counts [r]` positions of each of `rows [r]`, in order."""
        row = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)  # [m]
        # How far a position lies before its row's last token: counts - 1, ..., 0 within each row.
        back = counts.cumsum(0)[row] - 1 - torch.arange(len(row), device=rows.device)  # [m]
        return LogitPositions(rows, owner, row, self.batch.last[rows][row] - back)

    def logits(self, anat: Anatomy, layer: int, delta: Tensor, positions: LogitPositions) -> Tensor:
        """Returns the logits `[m, vocab]` at `positions`, each row's lookup position changed by its owner's row of
        `delta [n, d_model]`."""
        rows, change = positions.rows, delta[positions.owner]  # [r], [r, d_model]
        batch = self._narrow(rows)
        hidden = self.hidden[rows, : batch.input_ids.shape[1]].clone()  # [r, T', d_model]
        index = torch.arange(len(rows), device=hidden.device)
        # Summed in the dtype of δ, rounded to the model's once.
        hidden[index, batch.lookup] = (hidden[index, batch.lookup].to(delta.dtype) + change).to(hidden.dtype)
        prefix = None if self.prefix is None else self.prefix.select(rows)
        with plain_attention(hidden.device):
            return forward(
                anat, batch, start=layer + 1, hidden=hidden, prefix=prefix, score=(positions.row, positions.column)
            ).to(delta.dtype)

    def _narrow(self, rows: Tensor) -> TokenBatch:
        """Returns `rows [r]` of the batch, without the columns that are padding in all of them."""
        last = self.batch.last[rows]
        width = int(last.max()) + 1
        ids, mask = self.batch.input_ids[rows], self.batch.attention_mask[rows]
        return TokenBatch(ids[:, :width], mask[:, :width], self.batch.lookup[rows], last)


def read_logits(
    anat: Anatomy, layer: int, delta: Tensor, wanted: Sequence[tuple[SuffixBatch, LogitPositions]]
) -> list[Tensor]:
    """Returns the logits `[m, vocab]` of each of `wanted`; those of one batch share a pass.

    Args:
        delta: `δ [n, d_model]`, in the order of the requests.
    """
    if len(wanted) < 2 or any(suffixes is not wanted[0][0] for suffixes, _ in wanted):
        return [suffixes.logits(anat, layer, delta, positions) for suffixes, positions in wanted]
    each = [positions for _, positions in wanted]
    # `row` counts within its own `rows`; joined, those of earlier parts come first.
    starts = [0, *torch.tensor([len(positions.rows) for positions in each]).cumsum(0).tolist()]
    joined = LogitPositions(
        torch.cat([positions.rows for positions in each]),
        torch.cat([positions.owner for positions in each]),
        torch.cat([positions.row + start for positions, start in zip(each, starts, strict=False)]),
        torch.cat([positions.column for positions in each]),
    )
    logits = wanted[0][0].logits(anat, layer, delta, joined)
    return list(torch.split(logits, [len(positions.row) for positions in each]))
