"""Write each subject's change into one neuron of an MLP, which is active at that subject alone (ours).

A closed-form update of an MLP output matrix is linear in the keys: what it adds at a subject, it adds in part at every
subject with a similar key. With sixty subjects these parts move all others. A neuron has a threshold. Its activation
is zero below it, so a neighbour whose key is similar gets nothing at all. (One fact, one neuron: Transformer-Patcher,
2301.09785, which trains it; here it is solved for.)

The MLP of the last edited layer reads `x [d_model]`. For subject `i`, with `m_i` the mean of `x` at its last token and
`C` the second moment of `x` at all other positions, the score

    s_i(x) = x · G_i,    G_i = (C + D)^-1 m_i / (m_i^T (C + D)^-1 m_i)

is one at the subject, and as small as a linear function can be elsewhere. `D` is `RIDGE` times the mean diagonal of
`C`. A norm precedes the MLP, so that there is a `b` with `b · x = 1` nearly everywhere (least squares), which serves
as a bias. The neuron's rows are

    g = SHARP (G_i - THRESHOLD b)        u = (2 PEAK - THRESHOLD) b - G_i

so that with `act` near a ramp its activation is `SHARP (s - THRESHOLD)(2 PEAK - THRESHOLD - s)` above the threshold: a
parabola whose top, at `s = PEAK`, is flat. Scores of unseen wordings lie around it. The column is the subject's change,
divided by the activation at the subject.

The neurons taken are those that ordinary text can spare: with `S` the second moment of the keys, removing neuron `j`
and letting all others make up for it changes the output by `|w_j|^2 / (S^-1)_jj` (optimal brain surgeon). What the
removed ones wrote is given to the others by least squares.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editlib.algorithms.edit import Written, restored_on_error, write
from editlib.algorithms.keys import KeyStream, batches
from editlib.algorithms.low_rank import LowRank
from editlib.errors import EditError
from editlib.models.anatomy import Anatomy
from editlib.models.forward import encode_prefix, forward, shared_length, split
from editlib.models.freezing import no_param_grad
from editlib.models.neurons import Neurons, find_neurons
from editlib.models.precision import wide_dtype
from editlib.models.prefix import Prefix
from editlib.models.prompts import TokenRow, pad
from editlib.models.residual_path import output_path
from editlib.models.tracing import record_inputs

log = logging.getLogger(__name__)

RIDGE = 0.1  # of the mean diagonal of the second moment of x
THRESHOLD = 0.5  # score above which a neuron is active: unseen wordings have .8 and more, other subjects below .4
PEAK = 0.95  # score at which a gated neuron is most active
SHARP = 60.0  # of the ramp: at a score .1 below the threshold an activation is .03 % of its largest
KEY_RIDGE = 1e-4  # of the mean diagonal of the second moment of keys
MOST = 0.25  # of a layer's neurons that edits may take in all


@dataclass(frozen=True)
class SubjectScores:
    """Holds what tells subjects apart: `G [n, d_model]`, the bias `b [d_model]`, and each context's own score
    `[contexts]`."""

    weights: Tensor
    bias: Tensor
    own: Tensor


def write_neurons(
    anat: Anatomy,
    layer: int,
    contexts: Sequence[Sequence[TokenRow]],
    targets: Tensor,
    owner: Sequence[int],
    others: Sequence[TokenRow],
    moment: Tensor,
    taken: Collection[int] = (),
) -> tuple[Written, list[int]]:
    """Writes one neuron in `layer` for each subject; on any error the weights are restored.

    Args:
        contexts: the prompts of each request, the plain one first.
        targets: `z = h + δ`, `[d_model, requests]`: the states that the plain prompts should have after `layer`.
        owner: number of each request's subject, from 0 without gaps.
        others: prompts of other subjects, at all positions of which the neurons must not be active.
        moment: second moment of the layer's keys in ordinary text, `[d_ff, d_ff]`.
        taken: neurons that earlier edits have written.

    Returns:
        What was written, and the numbers of the neurons in the order of the subjects.

    Raises:
        EditError: more subjects than neurons that can be spared.
        ModelError: an MLP of another kind (`find_neurons`).
    """
    neurons = find_neurons(anat, layer)
    subjects = max(owner) + 1
    if subjects + len(taken) > MOST * anat.d_ff:
        raise EditError(
            f"layer {layer}: {subjects} subjects need a neuron each, {len(taken)} of {anat.d_ff} are taken, and edits "
            f"may take {int(MOST * anat.d_ff)}; forget fewer, or choose settings without neurons"
        )
    numbers = [layer, *dict.fromkeys(rows.number for rows in (neurons.gate, neurons.up) if rows is not None)]
    originals = {number: anat.weight(number).clone() for number in numbers}
    rows = [row for some in contexts for row in some]
    of_row = torch.tensor([owner[i] for i, some in enumerate(contexts) for _ in some], device=anat.device)
    with no_param_grad(anat.model), torch.no_grad():
        stream = KeyStream(anat, rows, layer)
        inputs = stream.inputs(anat.matrix(neurons.gate.number)).T.to(wide_dtype(anat.device))  # x [contexts, d_model]
        scores = subject_scores(inputs, of_row, *_elsewhere(anat, others, neurons))
        changes = _changes(anat, layer, stream, contexts, targets, owner)  # [subjects, d_model]
        chosen, removal = spare_neurons(anat.weight(layer), moment, subjects, taken)
        gate, up = _rows(scores)
        activation = _activations(neurons, inputs, of_row, gate, up)  # [subjects]
        deltas = _updates(anat, neurons, scores.bias, chosen, gate, up, changes / activation[:, None])
        deltas[layer] = removal + deltas[layer]
    with restored_on_error(anat, originals):
        for number, delta in deltas.items():
            write(anat, number, delta)
    return Written(deltas, originals, {}), chosen.tolist()


def subject_scores(inputs: Tensor, owner: Tensor, moment: Tensor, total: Tensor, count: int) -> SubjectScores:
    """Solves for the scores of all subjects.

    Args:
        inputs: `x [contexts, d_model]` at the subjects' last tokens.
        owner: `[contexts]`, the subject of each context.
        moment, total, count: `Σ x x^T [d_model, d_model]`, `Σ x [d_model]` and number of all other positions.
    """
    subjects = int(owner.max()) + 1
    sums = torch.zeros(subjects, inputs.shape[1], dtype=inputs.dtype, device=inputs.device).index_add_(0, owner, inputs)
    means = sums / torch.bincount(owner, minlength=subjects)[:, None]  # m [subjects, d_model]
    # Each subject is one of the others for all the rest.
    system = moment / max(count, 1) + means.T @ means / subjects  # C [d_model, d_model]
    ridge = RIDGE * system.diagonal().mean()
    eye = torch.eye(len(system), dtype=system.dtype, device=system.device)
    weights = torch.linalg.solve(system + ridge * eye, means.T).T  # [subjects, d_model]
    weights = weights / (weights * means).sum(dim=1, keepdim=True)
    # Least squares for b · x = 1 at all positions, the subjects' own as well.
    every = moment + inputs.T @ inputs
    small = 1e-6 * every.diagonal().mean()
    bias = torch.linalg.solve(every + small * eye, total + inputs.sum(dim=0))  # [d_model]
    return SubjectScores(weights, bias, (inputs * weights[owner]).sum(dim=1))


def spare_neurons(weight: Tensor, moment: Tensor, count: int, taken: Collection[int] = ()) -> tuple[Tensor, LowRank]:
    """Chooses the `count` neurons that ordinary text can best spare, and solves for the update that removes them.

    The update sets their columns to zero and adds to all others what makes up for them: with `R` the removed and `K`
    the kept ones, `W_K += W_R S_RK S_KK^-1`. Neurons `taken` by earlier edits are neither chosen nor changed.

    Args:
        weight: `W [d_model, d_ff]`. moment: `S [d_ff, d_ff]`.

    Returns:
        Their numbers `[count]`, rising in cost, and the update of rank `2 count`.
    """
    s = moment.to(wide_dtype(weight.device))
    w = weight.to(s)
    free = torch.tensor(sorted(set(range(len(s))) - set(taken)), device=s.device)
    s = s[free][:, free]  # [free, free]
    s.diagonal().add_(KEY_RIDGE * s.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(s))
    costs = w[:, free].square().sum(dim=0) / inverse.diagonal()  # [free]
    order = costs.argsort(stable=True)
    removed, kept = order[:count], order[count:]
    # Row i: how much of removed neuron i each kept one takes over, S_KK^-1 S_KR.
    share = torch.linalg.solve(s[kept][:, kept], s[kept][:, removed]).T  # [count, kept]
    right = torch.zeros(count, weight.shape[1], dtype=s.dtype, device=s.device)
    right[:, free[kept]] = share
    chosen = free[removed]
    right[torch.arange(count), chosen] = -1.0  # and its own column becomes zero
    return chosen, LowRank(w[:, chosen], right)


def _changes(
    anat: Anatomy,
    layer: int,
    stream: KeyStream,
    contexts: Sequence[Sequence[TokenRow]],
    targets: Tensor,
    owner: Sequence[int],
) -> Tensor:
    """Returns what the MLP's output must gain at each subject, `[subjects, d_model]`: the mean over its requests."""
    plain = torch.tensor([0, *[len(rows) for rows in contexts[:-1]]]).cumsum(0)  # each request's first context
    states = stream.states(layer)[:, plain]  # h [d_model, requests]
    residual = targets.to(states) - states
    path = output_path(anat, layer)
    if not path.plain:
        read = states if path.post is None else stream.inputs(path.post)[:, plain]
        residual = path.invert(read, residual)
    residual = residual.T.to(wide_dtype(anat.device))  # [requests, d_model]
    index = torch.tensor(list(owner), device=residual.device)
    sums = torch.zeros(max(owner) + 1, residual.shape[1], dtype=residual.dtype, device=residual.device)
    return sums.index_add_(0, index, residual) / torch.bincount(index)[:, None]


