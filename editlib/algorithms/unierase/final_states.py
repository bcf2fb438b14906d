"""Read the final states at places, in answers and in texts, to which the output rows of refusal tokens are fitted
(ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from editlib.algorithms.unierase.refusal_places import RefusalPlaces
from editlib.models.anatomy import Anatomy
from editlib.models.forward import forward, shared_prefix
from editlib.models.prompts import TokenRow, pad

BATCH_ROWS = 64
BATCH_LOGITS = 2**25  # numbers in the logits of a batch


@dataclass(frozen=True)
class FinalStates:
    """Holds the final states at `m` positions, which the head reads, and the log-sum-exp of all logits there."""

    states: Tensor  # [m, d_model]
    log_sums: Tensor  # [m]

    @classmethod
    def cat(cls, parts: Sequence[FinalStates]) -> FinalStates:
        """Returns the positions of all `parts`, one after another."""
        return cls(torch.cat([part.states for part in parts]), torch.cat([part.log_sums for part in parts]))


@dataclass
class WrittenStates:
    """Collects the states at the positions of texts while they are generated."""

    states: list[FinalStates] = field(default_factory=list)

    def add(self, states: Tensor, logits: Tensor) -> None:
        """Adds `states [n, d_model]` with their `logits [n, vocab]`."""
        self.states.append(FinalStates(states.float(), logits.float().logsumexp(1)))


def read_kept(anat: Anatomy, places: RefusalPlaces) -> tuple[FinalStates, FinalStates]:
    """Reads the states at the kept places, and at every position of the answers.

    Most kept places lie in an answer that is read anyway: at the end of its question, or where its sentence reaches the
    fact. These are not run again.
    """
    answers = [row.followed_by(text) for row, text in places.answers]
    firsts = [len(row) - 1 for row, _ in places.answers]
    ends = [row.ids[: c + 1] for row, first in zip(answers, firsts, strict=True) for c in range(first, len(row))]
    number = {ids: i for i, ids in enumerate(ends)}  # of a prompt, among the positions that are read
    others = {place.row.ids: place.row for place in places.kept if place.row.ids not in number}
    number |= {ids: len(ends) + i for i, ids in enumerate(others)}
    inside = read_states(anat, answers, firsts)
    both = FinalStates.cat([inside, read_states(anat, list(others.values()))])
    index = torch.tensor([number[place.row.ids] for place in places.kept], dtype=torch.long, device=anat.device)
    return FinalStates(both.states[index], both.log_sums[index]), inside


def read_states(anat: Anatomy, rows: Sequence[TokenRow], firsts: Sequence[int] | None = None) -> FinalStates:
    """Reads the final states of `rows`: at each row's last token, or from its column in `firsts` to its end.

    Positions follow one another row by row.
    """
    if not rows:
        return FinalStates(torch.zeros(0, anat.d_model, device=anat.device), torch.zeros(0, device=anat.device))
    firsts = [len(row) - 1 for row in rows] if firsts is None else firsts
    states: list[Tensor] = [torch.empty(0)] * len(rows)
    log_sums: list[Tensor] = [torch.empty(0)] * len(rows)
    for chunk in _batches(anat, rows, firsts):
        # The prefix that the rows share runs once, up to the first position that is read.
        most = min(firsts[i] for i in chunk)
        with torch.no_grad():
            prefix, rests = shared_prefix(anat, [rows[i] for i in chunk], most=most)
            batch = pad(rests, device=anat.device)
            cut = len(rows[chunk[0]]) - len(rests[0])
            columns = [range(firsts[i] - cut, len(rests[j])) for j, i in enumerate(chunk)]
            where = torch.tensor([(j, c) for j, some in enumerate(columns) for c in some], device=anat.device)
            seen: list[Tensor] = []
            logits = forward(anat, batch, prefix=prefix, score=(where[:, 0], where[:, 1]), final=seen.append)
        counts = [len(some) for some in columns]
        for i, own, total in zip(
            chunk, torch.split(seen[0].float(), counts), torch.split(logits.float().logsumexp(1), counts), strict=True
        ):
            states[i], log_sums[i] = own, total
    return FinalStates(torch.cat(states), torch.cat(log_sums))


def _batches(anat: Anatomy, rows: Sequence[TokenRow], firsts: Sequence[int]) -> list[list[int]]:
    """Groups the indices of rows of similar length: at most `BATCH_ROWS` of them, with logits of `BATCH_LOGITS`
    numbers."""
    most = max(1, BATCH_LOGITS // anat.embedding.weight.shape[0])  # positions
    groups: list[list[int]] = []
    held = 0
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        read = len(rows[i]) - firsts[i]
        if not groups or len(groups[-1]) == BATCH_ROWS or held + read > most:
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += read
    return groups
