"""The pipeline that ROME, MEMIT and its variants, AlphaEdit and UniErase share.

Check and encode the requests, find the values, then solve and write layer by layer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib.algorithms.contexts import about, context_templates
from editlib.algorithms.edit import EditResult, EditState, Solve, Timer, layer_norms, write_layers
from editlib.algorithms.keys import KeyStream
from editlib.algorithms.values import Values, compute_zs
from editlib.errors import EditError, HparamsError, RequestError
from editlib.hparams import ClosedFormHyperParams, HyperParams
from editlib.models.anatomy import Anatomy, anatomy
from editlib.models.freezing import no_param_grad
from editlib.models.generation import greedy
from editlib.models.precision import cast_params, fast_dtype
from editlib.models.prompts import PromptFormat, TokenRow
from editlib.requests.request import EditRequest
from editlib.requests.templates import occurrences
from editlib.stats.file import LayerStats
from editlib.stats.store import find_layers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Requests as a model reads them: per request its contexts (the plain prompt first), the token ids that must
    follow, and the texts that its new state must not disturb."""

    anat: Anatomy
    form: PromptFormat
    requests: list[EditRequest]
    contexts: list[list[TokenRow]]
    targets: list[tuple[int, ...]]
    essence: list[list[TokenRow]]
    weights: list[list[float]] | None = None  # of the contexts in a request's key; none: all alike
    templates: tuple[str, ...] = ("{}",)

    def only(self, i: int) -> Prepared:
        """The same for request `i` alone."""
        mine = slice(i, i + 1)
        return replace(
            self,
            requests=self.requests[mine],
            contexts=self.contexts[mine],
            targets=self.targets[mine],
            essence=self.essence[mine],
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
) -> Prepared:
    """Encodes edits towards `target_new`.

    Args:
        templates: surroundings that the model wrote before (`EditState.templates`); it writes them when there are none
            and `hparams` names none either.

    Raises:
        RequestError: none given, or one without what `hparams` needs.
        ModelError, HparamsError: settings that do not fit this model.
    """
    requests = check_requests(requests, hparams.algorithm, subject=hparams.fact_token != "last")
    anat = anatomy(model)
    check_fit(anat, hparams)
    form = PromptFormat.of(tok, chat)
    templates = hparams.context_templates or templates
    if not templates:
        templates = context_templates(anat, form, hparams.context_template_length_params, seed=seed)
    contexts = [encode_contexts(form, request, templates, hparams.fact_token) for request in requests]
    targets = [form.answer_ids(str(request.target_new), request.question) for request in requests]
    weights = None
    if hparams.plain_share is not None:
        weights = [_weights(len(rows), len(rows) // len(templates), hparams.plain_share) for rows in contexts]
    return Prepared(anat, form, requests, contexts, targets, essence(anat, form, requests), weights, tuple(templates))


def _weights(contexts: int, plain: int, share: float) -> list[float]:
    """`share` for the first `plain` of a request's contexts together, the rest for the others."""
    others = contexts - plain
    if not others:
        return [1 / plain] * plain
    return [share / plain] * plain + [(1 - share) / others] * others


def check_requests(requests: Sequence[EditRequest], algorithm: str, *, subject: bool) -> list[EditRequest]:
    """The requests, if each has a target and, where `subject` is wanted, a subject.

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
    """What only the model can tell of its settings.

    Raises:
        ModelError, HparamsError: a layer or a module template that this model does not have; layers on several devices.
    """
    anat.check_layers(hparams.layers)
    anat.check_one_device()
    hparams.check_depth(anat.n_layers)
    for layer in hparams.layers:
        found = anat.mlp_output_names[layer]
        if hparams.rewrite_module_tmp is not None and hparams.rewrite_module_tmp.format(layer) != found:
            raise HparamsError(
                f'key "rewrite_module_tmp": {hparams.rewrite_module_tmp!r}; expected what is edited in this model, '
                f"{found!r} for layer {layer}; leave the key out and it is found"
            )


def encode_contexts(
    form: PromptFormat, request: EditRequest, templates: Sequence[str], fact_token: str
) -> list[TokenRow]:
    """A request's prompt and further phrasings in every template, at their lookup positions; the plain prompt first."""
    return [
        form.encode(wording.text, request.subject, start=wording.start, template=template, place=fact_token)
        for template in templates
        for wording in request.filled_wordings
    ]


def essence(
    anat: Anatomy, form: PromptFormat, requests: Sequence[EditRequest], *, prompts: int = 0, answer_tokens: int = 0
) -> list[list[TokenRow]]:
    """Per request the texts about its subject in general, which its new state must not disturb: ROME's "{} is a",
    and `prompts` general questions, each with `answer_tokens` of the answer that the model gives today."""
    bare = PromptFormat(form.tok, chat=False)
    subjects = dict.fromkeys(request.subject for request in requests if request.subject is not None)
    asked = [(subject, text) for subject in subjects for text in about(subject, prompts)]
    rows_asked = [form.encode(text, subject) for subject, text in asked]
    answers = greedy(anat, rows_asked, max_new_tokens=answer_tokens)
    rows: dict[str | None, list[TokenRow]] = {None: []}
    for subject in subjects:
        first = f"{subject} is a"
        rows[subject] = [bare.encode(first, subject)] if len(occurrences(first, subject)) == 1 else []
    for (subject, _), row, answer in zip(asked, rows_asked, answers, strict=True):
        rows[subject].append(row.followed_by(answer))
    return [rows[request.subject] for request in requests]


def target_states(
    prepared: Prepared,
    hparams: ClosedFormHyperParams,
    *,
    groups: Sequence[Sequence[int]] | None = None,
    norms: Tensor | None = None,
    progress: bool = False,
) -> Values:
    """The states at the lookup positions behind the last of `layers` from which each request's target follows.

    They are found in the dtype that `v_precision` says, and added to the states as they really are.

    Args:
        groups: requests, by number, that share one change `δ`, found in the contexts of all of them; they must have
            one target and one essence. `None`: each has its own.
        norms: see `compute_zs`; not with `groups`.
    """
    anat, layer = prepared.anat, hparams.layers[-1]
    groups = groups or [[i] for i in range(len(prepared.requests))]
    first = [group[0] for group in groups]
    group_of = {i: number for number, group in enumerate(groups) for i in group}
    with no_param_grad(anat.model):
        with cast_params(anat.model, fast_dtype(anat.model) if hparams.v_precision == "fast" else None):
            values = compute_zs(
                anat,
                [[row for i in group for row in prepared.contexts[i]] for group in groups],
                [prepared.targets[i] for i in first],
                layer,
                kl_rows=[prepared.essence[i] for i in first],
                steps=hparams.v_num_grad_steps,
                lr=hparams.v_lr,
                weight_decay=hparams.v_weight_decay,
                clamp_norm_factor=hparams.clamp_norm_factor,
                kl_factor=hparams.kl_factor,
                stop_loss=hparams.early_stop_loss,
                optimizer=hparams.v_optimizer,
                norms=norms,
                names=[prepared.requests[i].id for i in first],
                progress=progress,
            ).select([group_of[i] for i in range(len(prepared.requests))])
        today = KeyStream(anat, [rows[0] for rows in prepared.contexts], layer).states(layer)
    targets = today + values.deltas
    if hparams.rescale_norm:
        targets = targets * (today.norm(dim=0) / targets.norm(dim=0).clamp_min(torch.finfo(targets.dtype).tiny))
    return replace(values, targets=targets, deltas=targets - today if hparams.rescale_norm else values.deltas)


def value_diagnostics(requests: Sequence[EditRequest], values: Values) -> list[dict]:
    """Per request what its target state cost and came to.

    Raises:
        EditError: a number is not finite; names the request.
    """
    found = [{"id": request.id, **values.numbers(i)} for i, request in enumerate(requests)]
    for i, request in enumerate(requests):
        numbers = values.numbers(i)
        if not all(math.isfinite(number) for number in numbers.values()):
            raise EditError(f"request {request.id} gave {numbers}; the model is unchanged: lower `v_lr`")
    unlikely = [entry["id"] for entry in found if entry["target_nll"] > math.log(2)]
    if unlikely:
        count = f"{len(unlikely)} of {len(found)}"
        log.warning("the target stayed unlikely for %s requests, first %s", count, unlikely[0])
    return found


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
    with no_param_grad(prepared.anat.model):
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
