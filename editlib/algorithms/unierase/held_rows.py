"""Read many prompts at chosen positions, in batches that are made once (ours).

An edit reads the same places twice: in the model whose answers are erased, to find out where its refusal tokens differ
from all else, and again when its values have been moved for these tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editlib.algorithms.keys import BATCH_TOKENS
from editlib.algorithms.unierase.final_states import FinalStates
from editlib.models.anatomy import Anatomy
from editlib.models.capabilities import can_cache
from editlib.models.forward import WORTH_A_PASS, encode_prefix, forward, shared_length, split
from editlib.models.neurons import Neurons
from editlib.models.prefix import Prefix
from editlib.models.prompts import TokenBatch, TokenRow, pad
from editlib.models.tracing import record_inputs

BATCH_ROWS = 64
BATCH_LOGITS = 2**25  # numbers in the logits of a batch


@dataclass(frozen=True)
class NeuronInputs:
    """Holds what the neurons of an MLP read at `p` positions, in fp32."""

    positions: Tensor  # [p], their numbers among all positions that are read
    x: Tensor  # [p, d_model], the MLP's input
    keys: Tensor  # [p, d_ff]


@dataclass(frozen=True)
class _RowBatch:
    """Holds a batch of rows without the tokens that all of them begin with, and the positions to read in it."""

    front: TokenRow | None
    batch: TokenBatch  # [n, T]
    where: tuple[Tensor, Tensor]  # rows and columns of the batch, [p] each
    positions: Tensor  # [p]

    def prefix(self, anat: Anatomy) -> Prefix | None:
        """Runs the common first tokens; their keys and values may have changed since."""
        if self.front is None:
            return None
        rows = torch.zeros(len(self.batch.input_ids), dtype=torch.long, device=anat.device)
        return encode_prefix(anat, [self.front]).select(rows)


class HeldRows:
    """Holds rows of tokens to read at each row's last token, or from its column in `firsts` to its end.

    Positions are counted row by row.
    """

    def __init__(self, anat: Anatomy, rows: Sequence[TokenRow], firsts: Sequence[int] | None = None) -> None:
        firsts = [len(row) - 1 for row in rows] if firsts is None else firsts
        counts = [len(row) - first for row, first in zip(rows, firsts, strict=True)]
        numbers = torch.split(torch.arange(sum(counts), device=anat.device), counts) if counts else ()
        self.anat, self.count = anat, sum(counts)
        groups = _batches(rows, counts, most=max(1, BATCH_LOGITS // anat.embedding.weight.shape[0]))
        self._chunks = [_row_batch(anat, rows, firsts, numbers, group) for group in groups]

    def final_states(self) -> FinalStates:
        """Reads the states that the head reads, at all positions in their order."""
        device = self.anat.device
        states = torch.zeros(self.count, self.anat.d_model, device=device)
        log_sums = torch.zeros(self.count, device=device)
        for chunk in self._chunks:
            seen: list[Tensor] = []
            with torch.no_grad():
                prefix = chunk.prefix(self.anat)
                logits = forward(self.anat, chunk.batch, prefix=prefix, score=chunk.where, final=seen.append)
            states[chunk.positions] = seen[0].float()
            log_sums[chunk.positions] = logits.float().logsumexp(1)  # of logits [p, vocab]
        return FinalStates(states, log_sums)

    def inputs_of(self, neurons: Neurons) -> Iterator[NeuronInputs]:
        """Yields what `neurons` read, batch by batch."""
        modules = {"x": self.anat.matrix(neurons.gate.number), "keys": self.anat.mlp_output(neurons.layer)}
        for chunk in self._chunks:
            found: dict[str, Tensor] = {}
            with torch.no_grad(), record_inputs(modules, found.__setitem__):
                forward(self.anat, chunk.batch, prefix=chunk.prefix(self.anat), stop=neurons.layer + 1)
            # Some models flatten rows and columns for their MLP.
            shape = chunk.batch.input_ids.shape
            x, keys = (found[name].reshape(*shape, -1)[chunk.where].float() for name in ("x", "keys"))
            yield NeuronInputs(chunk.positions, x, keys)


def _row_batch(
    anat: Anatomy, rows: Sequence[TokenRow], firsts: Sequence[int], numbers: Sequence[Tensor], group: Sequence[int]
) -> _RowBatch:
    """Makes the batch of the rows in `group`; `numbers` are those of the positions to read, row by row."""
    some, starts = [rows[i] for i in group], [firsts[i] for i in group]
    # The tokens that all of them begin with run once, up to the first position that is read.
    shared = min(shared_length(some), *starts)
    if shared * (len(some) - 1) < WORTH_A_PASS or not can_cache(anat):
        shared = 0
    fronts, rests = split(some, [shared] * len(some))
    spots = [(i, c) for i, row in enumerate(rests) for c in range(starts[i] - shared, len(row))]
    row, column = torch.tensor(spots, device=anat.device).T  # [p] each
    positions = torch.cat([numbers[i] for i in group])
    return _RowBatch(fronts[0] if shared else None, pad(rests, device=anat.device), (row, column), positions)


def _batches(rows: Sequence[TokenRow], counts: Sequence[int], *, most: int) -> list[list[int]]:
    """Groups the indices of rows of similar length: at most `BATCH_ROWS` of them, `BATCH_TOKENS` padded tokens and
    `most` positions that are read, `counts` of each."""
    groups: list[list[int]] = []
    held = 0
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        full = groups and (len(groups[-1]) == BATCH_ROWS or (len(groups[-1]) + 1) * len(rows[i]) > BATCH_TOKENS)
        if not groups or full or held + counts[i] > most:
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += counts[i]
    return groups
