"""Solve for neurons that are active at chosen positions alone (ours).

Group `i` of positions is to be separated from all others by a neuron of one MLP, which reads `x [d_model]`. With `m_i`
the mean of `x` over the group and `C` the second moment of `x` at all other positions, the score

    s_i(x) = x · G_i,    G_i = (C + D)^-1 m_i / (m_i^T (C + D)^-1 m_i)

is one at the group, and as small as a linear function can be elsewhere. `D` is a share of the mean diagonal of `C`. A
norm precedes the MLP, so that there is a `b` with `b · x = 1` nearly everywhere (least squares), which serves as a
bias. The neuron's rows are

    g = SHARP (G_i - THRESHOLD b)        u = (2 PEAK - THRESHOLD) b - G_i

so that with `act` near a ramp its activation is `SHARP (s - THRESHOLD)(2 PEAK - THRESHOLD - s)` above the threshold: a
parabola whose top, at `s = PEAK`, is flat. The column is what shall be added at the group, divided by the activation
there. Below the threshold the neuron adds nothing, where a linear update would add a part. (One fact, one neuron:
Transformer-Patcher, 2301.09785, which trains it; here it is solved for.)

The neurons taken are those that can best be spared: with `S` the second moment of the keys at all that must stay,
removing neuron `j` and letting all others make up for it changes the output by `|w_j|^2 / (S^-1)_jj` (optimal brain
surgeon). What the removed ones wrote is given to the others by least squares. Of a wide MLP only `MOST_COMPARED`
neurons are compared and make up for one another: those that are cheapest without any making up, `|w_j|^2 S_jj`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from editlib.algorithms.low_rank import LowRank
from editlib.errors import EditError
from editlib.models.anatomy import Anatomy
from editlib.models.neurons import Neurons, find_neurons
from editlib.models.precision import wide_dtype

PEAK = 0.95  # score at which a gated neuron is most active
SHARP = 60.0  # of the ramp: at a score .1 below the threshold an activation is .1 % of its largest
KEY_RIDGE = 1e-4  # of the mean diagonal of the second moment of keys
MOST_COMPARED = 4096  # neurons: three matrices of this width are held, in fp64
MOST = 0.25  # of a layer's neurons that edits may take in all


@dataclass(frozen=True)
class NeuronScores:
    """Holds what tells groups of positions apart: `G [n, d_model]`, and the bias `b [d_model]`."""

    weights: Tensor
    bias: Tensor


@dataclass(frozen=True)
class GatedRows:
    """Holds what replaces the rows of neurons: `g` and `u`, `[n, d_model]` each, and the bias `b [d_model]`.

    Where an MLP has one row for a neuron, `u` is not used.
    """

    gate: Tensor
    up: Tensor
    bias: Tensor

    @classmethod
    def peaked(cls, scores: NeuronScores, threshold: float) -> GatedRows:
        """Returns rows whose activation is flat where the score is `PEAK`."""
        gate = SHARP * (scores.weights - threshold * scores.bias)
        return cls(gate, (2 * PEAK - threshold) * scores.bias - scores.weights, scores.bias)

    def activations(self, neurons: Neurons, x: Tensor, owner: Tensor) -> Tensor:
        """Computes the activation at `x [m, d_model]` of each position's own neuron `owner [m]`: `[m]`."""
        x = x.to(self.gate)
        return neurons.keys((x * self.gate[owner]).sum(dim=1), (x * self.up[owner]).sum(dim=1))


@dataclass(frozen=True)
class Moment:
    """Holds weighted sums over positions: `Σ x x^T [d_model, d_model]`, `Σ x [d_model]`, and the sum of weights."""

    second: Tensor
    first: Tensor
    weight: float

    @classmethod
    def none(cls, anat: Anatomy) -> Moment:
        """Returns the sums over no position."""
        zeros = torch.zeros(anat.d_model, anat.d_model, dtype=wide_dtype(anat.device), device=anat.device)
        return cls(zeros, zeros[0].clone(), 0.0)

    def plus(self, x: Tensor, weight: Tensor | None = None) -> Moment:
        """Returns the sums with positions `x [m, d_model]` added, of `weight [m]` each, or one."""
        wide = x.to(self.second)
        weighed = wide if weight is None else wide * weight.to(wide)[:, None]
        total = float(len(wide) if weight is None else weight.sum())
        return Moment(self.second + weighed.T @ wide, self.first + weighed.sum(dim=0), self.weight + total)

    @property
    def mean(self) -> Moment:
        """The sums divided by the sum of weights."""
        share = 1 / (self.weight or 1.0)
        return Moment(self.second * share, self.first * share, 1.0)

    def __add__(self, other: Moment) -> Moment:
        return Moment(self.second + other.second, self.first + other.first, self.weight + other.weight)


def check_neurons(anat: Anatomy, layer: int, subjects: int, taken: Collection[int] = ()) -> Neurons:
    """Returns how the neurons of `layer` compute, where there are enough of them for `subjects`.

    Raises:
        EditError: more subjects than neurons that can be spared.
        ModelError: an MLP of another kind (`find_neurons`).
    """
    if subjects + len(taken) > MOST * anat.d_ff:
        raise EditError(
            f"layer {layer}: {subjects} subjects need a neuron each, {len(taken)} of {anat.d_ff} are taken, and edits "
            f"may take {int(MOST * anat.d_ff)}; forget fewer, or choose settings without neurons"
        )
    return find_neurons(anat, layer)


