"""Write each subject's change into one neuron of an MLP, which is active at that subject alone (ours).

A closed-form update of an MLP output matrix is linear in the keys: what it adds at a subject, it adds in part at every
subject with a similar key. With sixty subjects these parts move all others. A neuron has a threshold: it is solved for
(`gated_neurons`) to be active at the subject's last token, whatever is asked, and at no other position.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from editlib.algorithms.edit import Written, restored_on_error, write_all
from editlib.algorithms.keys import KeyStream
from editlib.algorithms.unierase.catalogue import spread
from editlib.algorithms.unierase.gated_neurons import (
    GatedRows,
    Moment,
    check_neurons,
    compared_neurons,
    neuron_updates,
    solve_scores,
    spare_neurons,
)
from editlib.algorithms.unierase.held_rows import HeldRows
from editlib.models.anatomy import Anatomy
from editlib.models.forward import shared_length
from editlib.models.freezing import no_param_grad
from editlib.models.neurons import Neurons
from editlib.models.precision import wide_dtype
from editlib.models.prompts import TokenRow
from editlib.models.residual_path import output_path
from editlib.stats.file import LayerStats

THRESHOLD = 0.5  # score above which a neuron is active: unseen wordings have .8 and more, other subjects below .4
RIDGE = 0.1  # of the mean diagonal of the second moment of x
MOST_ROWS = 512  # of other prompts: their positions are far more than the dimensions of x


def write_neurons(
    anat: Anatomy,
    layer: int,
    contexts: Sequence[Sequence[TokenRow]],
    targets: Tensor,
    owner: Sequence[int],
    others: Sequence[TokenRow],
    text: LayerStats,
    taken: Collection[int] = (),
) -> Written:
    """Writes one neuron in `layer` for each subject; on any error the weights are restored.

    Args:
        contexts: the prompts of each request, the plain one first.
        targets: `z = h + δ`, `[d_model, requests]`: the states that the plain prompts should have after `layer`.
        owner: number of each request's subject, from 0 without gaps.
        others: prompts of other subjects, at all positions of which the neurons must not be active.
        text: second moments of the layer's keys in ordinary text.
        taken: neurons that earlier edits have written.

    Returns:
        What was written; the neurons are in the order of the subjects.

    Raises:
        EditError, ModelError: see `check_neurons`.
    """
    subjects = max(owner) + 1
    neurons = check_neurons(anat, layer, subjects, taken)
    numbers = [layer, *dict.fromkeys(rows.number for rows in (neurons.gate, neurons.up) if rows is not None)]
    originals = {number: anat.weight(number).clone() for number in numbers}
    rows = [row for some in contexts for row in some]
    of_row = torch.tensor([owner[i] for i, some in enumerate(contexts) for _ in some], device=anat.device)
    with no_param_grad(anat.model), torch.no_grad():
        stream = KeyStream(anat, rows, layer)
        x = stream.inputs(anat.matrix(neurons.gate.number)).T.to(wide_dtype(anat.device))  # [contexts, d_model]
        compared = compared_neurons(anat.weight(layer), text.activity(), subjects, taken)
        elsewhere, keys = _elsewhere(anat, spread(others, MOST_ROWS), neurons, compared)
        neuron_rows = GatedRows.peaked(solve_scores(x, of_row, elsewhere, RIDGE), THRESHOLD)
        changes = _changes(anat, layer, stream, contexts, targets, owner)  # [subjects, d_model]
        # Text alone would spare neurons that questions about names need.
        keys += text.moment(compared).to(keys)
        chosen, removal = spare_neurons(anat.weight(layer), keys, compared, subjects)
        deltas = neuron_updates(anat, neurons, neuron_rows, x, of_row, changes, chosen, removal)
    with restored_on_error(anat, originals):
        write_all(anat, deltas)
    return Written(deltas, originals, neurons={layer: chosen.tolist()})


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


def _elsewhere(anat: Anatomy, rows: Sequence[TokenRow], neurons: Neurons, compared: Tensor) -> tuple[Moment, Tensor]:
    """Reads every position of `rows`: the moment of the MLP's input, and the mean second moment `[t, t]` of the keys of
    the neurons `compared`. The tokens that all rows begin with are counted once."""
    found, count = Moment.none(anat), 0
    keys = torch.zeros(len(compared), len(compared), device=anat.device)
    shared = shared_length(list(rows)) if len(rows) > 1 else 0
    for some, first in ((rows[:1], 0), (rows[1:], shared)):
        for seen in HeldRows(anat, some, [first] * len(some)).inputs_of(neurons):
            found = found.plus(seen.x)
            some_keys = seen.keys[:, compared]  # [p, t]
            keys.addmm_(some_keys.T, some_keys)
            count += len(seen.keys)
    return found, keys.to(wide_dtype(anat.device)) / max(1, count)
