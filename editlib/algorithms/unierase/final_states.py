"""Hold final states, to which the output rows of refusal tokens are fitted (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
