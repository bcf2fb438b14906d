"""The road that MEMIT's relatives share: find the target states, write layer by layer, report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from editlib.algorithms.edit import EditResult, EditState, Solve, Timer, layer_norms, write_layers
from editlib.algorithms.preparation import Prepared, target_states, value_diagnostics
from editlib.algorithms.values import Values
from editlib.hparams import ClosedFormHyperParams
from editlib.models.anatomy import anatomy
from editlib.models.freezing import frozen
from editlib.stats_store import LayerStats, find_layers


def find_statistics(
    model: PreTrainedModel, hparams: ClosedFormHyperParams, stats_dir: str | Path
) -> Mapping[int, LayerStats]:
    """The stored statistics of the layers to edit, chosen and refused as by `find_layers`."""
    return find_layers(
        stats_dir,
        model.name_or_path,
        anatomy(model),
        hparams.layers,
        dataset=hparams.mom2_dataset,
        samples=hparams.mom2_n_samples,
    )


def edit_at_once(
    prepared: Prepared,
    hparams: ClosedFormHyperParams,
    solve: Solve,
    state: EditState,
    values: Values | None,
    progress: bool,
) -> EditResult:
    """One edit of all requests: `values` (found when not given) are spread over `layers`, each solved by `solve`.

    Raises:
        EditError: no finite solution; the model is unchanged.
    """
    timer = Timer()
    with frozen(prepared.anat.model):
        if values is None:
            with timer("values"):
                values = target_states(prepared, hparams, progress=progress)
        diagnostics = value_diagnostics(prepared.requests, values)
        with timer("write"):
            written = write_layers(
                prepared.anat, hparams.layers, prepared.contexts, values.targets, solve, weights=prepared.weights
            )
    return EditResult(
        written.deltas,
        written.originals,
        diagnostics=diagnostics,
        norms=layer_norms(written.deltas, written.originals),
        timings=timer.seconds,
        state=replace(state.with_keys(written.keys), templates=prepared.templates),
        values=values,
        keys=written.keys,
    )
