"""Collect the keys that one layer's solve of UniErase must map to zero, and solve with them.

They are keys of anchors (prompts whose answers must stay), of earlier edits, and of ordinary text through its second
moment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from editlib.algorithms.closed_form import alphaedit, exact
from editlib.algorithms.edit import EditState, LayerKeys, Solve
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.null_space import NullSpace
from editlib.algorithms.unierase.anchor_keys import AnchorKeys, AnchorStream, anchor_keys
from editlib.algorithms.unierase.anchors import Anchors, choose_anchors, encode_anchors
from editlib.hparams import UniEraseHyperParams
from editlib.models.anatomy import Anatomy
from editlib.models.prompts import PromptFormat
from editlib.requests.request import EditRequest
from editlib.stats.file import LayerStats


def hold_anchors(
    anat: Anatomy,
    form: PromptFormat,
    retain: Sequence[EditRequest],
    requests: Sequence[EditRequest],
    hparams: UniEraseHyperParams,
    *,
    layers: Sequence[int] | None = None,
    known_answers: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> AnchorKeys:
    """Chooses the anchors of an edit from `retain`, and reads their keys in the current model.

    Args:
        layers: which layers' keys to read, in addition to those of the gate's layer; `None`: the layers of `hparams`.
        known_answers, seed: see `apply_unierase_to_model`.
    """
    layers = hparams.layers if layers is None else layers
    if not hparams.anchors:
        return anchor_keys(anat, Anchors((), None, (), (), ()), layers, hparams.gate_layer)
    chosen = choose_anchors(retain, requests, most=hparams.max_anchors, seed=seed)
    subjects = dict.fromkeys(request.subject for request in requests if request.subject is not None)
    anchors = encode_anchors(
        anat,
        form,
        chosen,
        subjects=tuple(subjects) if hparams.anchor_subjects else (),
        everywhere=hparams.anchor_positions == "all",
        known=known_answers,
        progress=progress,
    )
    return anchor_keys(anat, anchors, layers, hparams.gate_layer)


def layer_solve(
    anat: Anatomy,
    hparams: UniEraseHyperParams,
    spaces: Mapping[int, NullSpace],
    stats: Mapping[int, LayerStats],
    before: AnchorKeys,
    state: EditState,
    *,
    reread: bool,
) -> Solve:
    """Returns the function that solves one layer (AlphaEdit, 2410.02355, eq. 11 and 13), with all constraints.

    Args:
        before: the anchors' keys, read before the edit.
        reread: read the anchors' keys of each layer again after the layers below it have been written.
    """
    stream = AnchorStream(anat, before.anchors)

    def solve(layer: int, keys: LayerKeys, residual: Tensor) -> LowRank:
        # Writing lower layers has changed the anchors' keys a little; keys from before the edit would be out of date.
        anchored = stream.read(layer) if reread else before
        blocks, seen = _weighted(anchored, layer, hparams, keys.mean)
        # A key times the square root of its weight has that weight in the squared error.
        blocks.append(state.past_block(layer, keys.mean) * math.sqrt(hparams.past_weight))  # [d_ff, past]
        # A matrix [d_ff, d_ff] of its own, since the system is solved in its memory.
        moment = stats[layer].moment().to(keys.mean).mul_(hparams.text_weight) if hparams.text_weight else None
        if seen is not None:
            weight = hparams.anchor_weight
            moment = seen.to(keys.mean) * weight if moment is None else moment.add_(seen.to(moment), alpha=weight)
        delta = alphaedit(keys.mean, residual, spaces[layer], l2=hparams.L2, constraints=blocks, moment=moment)
        if hparams.solve == "ridge":
            return delta
        # Many constraints pull the ridge solution short of its residuals; this scales it up until it meets them.
        return exact(delta, spaces[layer].like(keys.mean).project(keys.mean), floor=hparams.exact_floor)

    return solve


def _weighted(
    anchored: AnchorKeys, layer: int, hparams: UniEraseHyperParams, like: Tensor
) -> tuple[list[Tensor], Tensor | None]:
    """Returns the anchors' weighted keys at `layer`, in the dtype of `like`: blocks `[d_ff, m]`, and a moment `[d_ff,
    d_ff]` without its weight, or `None`."""
    keys = anchored.layers[layer]
    known = torch.tensor(anchored.anchors.known, device=like.device)  # [anchors], booleans
    # At lookup positions other subjects differ from those to be forgotten, so these keys may have a larger weight.
    at_lookups = hparams.anchor_lookup_weight + hparams.anchor_known_weight * known.to(like)  # [anchors]
    blocks = [
        keys.every.columns.to(like) * math.sqrt(hparams.anchor_weight),
        keys.lookups.to(like) * at_lookups.sqrt(),
    ]
    if hparams.anchor_prefix_weight:
        blocks.append(keys.prefix.to(like) * math.sqrt(hparams.anchor_prefix_weight))
    return blocks, keys.every.moment  # of every position, once there are more than d_ff of them
