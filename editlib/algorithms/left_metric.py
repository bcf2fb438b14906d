"""Compute the left metric `Γ`: the directions of a hidden state on which the answers to keep depend.

The null space of keys protects inputs; `Γ` protects outputs. An edit leaks into another prompt as a multiple of its
residual; to first order it changes that prompt's answer by the gradient along the residual. Values that are short in
the metric `I + λ Γ` change these answers least. Since an update is `Δ = R K^+`, the same holds for `Δ`.

A solve (`LeftMetric.solve`) combines both sides: `G`, on the right, is the cost of keys of ordinary text and earlier
edits; `M`, on the left, that of output directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editlib.algorithms.contexts import SUBJECT_PROMPTS, subject_prompts
from editlib.algorithms.low_rank import LowRank
from editlib.errors import HparamsError
from editlib.models.anatomy import Anatomy
from editlib.models.forward import forward
from editlib.models.freezing import no_param_grad
from editlib.models.prompts import PromptFormat, TokenRow, pad
from editlib.models.residual_path import output_path
from editlib.requests.request import EditRequest

RIDGE = 3e-3  # ε: rows that contradict one another share the remaining residual
BATCH_ROWS = 32
SUBJECTS = 32  # most subjects from whose answers the metric of an edit is read
ANSWER_TOKENS = 24  # most tokens read of each answer


@dataclass(frozen=True)
class LeftMetric:
    """Represents `M = I + λ Γ [d_model, d_model]`, as its eigenvectors `[d_model, d_model]` and eigenvalues
    `[d_model]`."""

    vectors: Tensor
    values: Tensor

    @classmethod
    def of(cls, moment: Tensor, weight: float) -> LeftMetric:
        """Decomposes `I + weight Γ` for the `moment` `Γ [d_model, d_model]`, in fp64."""
        values, vectors = torch.linalg.eigh(moment.double().cpu())
        return cls(vectors, 1 + weight * values.clamp_min(0))

    def solve(self, residual: Tensor, system: Tensor, right: Tensor, *, ridge: float = 1.0) -> LowRank:
        """Solves `ridge M Δ G + Δ K K^T = R K^T`, the minimum of `|Δ K - R|^2 + ridge tr(M Δ G Δ^T)`.

        With `M = V diag(m) V^T` each row of `V^T Δ` has a system of its own, `V^T Δ` in row `i` being
        `(V^T R)_i (ridge m_i I + S)^-1 K^T G^-1`: one eigendecomposition of `S = K^T G^-1 K` solves all of them.

        Args:
            residual: `R [d_model, n]`.
            system: `S [n, n]`.
            right: `K^T G^-1 [n, d_ff]`.
        """
        vectors, m = self.vectors.to(residual), self.values.to(residual)  # [d_model, d_model], [d_model]
        s, u = torch.linalg.eigh((system + system.T) / 2)  # rounding leaves S a little asymmetric
        shares = 1 / (ridge * m[:, None] + s.clamp_min(0))  # [d_model, n]
        left = vectors @ ((vectors.T @ residual @ u) * shares)  # [d_model, n]
        return LowRank(left, u.T @ right)


def output_moment(anat: Anatomy, rows: Sequence[TokenRow], layer: int) -> Tensor:
    """Sums `Γ = Σ g g^T [d_model, d_model]`, scaled to a mean eigenvalue of one; zeros without rows.

    `g` is the gradient of the log probability of a row's answer (its last `extra` tokens) with respect to the state
    after `layer`, at each position of the row.
    """
    total = torch.zeros(anat.d_model, anat.d_model, device=anat.device)
    usable = [row for row in rows if row.extra]
    for start in range(0, len(usable), BATCH_ROWS):
        chunk = usable[start : start + BATCH_ROWS]
        batch = pad(chunk, device=anat.device)
        with torch.no_grad():
            hidden = forward(anat, batch, stop=layer + 1)
        hidden = hidden.detach().requires_grad_()  # [r, T, d_model]
        at = [(i, len(row) - row.extra - 1 + j, row.ids[len(row) - row.extra + j]) for i, row in enumerate(chunk)
              for j in range(row.extra)]  # fmt: skip
        index, column, token = torch.tensor(at, device=anat.device).T  # [scored] each
        with torch.enable_grad():
            logits = forward(anat, batch, start=layer + 1, hidden=hidden, score=(index, column)).float()
            chosen = logits.log_softmax(-1).gather(1, token[:, None])
            # One sum for all rows: no answer token reads the state of another row.
            (grad,) = torch.autograd.grad(chosen.sum(), hidden)
        grad = grad.float()[batch.attention_mask.bool()]  # [tokens, d_model]
        total += grad.T @ grad
    mean = total.trace() / anat.d_model
    # So λ means the same in every model, whatever the size of its gradients.
    return total / mean if bool(mean > 0) else total


def inverse_root(moment: Tensor, weight: float) -> Tensor:
    """Returns `(I + weight Γ)^-1/2 [d_model, d_model]`, symmetric, for the `moment` `Γ`."""
    values, vectors = torch.linalg.eigh(moment.double())
    root: Tensor = (vectors * (1 + weight * values.clamp_min(0)).rsqrt()) @ vectors.T
    return root.to(moment.dtype)


def find_left_metric(
    anat: Anatomy, form: PromptFormat, requests: Sequence[EditRequest], layers: Sequence[int], weight: float
) -> LeftMetric | None:
    """Reads `I + weight Γ` after the last of `layers` from the unedited model's answers about the requests' subjects.

    The questions are `SUBJECT_PROMPTS`, for at most `SUBJECTS` subjects, evenly spread. `None` for a weight of zero.

    Raises:
        HparamsError: no request names a subject, or a norm follows the MLP, whose input has another metric.
    """
    if not weight:
        return None
    if not all(output_path(anat, layer).plain for layer in layers):
        raise HparamsError(
            f'key "left_weight": {weight}; a norm or a factor follows the MLP of this model, so that the metric of the '
            "residual stream is not that of the edited matrix; expected 0: leave the key out"
        )
    by_subject = {request.subject: request for request in requests if request.subject is not None}
    asked = list(by_subject.values())[:: -(-len(by_subject) // SUBJECTS) or 1]
    with no_param_grad(anat.model):
        rows = subject_prompts(anat, form, asked, prompts=len(SUBJECT_PROMPTS), answer_tokens=ANSWER_TOKENS)
        moment = output_moment(anat, [row for prompts in rows for row in prompts], layers[-1])
    if not bool(moment.any()):
        raise HparamsError(
            f'key "left_weight": {weight}; the metric is read from questions about the subjects, and no request has a '
            '"subject" that can be asked about; expected 0: leave the key out'
        )
    return LeftMetric.of(moment, weight)


def least_norm_step(
    jacobian: Tensor, residual: Tensor, *, ridge: float = RIDGE, metric: Tensor | None = None
) -> Tensor:
    """Computes the shortest change that moves `m` rows by `residual [m]`, to first order: `[d_model]`.

    Args:
        jacobian: `A [m, d_model]`.
        ridge: ε, as a share of the mean squared length of the rows of `A`.
        metric: `M^-1/2 [d_model, d_model]`, symmetric; `None`: lengths are Euclidean.
    """
    scaled = jacobian if metric is None else jacobian @ metric  # [m, d_model]
    gram = scaled @ scaled.T  # [m, m]
    gram.diagonal().add_(ridge * gram.trace() / len(gram))
    step: Tensor = scaled.T @ torch.linalg.solve(gram, residual)  # [d_model]
    return step if metric is None else metric @ step
