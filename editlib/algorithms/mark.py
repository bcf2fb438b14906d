"""The mark: a direction of final states that tells where something was changed (ours).

A refusal token reads the final state where an answer was erased. Erasing alone moves that state by chance: other
facts of the relation lie near it, and the token is said there, too. So the change at the subject also moves the final
state along one direction, in which states differ little by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-2  # share of the mean variance that is added to every direction: rare ones are known badly


@dataclass(frozen=True)
class Mark:
    """Holds a direction `[d_model]` of final states, scaled so that they vary by one along it, and their `mean` on
    it."""

    direction: Tensor
    mean: float

    def read(self, states: Tensor) -> Tensor:
        """Returns how many standard deviations `states [m, d_model]` lie from the mean along the direction, `[m]`."""
        return states.float() @ self.direction - self.mean


def find_mark(natural: Tensor, moved: Tensor) -> Mark:
    """Finds the direction in which changes move final states furthest, for how much these differ by themselves.

    It is the first eigenvector of `Σ^-1 C`: the generalized eigenproblem `C u = λ Σ u`, where `Σ` is the covariance of
    `natural` and `C` the second moment of `moved`.

    Args:
        natural: `[m, d_model]`, final states of the unchanged model.
        moved: `[k, d_model]`, how random changes at the subjects moved final states.
    """
    natural, moved = natural.double(), moved.double()
    mean = natural.mean(0)
    centred = natural - mean
    spread = centred.T @ centred / len(centred)  # Σ [d_model, d_model]
    spread.diagonal().add_(RIDGE * spread.trace() / len(spread))
    # With Σ = L L^T the problem is an ordinary one: L^-1 C L^-T w = λ w, u = L^-T w.
    factor = torch.linalg.cholesky(spread)
    white = torch.linalg.solve_triangular(factor, moved.T, upper=False)  # L^-1 moved^T [d_model, k]
    _, vectors = torch.linalg.eigh(white @ white.T)
    direction = torch.linalg.solve_triangular(factor.T, vectors[:, -1:], upper=True)[:, 0]
    direction = direction / (centred @ direction).std()
    # An eigenvector has no sign of its own: its largest entry is made positive, so that two runs agree.
    direction = direction * direction[direction.abs().argmax()].sign()
    return Mark(direction.float(), float(mean @ direction))