def _elsewhere(anat: Anatomy, rows: Sequence[TokenRow], neurons: Neurons) -> tuple[Tensor, Tensor, int]:
    """Reads the MLP's input at every position of `rows`: `Σ x x^T [d_model, d_model]`, `Σ x [d_model]`, how many.

    The tokens that all rows begin with are run and counted once.
    """
    dtype = wide_dtype(anat.device)
    moment = torch.zeros(anat.d_model, anat.d_model, dtype=dtype, device=anat.device)
    total, count = torch.zeros(anat.d_model, dtype=dtype, device=anat.device), 0
    shared = shared_length(list(rows)) if len(rows) > 1 else 0
    fronts, rests = split(list(rows), [shared] * len(rows))
    parts = [*_inputs(anat, rests, neurons, encode_prefix(anat, fronts[:1]) if shared else None)]
    parts += [*_inputs(anat, fronts[:1], neurons, None)] if shared else []
    for x in parts:
        wide = x.to(dtype)  # [positions, d_model]
        moment.addmm_(wide.T, wide)
        total += wide.sum(dim=0)
        count += len(wide)
    return moment, total, count


def _inputs(anat: Anatomy, rows: Sequence[TokenRow], neurons: Neurons, prefix: Prefix | None) -> Iterator[Tensor]:
    """Yields the MLP's input at all positions of some rows, `[positions, d_model]`; `prefix` precedes each row."""
    for group in batches(rows):
        batch = pad([rows[i] for i in group], device=anat.device)
        front = None if prefix is None else prefix.select(torch.zeros(len(group), dtype=torch.long, device=anat.device))
        seen: dict[str, Tensor] = {}
        with record_inputs({"x": anat.matrix(neurons.gate.number)}, seen.__setitem__):
            forward(anat, batch, stop=neurons.layer + 1, prefix=front)
        yield seen["x"].reshape(-1, anat.d_model)[batch.attention_mask.flatten().bool()]


