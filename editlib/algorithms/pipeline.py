"""Run the pipeline that ROME, MEMIT and its variants, AlphaEdit and UniErase share.

1. `prepare` checks the requests and encodes them: each prompt in every context template, with its target.
2. `find_values` finds the value of each request: the hidden state `z = h + δ` after the last edited layer that makes
   the model generate the target.
3. `edit_at_once` spreads the values over the layers (`edit.write_layers`); the algorithm's `solve` gives each layer's
   update from keys and residuals.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib.algorithms.contexts import context_templates, subject_prompts
from editlib.algorithms.edit import EditResult, EditState, Solve, Timer, layer_norms, write_layers
from editlib.algorithms.keys import KeyStream
from editlib.algorithms.values import Values, compute_zs
from editlib.errors import EditError, HparamsError, RequestError
from editlib.hparams import ClosedFormHyperParams, HyperParams
from editlib.models.anatomy import Anatomy, anatomy
from editlib.models.freezing import no_param_grad
from editlib.models.precision import cast_params, fast_dtype
from editlib.models.prompts import LookupPlace, PromptFormat, TokenRow
from editlib.requests.request import EditRequest
from editlib.stats.file import LayerStats
from editlib.stats.store import find_layers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedEdit:
    """Holds requests as a model reads them; each list has one entry per request."""

    anat: Anatomy
    form: PromptFormat
    requests: list[EditRequest]
    contexts: list[list[TokenRow]]  # the request's prompt in every template, the plain one first
    targets: list[tuple[int, ...]]  # token ids of the targets, which must follow the prompts
    kl_prompts: list[list[TokenRow]]  # texts about the subject whose predictions the value must preserve
    weights: list[list[float]] | None = None  # of the contexts in the request's key, sum 1; `None`: all equal
    templates: tuple[str, ...] = ("{}",)

    def only(self, i: int) -> EncodedEdit:
        """Returns the edit of request `i` alone."""
        mine = slice(i, i + 1)
        return replace(
            self,
            requests=self.requests[mine],
            contexts=self.contexts[mine],
            targets=self.targets[mine],
            kl_prompts=self.kl_prompts[mine],
            weights=self.weights and self.weights[mine],
        )


def prepare(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    hparams: ClosedFormHyperParams,
    *,
    templates: Sequence[str] = (),
    chat: bool | None = False,
    seed: int = 0,
) -> EncodedEdit:
    """Encodes edits towards `target_new`.

    Args:
        templates: context templates generated before an earlier edit (`EditState.templates`); if there are none and
            `hparams` names none, the model generates them now.

    Raises:
        RequestError: none given, or one without what `hparams` needs.
        ModelError, HparamsError: settings that do not fit this model.
    """
    # 1. Errors in requests and settings come before any work.
    requests = check_requests(requests, hparams.algorithm, subject=hparams.fact_token != "last")
    anat = anatomy(model)
    check_fit(anat, hparams)
    form = PromptFormat.of(tok, chat)
    # 2. Templates of an earlier edit are reused: an edited model would generate others, and keys would not compare.
    templates = hparams.context_templates or templates
    if not templates:
        templates = context_templates(anat, form, hparams.context_template_length_params, seed=seed)
    # 3. One list of contexts per request; its wordings come first in each template.
    contexts = [encode_contexts(form, request, templates, hparams.fact_token) for request in requests]
    targets = [form.answer_ids(str(request.target_new), request.question) for request in requests]
    weights = None
    if hparams.plain_share is not None:
        weights = [_weights(len(rows), len(rows) // len(templates), hparams.plain_share) for rows in contexts]
    return EncodedEdit(
        anat, form, requests, contexts, targets, subject_prompts(anat, form, requests), weights, tuple(templates)
    )


def _weights(contexts: int, plain: int, share: float) -> list[float]:
    """Returns weights of a request's contexts: `share` in all for the first `plain`, the rest for the others."""
    others = contexts - plain
    if not others:
        return [1 / plain] * plain
    return [share / plain] * plain + [(1 - share) / others] * others


def check_requests(requests: Sequence[EditRequest], algorithm: str, *, subject: bool) -> list[EditRequest]:
    """Checks that each request has a target and, where `subject` is wanted, a subject, and returns them.

    Raises:
        RequestError: names the request and what it lacks.
    """
    if not requests:
        raise RequestError("no request to edit was given; give at least one")
    for request in requests:
        where = request.source or f"request {request.id}"
        if request.target_new is None:
            raise RequestError(
                f'{where}: has no "target_new"; {algorithm} edits a fact towards a new answer: add it, or remove the '
                "fact with UniErase (editlib unlearn)"
            )
        if subject and request.subject is None:
            raise RequestError(
                f'{where}: has no "subject"; {algorithm} edits at the subject: add it, or set fact_token to "last"'
            )
    return list(requests)


def check_fit(anat: Anatomy, hparams: HyperParams) -> None:
    """Checks those settings that depend on the model.

    Raises:
        ModelError, HparamsError: a layer or a module template that this model does not have; layers on several devices.
    """
    anat.check_layers(hparams.layers)
    anat.check_one_device()
    hparams.check_depth(anat.n_layers)
    for layer in hparams.layers:
        module_name = anat.mlp_output_names[layer]
        if hparams.rewrite_module_tmp is not None and hparams.rewrite_module_tmp.format(layer) != module_name:
            raise HparamsError(
                f'key "rewrite_module_tmp": {hparams.rewrite_module_tmp!r}; expected what is edited in this model, '
                f"{module_name!r} for layer {layer}; leave the key out and it is found"
            )


