"""Hold final states, to which the output rows of refusal tokens are fitted (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


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