def solve_scores(x: Tensor, owner: Tensor, elsewhere: Moment, ridge: float) -> NeuronScores:
    """Solves for the scores of all groups.

    Args:
        x: `[m, d_model]`, at the positions of all groups. owner: `[m]`, the group of each.
        elsewhere: over all other positions, where no neuron may be active.
        ridge: of the mean diagonal of `C`.
    """
    x = x.to(elsewhere.second)
    groups = int(owner.max()) + 1
    sums = torch.zeros(groups, x.shape[1], dtype=x.dtype, device=x.device).index_add_(0, owner, x)
    means = sums / torch.bincount(owner, minlength=groups)[:, None]  # m [groups, d_model]
    # Each group is one of the others for all the rest.
    system = elsewhere.mean.second + means.T @ means / groups  # C [d_model, d_model]
    system.diagonal().add_(ridge * system.diagonal().mean())
    weights = torch.linalg.solve(system, means.T).T  # [groups, d_model]
    weights = weights / (weights * means).sum(dim=1, keepdim=True)
    # Least squares for b · x = 1 at all positions, the groups' own as well.
    every = elsewhere + Moment.plus(Moment(torch.zeros_like(system), torch.zeros_like(system[0]), 0.0), x)
    every.second.diagonal().add_(1e-6 * every.second.diagonal().mean())
    bias = torch.linalg.solve(every.second, every.first)  # [d_model]
    return NeuronScores(weights, bias)


def compared_neurons(weight: Tensor, activity: Tensor, count: int, taken: Collection[int] = ()) -> Tensor:
    """Returns the numbers of the neurons to compare where `count` are needed, in ascending order: `[t]`.

    Neurons `taken` by earlier edits are not among them.

    Args:
        weight: `W [d_model, d_ff]`.
        activity: the mean square of each neuron's key, `[d_ff]`.
    """
    free = torch.tensor(sorted(set(range(len(activity))) - set(taken)), device=weight.device)
    most = max(MOST_COMPARED, 2 * count)
    if len(free) <= most:
        return free
    costs = weight[:, free].float().square().sum(dim=0) * activity.to(weight.device)[free]  # [free]
    return free[costs.argsort(stable=True)[:most]].sort().values


def spare_neurons(weight: Tensor, moment: Tensor, compared: Tensor, count: int) -> tuple[Tensor, LowRank]:
    """Chooses the `count` neurons that can best be spared, and solves for the update that removes them.

    The update sets their columns to zero and adds to all others that are compared what makes up for them: with `R` the
    removed and `K` the kept ones, `W_K += W_R S_RK S_KK^-1`.

    Args:
        weight: `W [d_model, d_ff]`.
        moment: `S [t, t]`, of the neurons with the numbers `compared [t]`.

    Returns:
        Their numbers `[count]`, rising in cost, and the update of rank `2 count`.
    """
    s = moment.to(wide_dtype(weight.device), copy=True)
    w = weight.to(s)
    s.diagonal().add_(KEY_RIDGE * s.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(s))
    costs = w[:, compared].square().sum(dim=0) / inverse.diagonal()  # [t]
    order = costs.argsort(stable=True)
    removed, kept = order[:count], order[count:]
    # Row i: how much of removed neuron i each kept one takes over, S_KK^-1 S_KR = -P_KR P_RR^-1 with P = S^-1.
    share = -torch.linalg.solve(inverse[removed][:, removed], inverse[removed][:, kept])  # [count, kept]
    right = torch.zeros(count, weight.shape[1], dtype=s.dtype, device=s.device)
    right[:, compared[kept]] = share
    chosen = compared[removed]
    right[torch.arange(count), chosen] = -1.0  # and its own column becomes zero
    return chosen, LowRank(w[:, chosen], right)


def neuron_updates(
    anat: Anatomy,
    neurons: Neurons,
    rows: GatedRows,
    x: Tensor,
    owner: Tensor,
    changes: Tensor,
    chosen: Tensor,
    removal: LowRank,
) -> dict[int, LowRank]:
    """Returns the update of each matrix, by its number: the chosen neurons' rows are replaced, and their columns.

    Args:
        x, owner: as for `solve_scores`; over these positions each group's activation is averaged.
        changes: what the MLP's output must gain at each group, `[groups, d_model]`.
        chosen, removal: of `spare_neurons`.
    """
    active = rows.activations(neurons, x, owner)  # [m]
    first, second = torch.zeros(2, len(rows.gate), dtype=active.dtype, device=active.device)
    first.index_add_(0, owner, active)
    second.index_add_(0, owner, active.square())
    columns = changes.to(active) * (first / second)[:, None]  # least squares over a group's positions
    count = torch.arange(len(chosen), device=active.device)
    at = torch.zeros(len(chosen), anat.d_ff, dtype=active.dtype, device=active.device)
    at[count, chosen] = 1.0
    deltas = {neurons.layer: removal + LowRank(columns.T.contiguous(), at)}
    for part, wanted in ((neurons.gate, rows.gate), (neurons.up, rows.up)):
        if part is None:
            continue
        weight = anat.weight(part.number)  # [d_ff or 2 d_ff, d_model]
        # A bias of the neuron's own stays in the model, so its row takes it out.
        own = neurons.bias(anat, part)[chosen].to(wanted)  # [groups]
        spot = torch.zeros(len(weight), len(chosen), dtype=active.dtype, device=active.device)
        spot[part.first + chosen, count] = 1.0
        replaced = wanted - own[:, None] * rows.bias - weight[part.first + chosen].to(wanted)
        update = LowRank(spot, replaced)
        # A gate and an up projection may share one matrix.
        deltas[part.number] = deltas[part.number] + update if part.number in deltas else update
    return deltas