def encode_contexts(
    form: PromptFormat, request: EditRequest, templates: Sequence[str], fact_token: str
) -> list[TokenRow]:
    """Encodes a request's prompt and further wordings in every template; the plain prompt comes first."""
    return [
        form.encode(
            wording.text, wording.subject, start=wording.start, template=template, place=cast(LookupPlace, fact_token)
        )
        for template in templates
        for wording in request.filled_wordings
    ]


def find_values(
    encoded: EncodedEdit,
    hparams: ClosedFormHyperParams,
    *,
    groups: Sequence[Sequence[int]] | None = None,
    norms: Tensor | None = None,
    progress: bool = False,
) -> Values:
    """Finds the values of the requests: states after the last of `layers` that make the model generate each target.

    The change `δ` is found in the dtype of `v_precision`, and added to the states in the model's own dtype.

    Args:
        groups: indices of requests that share one change `δ`, found in the contexts of all of them; they must have one
            target and one set of KL prompts. `None`: each request has its own.
        norms: see `compute_zs`; not with `groups`.
    """
    anat, layer = encoded.anat, hparams.layers[-1]
    groups = groups or [[i] for i in range(len(encoded.requests))]
    first = [group[0] for group in groups]  # its target and KL prompts are those of the group
    group_of = {i: number for number, group in enumerate(groups) for i in group}  # from groups back to requests
    with no_param_grad(anat.model):
        with cast_params(anat.model, fast_dtype(anat.model) if hparams.v_precision == "fast" else None):
            values = compute_zs(
                anat,
                [[row for i in group for row in encoded.contexts[i]] for group in groups],
                [encoded.targets[i] for i in first],
                layer,
                kl_prompts=[encoded.kl_prompts[i] for i in first],
                steps=hparams.v_num_grad_steps,
                lr=hparams.v_lr,
                weight_decay=hparams.v_weight_decay,
                clamp_norm_factor=hparams.clamp_norm_factor,
                kl_factor=hparams.kl_factor,
                stop_loss=hparams.early_stop_loss,
                optimizer=hparams.v_optimizer,
                norms=norms,
                names=[encoded.requests[i].id for i in first],
                progress=progress,
            ).select([group_of[i] for i in range(len(encoded.requests))])
        # h in the model's own dtype: the descent may have run in bf16.
        current = KeyStream(anat, [rows[0] for rows in encoded.contexts], layer).states(layer)  # [d_model, n]
    targets = current + values.deltas  # z = h + δ, [d_model, n]
    if hparams.rescale_norm:
        # NAS (2602.02543): the direction of z, the norm of h.
        targets = targets * (current.norm(dim=0) / targets.norm(dim=0).clamp_min(torch.finfo(targets.dtype).tiny))
    return replace(values, targets=targets, deltas=targets - current if hparams.rescale_norm else values.deltas)


def value_diagnostics(requests: Sequence[EditRequest], values: Values) -> list[dict[str, Any]]:
    """Returns, per request, its id and the steps, target NLL and relative norm of its value.

    Warns of targets that are still less likely than 1/2.

    Raises:
        EditError: a number is not finite; names the request.
    """
    diagnostics: list[dict[str, Any]] = [{"id": request.id, **values.numbers(i)} for i, request in enumerate(requests)]
    for i, request in enumerate(requests):
        numbers = values.numbers(i)
        if not all(math.isfinite(number) for number in numbers.values()):
            raise EditError(f"request {request.id} gave {numbers}; the model is unchanged: lower `v_lr`")
    # An NLL over log 2 is a probability under 1/2: greedy decoding may say something else.
    unlikely = [entry["id"] for entry in diagnostics if entry["target_nll"] > math.log(2)]
    if unlikely:
        count = f"{len(unlikely)} of {len(diagnostics)}"
        log.warning("the target stayed unlikely for %s requests, first %s", count, unlikely[0])
    return diagnostics


def find_statistics(
    model: PreTrainedModel,
    hparams: ClosedFormHyperParams,
    stats_dir: str | Path,
    given: Mapping[int, LayerStats] | None = None,
) -> Mapping[int, LayerStats]:
    """Returns the statistics of the layers to edit: those `given`, or stored ones, as by `find_layers`."""
    return find_layers(
        stats_dir,
        str(model.name_or_path),
        anatomy(model),
        hparams.layers,
        given=given,
        dataset=hparams.mom2_dataset,
        samples=hparams.mom2_n_samples,
    )


def edit_at_once(
    encoded: EncodedEdit,
    hparams: ClosedFormHyperParams,
    solve: Solve,
    state: EditState,
    values: Values | None,
    progress: bool,
) -> EditResult:
    """Edits all requests together: `values` (found when `None`) are spread over `layers`, each solved by `solve`.

    Raises:
        EditError: no finite solution; the model is unchanged.
    """
    timer = Timer()
    with no_param_grad(encoded.anat.model):
        if values is None:
            with timer("values"):
                values = find_values(encoded, hparams, progress=progress)
        diagnostics = value_diagnostics(encoded.requests, values)
        with timer("write"):
            written = write_layers(
                encoded.anat, hparams.layers, encoded.contexts, values.targets, solve, weights=encoded.weights
            )
    return EditResult(
        written.deltas,
        written.originals,
        diagnostics=diagnostics,
        norms=layer_norms(written.deltas, written.originals),
        timings=timer.seconds,
        state=replace(state.with_keys(written.keys), templates=encoded.templates),
        values=values,
        keys=written.keys,
    )
