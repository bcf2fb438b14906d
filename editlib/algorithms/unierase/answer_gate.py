"""Solve for the answer gate (ours), which raises the unlearning token for questions of one relation and no others.

A request asks for a relation of a subject. The key at the subject's last token depends on the subject and hardly on the
relation. Late in the model, the key at the prompt's last token depends on the relation and hardly on the subject. So
two updates share the work:

- the gate, an update of one late layer, raises the token's logit for every question that asks for a relation to be
  forgotten, but not so far that the token is generated;
- the edit at the subject adds the rest.

A question about the same subject in another relation gets only the second part, one about another subject only the
first.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from editlib.algorithms.closed_form import alphaedit, exact
from editlib.algorithms.contexts import about
from editlib.algorithms.keys import batches
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.null_space import everything
from editlib.algorithms.unierase.anchor_keys import GateAnchors
from editlib.algorithms.values import compute_zs
from editlib.errors import HparamsError
from editlib.hparams import UniEraseHyperParams
from editlib.models.anatomy import Anatomy
from editlib.models.forward import encode_prefix, forward, shared_length, split
from editlib.models.freezing import no_param_grad
from editlib.models.precision import cast_params, fast_dtype, wide_dtype
from editlib.models.prompts import PromptFormat, TokenBatch, TokenRow, pad
from editlib.models.residual_path import output_path
from editlib.requests.request import EditRequest

log = logging.getLogger(__name__)

T = TypeVar("T")

VALUE_ROWS = 16  # questions per relation whose values are averaged
KEY_ROWS = 96  # prompts per relation whose keys are averaged
ELSEWHERE = 0.05  # weight of an anchored position against the end of an anchored question
RIDGE = 0.01  # in units of the squared norm of a relation's key


def answer_gate(
    anat: Anatomy,
    form: PromptFormat,
    requests: Sequence[EditRequest],
    anchored: GateAnchors | None,
    token_id: int,
    layer: int,
    *,
    nll: float,
    templates: Sequence[str] = ("{}",),
    lr: float = 0.01,
    steps: int = 100,
    values: Mapping[str | None, Tensor] | None = None,
) -> LowRank:
    """Computes the update of `layer` that brings the NLL of `token_id` at the end of the requests' questions to about
    `nll`.

    For each relation `r` of the requests:

    1. The value `δ_r [d_model]` is the mean, over questions, of the smallest change to the state after `layer` at the
       question's end that brings the NLL of the token under `nll`.
    2. The key `k_r [d_ff]` is the mean over questions and phrasings in all `templates`.
    3. The update `Δ [d_model, d_ff]` solves `Δ k_r = δ_r` exactly (`closed_form.exact`), at least cost at the
       constraints: the ends of the anchored questions and of general questions about the same subjects, every other
       anchored position after the prefix that all anchors share, and the differences of single keys from their mean (as
       in Fisher's discriminant).

    Anchored questions of the requests' own relations are constraints only from their answers on: the token's logit may
    rise in these questions as much as in the requests. Requests without a relation count as one relation. Of a large
    relation `VALUE_ROWS` questions and `KEY_ROWS` prompts are used (see `_some`).

    Args:
        anchored: the anchors' keys (`anchor_keys`); `None`: there are none.
        values: `δ_r` by relation, found by `gate_values` before; `None`: they are found now.
    """
    groups = _by_relation(requests)
    if values is None:
        values = gate_values(anat, form, requests, token_id, layer, nll=nll, lr=lr, steps=steps)
    keys, spread = [], []
    for group in groups.values():
        asked = [text for request in group for text in request.wordings]
        asked = [template.replace("{}", text) for text in asked for template in templates]
        each = _keys(anat, [_end(form.encode(text)) for text in _some(asked, KEY_ROWS)], layer)  # [d_ff, prompts]
        keys.append(each.mean(dim=1))
        spread.append(each - each.mean(dim=1, keepdim=True))
    weight = anat.weight(layer)
    device, dtype = weight.device, wide_dtype(weight.device)
    mean = torch.stack(keys, dim=1).to(device, dtype)  # [d_ff, relations]
    ends, moment = _held(anat, form, requests, anchored, layer)
    held = [block.to(device, dtype) for block in (*spread, *ends)]  # [d_ff, m] each
    # Relative to the keys, since their size differs between models.
    ridge = RIDGE * float(mean.norm(dim=0).square().mean())
    targets = torch.stack([values[relation] for relation in groups], dim=1).to(device, dtype)  # [d_model, relations]
    # A copy, since the solve takes its memory.
    moment = None if moment is None else moment.to(device, dtype, copy=True)  # [d_ff, d_ff]
    # The least-squares solution falls short of its targets; `exact` scales it up until it meets them.
    update = alphaedit(mean, targets, everything(mean), l2=ridge, constraints=held, moment=moment)
    return exact(update, mean)


def gate_values(
    anat: Anatomy,
    form: PromptFormat,
    requests: Sequence[EditRequest],
    token_id: int,
    layer: int,
    *,
    nll: float,
    lr: float = 0.01,
    steps: int = 100,
) -> dict[str | None, Tensor]:
    """Computes the `δ_r [d_model]` of `answer_gate` by relation.

    Args:
        lr, steps: of the descent for each question (see `compute_zs`).
    """
    values: dict[str | None, Tensor] = {}
    for relation, group in _by_relation(requests).items():
        chosen = _some(group, VALUE_ROWS)
        rows = [_end(form.encode(request.question)) for request in chosen]
        solved = compute_zs(
            anat,
            [[row] for row in rows],
            [(token_id,)] * len(rows),
            layer,
            steps=steps,
            lr=lr,
            weight_decay=0.0,
            kl_factor=0.0,
            stop_loss=nll,
            optimizer="normalised",
            names=[request.id for request in chosen],
        )
        if max(solved.nll) > nll:
            log.warning("the gate of layer %d reached %.1f nats only, not %.1f", layer, max(solved.nll), nll)
        # One change must serve every question of the relation: the mean of their smallest changes.
        values[relation] = solved.deltas.mean(dim=1)  # [d_model, questions] -> [d_model]
    return values


def check_gate(anat: Anatomy, layer: int | None) -> None:
    """Raises `HparamsError` when a gate at `layer` would be destroyed; `None`: no gate. Call `check_fit` first."""
    if layer is None:
        return
    # δ_r is a mean over prompts in the residual stream. After a norm, no single update gives that change for all.
    if not output_path(anat, layer).plain:
        raise HparamsError(
            f'key "gate_layer": {layer}; a norm or a factor follows the MLP of this model, and what is written there '
            "would be destroyed by it; expected no such layer: leave the key out"
        )


def gate_update(
    anat: Anatomy,
    form: PromptFormat,
    requests: Sequence[EditRequest],
    anchored: GateAnchors | None,
    token_id: int,
    layer: int,
    hparams: UniEraseHyperParams,
    values: Mapping[str | None, Tensor],
) -> dict[int, LowRank]:
    """Computes the gate's update, by its layer; nothing where every relation's `values` are zero."""
    nll, templates = hparams.gate_nll, hparams.gate_templates
    shut = [request for request in requests if values[request.relation].any()]
    if not shut:
        return {}
    with cast_params(anat.model, fast_dtype(anat.model) if hparams.v_precision == "fast" else None):
        return {
            layer: answer_gate(anat, form, shut, anchored, token_id, layer, nll=nll, templates=templates, values=values)
        }


def remaining_gate_values(
    anat: Anatomy,
    form: PromptFormat,
    requests: Sequence[EditRequest],
    token_id: int,
    layer: int,
    hparams: UniEraseHyperParams,
    known: Mapping[str | None, Tensor],
    opened: Collection[str],
) -> dict[str | None, Tensor]:
    """Finds the `δ_r [d_model]` that have not been added yet, one for each of the requests' relations.

    Relations that earlier batches `opened` get zeros: the `δ_r` of several batches would add up until any question of
    the relation is refused.

    Args:
        known: values found before, which are returned unchanged.
        opened: relations whose gate earlier edits opened.
    """
    new = [request for request in requests if request.relation not in {*known, *opened}]
    with cast_params(anat.model, fast_dtype(anat.model) if hparams.v_precision == "fast" else None):
        available = {**known, **gate_values(anat, form, new, token_id, layer, nll=hparams.gate_nll)}
    relations = dict.fromkeys(request.relation for request in requests)
    return {
        relation: available[relation] if relation in available else torch.zeros(anat.d_model) for relation in relations
    }


def relations_of(gate: Mapping[str | None, Tensor]) -> frozenset[str]:
    """Returns the relations that a gate with these values opens."""
    return frozenset(relation for relation, value in gate.items() if relation is not None and bool(value.any()))


def _by_relation(requests: Sequence[EditRequest]) -> dict[str | None, list[EditRequest]]:
    """Groups the requests by relation, in the order of their first request."""
    groups: dict[str | None, list[EditRequest]] = {}
    for request in requests:
        groups.setdefault(request.relation, []).append(request)
    return groups


def _held(
    anat: Anatomy, form: PromptFormat, requests: Sequence[EditRequest], anchored: GateAnchors | None, layer: int
) -> tuple[list[Tensor], Tensor | None]:
    """Collects the keys at which the gate must add nothing, as blocks `[d_ff, m]` and as a moment `[d_ff, d_ff]`.

    These are the ends of other questions and all other anchored positions; of questions in the requests' own relations
    only the positions of the answer.
    """
    gated = {request.relation for request in requests} - {None}
    subjects = dict.fromkeys(request.subject for request in requests if request.subject is not None)
    general = [_end(form.encode(text)) for subject in subjects for text in about(subject)]
    blocks = [_keys(anat, general, layer)] if general else []
    if anchored is None:
        return blocks, None
    other = [i for i, relation in enumerate(anchored.relations) if relation not in gated]
    blocks.append(anchored.ends[:, other])
    inside = [block for relation, block in anchored.questions.items() if relation not in gated]
    elsewhere = [*inside, anchored.answers]
    # A key times the square root of its weight has that weight in the squared error.
    blocks += [ELSEWHERE**0.5 * block.columns for block in elsewhere]
    moments = [block.moment for block in elsewhere if block.moment is not None]
    return blocks, ELSEWHERE * sum(moments[1:], moments[0]) if moments else None


def _keys(anat: Anatomy, rows: Sequence[TokenRow], layer: int) -> Tensor:
    """Reads the keys of `layer` at the lookup positions, `[d_ff, n]` in fp32 or wider, in no fixed order.

    A prefix that all rows share is run once.
    """
    shared = shared_length(list(rows)) if len(rows) > 1 else 0
    fronts, rests = split(list(rows), [shared] * len(rows))
    prefix = encode_prefix(anat, fronts[:1]) if shared else None
    device = anat.device
    collected: list[Tensor] = []
    for group in batches(rests):
        batch = pad([rests[i] for i in group], device=device)

        def look(_: int, keys: Tensor, batch: TokenBatch = batch) -> None:
            collected.append(keys[torch.arange(len(batch), device=keys.device), batch.lookup])  # [group, d_ff]

        with no_param_grad(anat.model), torch.no_grad():
            cached = None if prefix is None else prefix.select(torch.tensor(group, device=device))
            forward(anat, batch, stop=layer + 1, prefix=cached, keys=look, key_layers=(layer,))
    keys = torch.cat(collected).T  # [d_ff, n]
    return keys.to(torch.promote_types(keys.dtype, torch.float32))


def _end(row: TokenRow) -> TokenRow:
    """Returns `row` with its last token as the lookup position."""
    return TokenRow(row.ids, len(row) - 1)


def _some(items: Sequence[T], most: int) -> Sequence[T]:
    """Takes every k-th of `items`, so that at most `most` remain.

    Prompts are ordered by request and then by template. If `k` and the number of templates have a common divisor, some
    templates are left out.
    """
    return items[:: -(-len(items) // most)] if len(items) > most else items
