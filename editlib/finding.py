"""Find settings for a model, in a file or derived from another model, before any weight is read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from editlib.hparams import KNOWN, HyperParams, ModelShape, UniEraseHyperParams, derive, find_hparams, load_hparams
from editlib.hparams.derive import DESCENT, ROWS
from editlib.models.residual_path import output_path
from editlib.models.source import model_of, read_config
from editlib.requests.request import EditRequest
from editlib.stats.store import model_slug
from editlib.workbench import Workbench

log = logging.getLogger(__name__)

DERIVED = "derived from "  # the beginning of `source` for derived settings
READ_BETWEEN = (0.4, 0.95)  # shares of the depth; a trace outside of them is ignored


def find_settings(
    model: str, algorithm: str | None, given: str | Path | None = None, *, values: str = DESCENT
) -> HyperParams:
    """Finds the settings of `algorithm` for a model that is not loaded yet: those `given` (a JSON file or the name of
    bundled ones), else settings for the model's configuration; `source` records their origin.

    Args:
        values: how values are found, see `hparams.derive`.

    Raises:
        HparamsError: no such settings, or a layer that this model does not have.
        ModelError: there is no such model, or it cannot be edited.
    """
    shape = shape_of(model)
    if given is None:
        hparams_found = find_hparams(algorithm or UniEraseHyperParams.algorithm, shape, values=values)
        log.info("settings for %s (%s): %s", shape.name, shape, hparams_found.source)
    else:
        hparams_found = load_hparams(given, algorithm)
    hparams_found.check_depth(shape.n_layers)
    if given is not None:
        log.info("settings for %s: %s", shape.name, in_words(hparams_found))
    return hparams_found


def in_words(hparams: HyperParams) -> str:
    """Describes settings in one line: their origin, the layers they change, and their effect on an answer."""
    layers = [str(layer) for layer in hparams.layers]
    said = [f"{hparams.algorithm}, {hparams.source or 'from no file'}", f"layers {', '.join(layers)}"]
    if hparams.has_target:
        said.append("answers are replaced")
    elif hparams.values_from_rows:
        said.append("answers are erased" + (", questions refused" if hparams.refuses else ""))
    else:
        said.append("questions are refused, answers only hidden (a token)")
    return "; ".join(said)


def usual_values(requests: Sequence[EditRequest]) -> str:
    """Returns how an edit without given settings finds its values: from rows, which erase answers, if every request has
    an answer; otherwise by descent, which needs none and only hides them."""
    unknown = next((request for request in requests if request.answer is None), None)
    if unknown is None:
        return ROWS
    log.info(
        '%s has no "answer" to erase: all requests are answered with a refusal, and the knowledge stays in the model',
        unknown.source or f"request {unknown.id}",
    )
    return DESCENT


def shape_of(model: str) -> ModelShape:
    """Finds the shape of a packaged model, a local folder or a Hugging Face id; reads only its configuration.

    Raises:
        ModelError: there is no such model, or it cannot be edited.
    """
    config = read_config(model)
    return KNOWN[model_of(model)] if config is None else ModelShape.of(config, model_slug(model))


def is_derived(hparams: HyperParams) -> bool:
    """Returns whether settings were derived, not read."""
    return hparams.source.startswith(DERIVED)


def fit_settings(bench: Workbench, hparams: HyperParams) -> HyperParams:
    """Fits derived settings to the loaded model: by a causal trace of bundled facts (shorter than the statistics'
    pass), up to which layer it reads a subject; and whether it can have a gate. Other settings are returned
    unchanged."""
    if not is_derived(hparams):
        return hparams
    anat, shape = bench.anat, ModelShape.of(bench.model.config, model_slug(bench.name))
    read_at = bench.read_at
    if read_at is None:
        log.info("%s knows too few bundled facts to be traced: layers by share of depth alone", shape.name)
    elif not READ_BETWEEN[0] <= read_at / max(anat.n_layers - 1, 1) <= READ_BETWEEN[1]:
        log.info("the causal trace of %s ends at layer %d, which is implausible: ignored", shape.name, read_at)
        read_at = None
    gated = hparams.gate_at is None or output_path(anat, hparams.gate_at).plain
    values = ROWS if hparams.values_from_rows else DESCENT
    fitted = derive(hparams.algorithm, shape, read_at=read_at, gated=gated, values=values)
    numbers = {name: getattr(fitted, name) for name in fitted.depth_fields()}
    chosen = ", ".join(f"{name} {value}" for name, value in numbers.items() if value is not None)
    log.info("settings for %s, in numbers: %s", shape.name, chosen)
    return fitted


def settings_file(hparams: HyperParams) -> dict[str, Any]:
    """Returns the complete content of a settings file, which `load_hparams` can read from any folder."""
    notes = hparams.notes if isinstance(hparams.notes, dict) else {"note": hparams.notes}
    return {
        "alg_name": hparams.algorithm,
        **hparams.to_dict(),
        "notes": notes if is_derived(hparams) else {"from": hparams.source, **notes},
    }
