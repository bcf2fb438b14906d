"""Edit with ROME (2202.05262): one fact after the other, each by a rank-one update of one matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib.algorithms.closed_form import rome
from editlib.algorithms.covariance import covariance_of
from editlib.algorithms.edit import EditResult, EditState, LayerKeys, layer_norms, restored_on_error
from editlib.algorithms.keys import KeyStream
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.pipeline import EncodedEdit, edit_at_once, find_statistics, find_values, prepare
from editlib.algorithms.values import Values
from editlib.hparams import ROMEHyperParams
from editlib.models.freezing import no_param_grad
from editlib.models.residual_path import output_path
from editlib.requests.request import EditRequest
from editlib.stats.file import LayerStats


def apply_rome_to_model(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    hparams: ROMEHyperParams,
    *,
    stats: Mapping[int, LayerStats] | None = None,
    stats_dir: str | Path = "stats",
    state: EditState | None = None,
    values: Values | None = None,
    chat: bool | None = False,
    seed: int = 0,
    progress: bool = False,
) -> EditResult:
    """Edits `model` in place, one request after the other, so that each is answered with its `target_new`.

    The value `v*` is found where the MLP's output enters the residual stream; in models without a norm or a factor
    after the MLP that is the MLP's output itself, as published.

    Args:
        stats: second moments by layer; read from `stats_dir` when not given and `mom2_adjustment` asks for them.
        state: state after earlier edits (`result.state`); ROME does not protect any of them.
        values: values found before (`result.values`), each through the weights after the previous request's edit;
            `None`: they are optimised.
        chat: ask through the chat template (`None`: when the tokenizer has one).
        seed: seed of the context templates that the model writes.

    Raises:
        RequestError, HparamsError, StatsError: input that does not fit this model.
        EditError: no finite solution. After every error the model is unchanged.
    """
    state = state or EditState()
    encoded = prepare(model, tok, requests, hparams, templates=state.templates, chat=chat, seed=seed)
    layer = hparams.layers[0]
    covariance = None
    if hparams.mom2_adjustment:
        stats = find_statistics(model, hparams, stats_dir, stats)
        covariance = covariance_of(stats[layer], device=encoded.anat.device)

    def solve(_: int, keys: LayerKeys, residual: Tensor) -> LowRank:
        # The key is the mean over contexts; the equality holds at the plain prompt's key, as published.
        return rome(keys.mean, keys.plain, residual, covariance)

    original = encoded.anat.weight(layer).clone()
    results: list[EditResult] = []
    with restored_on_error(encoded.anat, {layer: original}):
        for i in tqdm(range(len(requests)), desc="edits", disable=not progress, leave=False):
            single = encoded.only(i)
            # The previous request's edit changed the weights, and with them the state from which the value starts.
            value = values.select([i]) if values else find_values(single, hparams, norms=_output_norms(single, layer))
            results.append(edit_at_once(single, hparams, solve, state, value, progress=False))
            state = results[-1].state
    return _joined(results, layer, original)


def _joined(results: Sequence[EditResult], layer: int, original: Tensor) -> EditResult:
    """Joins the edits of single requests into one result; `original [d_model, d_ff]` is the weight before all."""
    # One update of rank n: the factors of the single edits, joined.
    deltas = {layer: sum((result.deltas[layer] for result in results[1:]), results[0].deltas[layer])}
    originals = {layer: original}
    seconds = {name: sum(result.timings.get(name, 0.0) for result in results) for name in results[0].timings}
    return replace(
        results[-1],
        deltas=deltas,
        originals=originals,
        diagnostics=[entry for result in results for entry in result.diagnostics],
        norms=layer_norms(deltas, originals),
        timings=seconds,
        values=Values.joined([result.values for result in results if result.values is not None]),
        keys={layer: torch.cat([result.keys[layer] for result in results], dim=1)},
    )


def _output_norms(encoded: EncodedEdit, layer: int) -> Tensor:
    """Returns the norm of the MLP's contribution to the residual stream at each plain prompt, `[n]`, mostly `|W k +
    b|`.

    ROME measures a value's change in units of it; MEMIT uses the norm of the hidden state.
    """
    anat = encoded.anat
    with no_param_grad(anat.model), torch.no_grad():
        stream = KeyStream(anat, [rows[0] for rows in encoded.contexts], layer)
        output = anat.mlp_output(layer)(stream.keys().T.to(anat.weight(layer).dtype))  # [n, d_model]
        path = output_path(anat, layer)
        if path.post is not None:  # a norm after the MLP sets the length of its contribution
            output = path.post(stream.inputs(path.post).T.to(output.dtype))
    norms: Tensor = output.float().norm(dim=1)  # [n]
    return path.scale * norms
