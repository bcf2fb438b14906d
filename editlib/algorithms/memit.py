"""Edit with MEMIT (2210.07229) or a relative: all requests in one solve per layer, spread over several layers.

Each relative changes one line: MEMIT_seq preserves the outputs at the keys of earlier edits, EMMET (2403.14236) solves
under an equality constraint, NAS (2602.02543) keeps the norm of states (`rescale_norm`), RECT (2401.04700) keeps only
the relatively largest changes, PRUNE (2405.16821) bounds the spectrum of all changes together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib.algorithms.closed_form import emmet, memit
from editlib.algorithms.covariance import covariance_of
from editlib.algorithms.edit import EditResult, EditState, LayerKeys, layer_norms, restored_on_error, write
from editlib.algorithms.left_metric import find_left_metric
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.pipeline import edit_at_once, find_statistics, prepare
from editlib.algorithms.values import Values
from editlib.hparams import MEMITHyperParams
from editlib.models.anatomy import anatomy
from editlib.requests.request import EditRequest
from editlib.stats.file import LayerStats


def apply_memit_to_model(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    hparams: MEMITHyperParams,
    *,
    stats: Mapping[int, LayerStats] | None = None,
    stats_dir: str | Path = "stats",
    state: EditState | None = None,
    values: Values | None = None,
    chat: bool | None = False,
    seed: int = 0,
    progress: bool = False,
) -> EditResult:
    """Edits `model` in place so that every request is answered with its `target_new`.

    The class of `hparams` selects MEMIT or one of its relatives.

    Args:
        stats: second moments by layer; read from `stats_dir` when not given.
        state: state after earlier edits (`result.state`).
        values: values found before (`result.values`); `None`: they are optimised.
        chat: ask through the chat template (`None`: when the tokenizer has one).
        seed: seed of the context templates that the model writes.

    Raises:
        RequestError, HparamsError, StatsError: input that does not fit this model.
        EditError: no finite solution. After every error the model is unchanged.
    """
    state = state or EditState()
    encoded = prepare(model, tok, requests, hparams, templates=state.templates, chat=chat, seed=seed)
    stats = find_statistics(model, hparams, stats_dir, stats)
    device = encoded.anat.device
    covariances = {layer: covariance_of(stats[layer], device=device) for layer in hparams.layers}
    # λ in the paper: how much ordinary text weighs against the requests.
    weight = hparams.mom2_update_weight
    metric = find_left_metric(encoded.anat, encoded.form, encoded.requests, hparams.layers, hparams.left_weight)

    def solve(layer: int, keys: LayerKeys, residual: Tensor) -> LowRank:
        if (ridge := hparams.equality_ridge) is not None:
            return emmet(keys.mean, residual, covariances[layer], weight=weight, ridge=ridge, metric=metric)
        past = state.past_block(layer, keys.mean) if hparams.holds_past else None
        delta = memit(keys.mean, residual, covariances[layer], weight=weight, past=past, metric=metric)
        if hparams.kept_share is not None:
            return relatively_largest(delta, encoded.anat.weight(layer), hparams.kept_share)
        return delta

    if hparams.refits_totals:
        return _pruned(model, state, lambda: edit_at_once(encoded, hparams, solve, state, values, progress))
    return edit_at_once(encoded, hparams, solve, state, values, progress)


def relatively_largest(delta: LowRank, weight: Tensor, share: float) -> LowRank:
    """Keeps the `share` of an update's entries that change `weight [d_model, d_ff]` most relative to its size (RECT,
    2401.04700, eq. 6); the rest becomes zero."""
    dense = delta.dense()  # [d_model, d_ff]
    relative = (dense / (weight.to(dense) + 1e-8)).abs().flatten()  # 1e-8 as in the published code
    kept = max(1, round(share * relative.numel()))
    least = relative.kthvalue(relative.numel() - kept + 1).values
    return LowRank.full(torch.where((relative >= least).view_as(dense), dense, 0))


def restrained(total: LowRank, weight: Tensor) -> LowRank:
    """Shrinks singular values above the largest one of `weight [d_model, d_ff]` logarithmically.

    `s -> log s - log s_max + s_max` (PRUNE, 2405.16821, eq. 10).
    """
    largest = torch.linalg.matrix_norm(weight.to(total.left), 2)
    u, s, v = total.svd()
    s = torch.where(s > largest, s.log() - largest.log() + largest, s)
    return LowRank(u * s, v)


def _pruned(model: PreTrainedModel, state: EditState, edit: Callable[[], EditResult]) -> EditResult:
    """Runs `edit` on the weights as they would be without pruning, then prunes all updates so far together."""
    anat = anatomy(model)
    before = {layer: anat.weight(layer).clone() for layer in state.bases}
    with restored_on_error(anat, before):
        # 1. The weights as they would be if no total had been pruned.
        for layer, base in state.bases.items():
            anat.weight(layer).copy_(base)
            write(anat, layer, state.totals[layer])
        # 2. One more edit on top of them.
        result = edit()
        totals, bases, deltas = dict(state.totals), dict(state.bases), {}
        # 3. The new total is pruned once, from the base: pruning a pruned total would shrink it again with every edit.
        for layer, delta in result.deltas.items():
            bases.setdefault(layer, result.originals[layer])
            totals[layer] = totals[layer] + delta if layer in totals else delta
            kept = restrained(totals[layer], bases[layer])
            was = restrained(state.totals[layer], bases[layer]) if layer in state.totals else None
            # What this edit changed is the difference of the two pruned totals.
            deltas[layer] = kept if was is None else kept + LowRank(-was.left, was.right)
            anat.weight(layer).copy_(bases[layer])
            write(anat, layer, kept)
    originals = {layer: before.get(layer, result.originals[layer]) for layer in result.deltas}
    return replace(
        result,
        deltas=deltas,
        originals=originals,
        norms=layer_norms(deltas, originals),
        state=replace(result.state, totals=totals, bases=bases),
    )
