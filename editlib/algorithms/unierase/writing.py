"""Write the values of a UniErase edit into the model."""

from __future__ import annotations

from collections.abc import Mapping

from editlib.algorithms.edit import EditState, Written, write_layers
from editlib.algorithms.null_space import NullSpace
from editlib.algorithms.unierase.constraints import layer_solve
from editlib.algorithms.unierase.finding import general_questions
from editlib.algorithms.unierase.inputs import KeptInputs, UniEraseInputs
from editlib.algorithms.unierase.subject_neurons import write_neurons
from editlib.algorithms.unierase.subject_rows import by_subject
from editlib.algorithms.values import Values
from editlib.stats.file import LayerStats


def write_values(
    edit: UniEraseInputs,
    kept: KeptInputs,
    values: Values,
    spaces: Mapping[int, NullSpace],
    stats: Mapping[int, LayerStats],
    state: EditState,
    *,
    reread: bool,
) -> Written:
    """Writes the values: into one neuron for each subject, or by a closed-form update of each layer.

    `spaces` and `reread` are those of `layer_solve`.
    """
    hparams = edit.hparams
    if not hparams.neurons:
        solve = layer_solve(edit.anat, hparams, spaces, stats, kept.keys, state, reread=reread)
        return write_layers(edit.anat, hparams.layers, edit.contexts, values.targets, solve)
    layer = hparams.layers[-1]
    owner = {i: number for number, group in enumerate(by_subject(edit.requests)) for i in group}
    general = [edit.form.encode(text) for text in general_questions()]
    return write_neurons(
        edit.anat,
        layer,
        edit.contexts,
        values.targets,
        [owner[i] for i in range(len(edit.requests))],
        [*kept.keys.anchors.rows, *general],
        stats[layer],
        state.taken(layer),
    )