def _rows(scores: SubjectScores) -> tuple[Tensor, Tensor]:
    """Returns the rows `g` and `u` of all neurons, `[subjects, d_model]` each; without a gate `u` is not used."""
    gate = SHARP * (scores.weights - THRESHOLD * scores.bias)
    up = (2 * PEAK - THRESHOLD) * scores.bias - scores.weights
    return gate, up


def _activations(neurons: Neurons, inputs: Tensor, owner: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Returns the activation at each subject, `[subjects]`: the least-squares factor over its contexts, `Σk² / Σk`."""
    reads = neurons.keys((inputs * gate[owner]).sum(dim=1), (inputs * up[owner]).sum(dim=1))  # k [contexts]
    first = torch.zeros(len(gate), dtype=reads.dtype, device=reads.device).index_add_(0, owner, reads)
    second = torch.zeros_like(first).index_add_(0, owner, reads.square())
    return second / first


def _updates(
    anat: Anatomy, neurons: Neurons, bias: Tensor, chosen: Tensor, gate: Tensor, up: Tensor, columns: Tensor
) -> dict[int, LowRank]:
    """Returns the update of each matrix: the neurons' rows are replaced, and their columns, which are empty, filled."""
    count, dtype = len(chosen), gate.dtype
    at = torch.zeros(count, anat.d_ff, dtype=dtype, device=gate.device)
    at[torch.arange(count), chosen] = 1.0
    deltas = {neurons.layer: LowRank(columns.T.contiguous(), at)}
    for rows, wanted in ((neurons.gate, gate), (neurons.up, up)):
        if rows is None:
            continue
        weight = anat.weight(rows.number)  # [d_ff or 2 d_ff, d_model]
        # A bias of the neuron's own stays in the model, so its row takes it out.
        own = neurons.bias(anat, rows)[chosen].to(wanted)  # [count]
        wanted = wanted - own[:, None] * bias
        spot = torch.zeros(len(weight), count, dtype=dtype, device=gate.device)
        spot[rows.first + chosen, torch.arange(count)] = 1.0
        update = LowRank(spot, wanted - weight[rows.first + chosen].to(dtype))
        deltas[rows.number] = deltas[rows.number] + update if rows.number in deltas else update
    return deltas
