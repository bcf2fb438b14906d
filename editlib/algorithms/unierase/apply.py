"""Phase II: make every question to be forgotten answer with the unlearning token (UniErase, 2505.15674, eq. 11-13).

Values by descent aim at the token, as published; with `gate_layer` set, an answer gate (ours) goes the first half of
the way. Values from rows (ours) erase the answer; tokens that refuse are then fitted to the edited model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib import data
from editlib.algorithms.closed_form import alphaedit, exact
from editlib.algorithms.contexts import subject_prompts
from editlib.algorithms.edit import (
    EditResult,
    EditState,
    LayerKeys,
    Solve,
    Timer,
    layer_norms,
    restore,
    write,
    write_layers,
)
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.null_space import NullSpace, null_spaces
from editlib.algorithms.pipeline import EncodedEdit, check_fit, encode_contexts, find_values, value_diagnostics
from editlib.algorithms.unierase.anchor_keys import AnchorKeys, GateAnchors, anchor_keys
from editlib.algorithms.unierase.anchors import Anchors, answers_to, choose_anchors, encode_anchors
from editlib.algorithms.unierase.answer_gate import check_gate, gate_update, relations_of, remaining_gate_values
from editlib.algorithms.unierase.catalogue import Catalogue
from editlib.algorithms.unierase.refusal_places import RefusalPlaces, refusal_places
from editlib.algorithms.unierase.refusal_tokens import fit_refusal_tokens
from editlib.algorithms.unierase.row_values import RowReport, values_from_rows
from editlib.algorithms.unierase.subject_rows import by_subject, check_answers, subject_rows
from editlib.algorithms.unierase.token import UnlearningToken
from editlib.algorithms.values import Values
from editlib.errors import HparamsError, RequestError, TokenError
from editlib.hparams import UniEraseHyperParams
from editlib.models.anatomy import Anatomy, anatomy
from editlib.models.freezing import no_param_grad
from editlib.models.precision import cast_params, fast_dtype
from editlib.models.prompts import PromptFormat, TokenRow
from editlib.requests.request import EditRequest
from editlib.stats.file import LayerStats
from editlib.stats.store import find_layers

log = logging.getLogger(__name__)

MOST_KEPT = 600  # retain prompts that refusal tokens are held back from
GENERAL_STEP = 4  # every so many-th bundled question is one that refusal tokens stay out of


@dataclass(frozen=True)
class _Edit:
    """One edit's inputs, ready for the model: requests with the wordings made for them, and encoded contexts."""

    anat: Anatomy
    form: PromptFormat
    requests: list[EditRequest]
    hparams: UniEraseHyperParams
    contexts: list[list[TokenRow]]
    catalogue: Catalogue
    token_id: int | None  # of [UNL], which values by descent aim at; `None` with values from rows
    seed: int
    progress: bool

    @property
    def fits_tokens(self) -> bool:
        """Whether tokens are fitted to the edited model."""
        return self.hparams.values == "rows" and self.hparams.say

    def fast(self) -> AbstractContextManager[None]:
        """Runs the model in the dtype that the processor is fast in, where the settings allow it (`v_precision`)."""
        return cast_params(self.anat.model, fast_dtype(self.anat.model) if self.hparams.v_precision == "fast" else None)


@dataclass(frozen=True)
class _Found:
    """The values of an edit; where they were found and not given, also what their rows read and the tokens' places."""

    values: Values
    rows: RowReport = field(default_factory=dict)
    places: RefusalPlaces | None = None


def apply_unierase_to_model(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    hparams: UniEraseHyperParams,
    *,
    token: UnlearningToken | None = None,
    retain: Sequence[EditRequest] = (),
    stats: Mapping[int, LayerStats] | None = None,
    stats_dir: str | Path = "stats",
    chat: bool | None = None,
    known_answers: Mapping[str, Sequence[int]] | None = None,
    anchored: AnchorKeys | None = None,
    state: EditState | None = None,
    values: Values | None = None,
    seed: int = 0,
    progress: bool = False,
) -> EditResult:
    """Edits `model` in place so that each request's question is refused.

    With values by descent (`hparams.values`) it is answered with `token`. With values from rows the answer itself is
    erased, and then one token for each relation is fitted to the edited model (`fit_refusal_tokens`), unless
    `hparams.say` is false.

    Args:
        token: learned by `learn_token` for this model; added to `model` and `tok` if it is not there yet. With values
            from rows none is needed: it is where the fitted tokens start, and with `values` given, those that were
            fitted.
        retain: prompts whose answers must stay; the anchors are chosen from them.
        stats: second moments by layer; read from `stats_dir` when not given.
        chat: ask through the chat template (`None`: when the tokenizer has one).
        known_answers: what the model answers to retain prompts, as token ids by question; saves generating it.
        anchored: what `hold_anchors` read of a model before any of several edits, in place of `retain`; an edit that
            it is not given reads the keys of each layer after the earlier ones have been written.
        state: of the edits before (`result.state`), whose keys are held in place.
        values: values found before (`result.values`), for a replay; `None`: they are found.

    Returns:
        The updates, the originals to go back to (`result.revert(model)`), and per-request diagnostics.

    Raises:
        RequestError, HparamsError, StatsError, TokenError: input that does not fit this model.
        EditError: no finite solution. After every error the model is unchanged, but for the token that was added.
    """
    state = state or EditState()
    anat = anatomy(model)
    _check(anat, requests, hparams)
    stats = stats if stats is not None else find_layers(stats_dir, str(model.name_or_path), anat, hparams.layers)
    spaces = null_spaces(stats, hparams, anat.device)
    edit = _prepare(anat, tok, requests, hparams, token, chat, seed, progress)
    timer = Timer()
    with no_param_grad(model):
        with timer("anchors"):
            if edit.fits_tokens and values is None:
                retain = choose_anchors(retain, requests, most=hparams.max_anchors, seed=seed)
                known_answers = answers_to(anat, edit.form, retain, known=known_answers, progress=progress)
            before = anchored or hold_anchors(
                anat,
                edit.form,
                retain,
                requests,
                hparams,
                layers=(),
                known_answers=known_answers,
                seed=seed,
                progress=progress,
            )
        with timer("gate"):
            opened, gate = _open_gate(edit, before.gate, values, state.opened)
        originals = {layer: anat.weight(layer).clone() for layer in gate}
        try:
            for layer, delta in gate.items():
                write(anat, layer, delta)
            found = _Found(values) if values is not None else None
            if found is None:
                with timer("values"):
                    found = _find_values(edit, before, retain, known_answers)
            values = replace(found.values, gate=opened)
            diagnostics = value_diagnostics(requests, values)
            with timer("write"):
                solve = _solver(edit, spaces, stats, before, state, reread=anchored is None)
                written = write_layers(anat, hparams.layers, edit.contexts, values.targets, solve)
            originals |= written.originals
            with timer("tokens"):
                token, said = _say(edit, tok, token, found.places)
        except BaseException:
            restore(anat, originals)
            raise
    deltas = {**written.deltas, **gate}
    return EditResult(
        deltas,
        originals,
        diagnostics=_with_rows(diagnostics, found.rows, said),
        norms=layer_norms(deltas, originals),
        timings=timer.seconds,
        anchors=before.anchors.ids,
        state=replace(state.with_keys(written.keys), opened=state.opened | relations_of(opened)),
        values=values,
        keys=written.keys,
        token=token,
        token_ids=token.ids(tok) if token is not None and edit.fits_tokens else [],
    )


def _prepare(
    anat: Anatomy,
    tok: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    hparams: UniEraseHyperParams,
    token: UnlearningToken | None,
    chat: bool | None,
    seed: int,
    progress: bool,
) -> _Edit:
    """The edit's requests with the wordings made for them and their contexts; descent's token is put into the model.

    Raises:
        HparamsError: no token where one is needed.
    """
    if hparams.uses_token and token is None:
        raise HparamsError('no unlearning token was given; give one, or set "values" to "rows"')
    catalogue = Catalogue.bundled()
    reworded = [catalogue.with_wordings(request, hparams.wordings) for request in requests]
    form = PromptFormat.of(tok, chat)
    contexts = [_contexts(form, request, hparams) for request in reworded]
    descends = hparams.values == "descent" and token is not None
    token_id = token.add_to(anat.model, tok)[0] if descends and token is not None else None
    return _Edit(anat, form, reworded, hparams, contexts, catalogue, token_id, seed, progress)


def _check(anat: Anatomy, requests: Sequence[EditRequest], hparams: UniEraseHyperParams) -> None:
    """Raises what `apply_unierase_to_model` raises for input that does not fit, before anything is changed."""
    if not requests:
        raise RequestError("no request to forget was given; give at least one")
    if hparams.values == "rows":
        check_answers(requests)
    check_fit(anat, hparams)
    check_gate(anat, hparams)


def _open_gate(
    edit: _Edit, anchored: GateAnchors | None, values: Values | None, opened: Collection[str]
) -> tuple[dict[str | None, Tensor], dict[int, LowRank]]:
    """How far the gate is opened for each relation, and its update by layer; neither without a gate."""
    if edit.hparams.gate_layer is None or edit.token_id is None:
        return {}, {}
    common = edit.anat, edit.form, edit.requests
    known = dict(values.gate) if values else {}
    layer = edit.hparams.gate_layer
    found = remaining_gate_values(*common, edit.token_id, layer, edit.hparams, known, opened)
    return found, gate_update(*common, anchored, edit.token_id, layer, edit.hparams, found)


def _find_values(
    edit: _Edit,
    anchored: AnchorKeys,
    retain: Sequence[EditRequest],
    known_answers: Mapping[str, Sequence[int]] | None,
) -> _Found:
    """The values of all requests, from rows or by descent, what the rows read, and where tokens are to be said."""
    hparams, groups = edit.hparams, by_subject(edit.requests)
    if hparams.values == "rows":
        with edit.fast():
            made = subject_rows(
                edit.anat,
                edit.form,
                edit.requests,
                retain,
                groups,
                siblings=hparams.siblings,
                catalogue=edit.catalogue,
                known_answers=known_answers,
                progress=edit.progress,
            )
        first = [rows[0] for rows in edit.contexts]
        values, report = values_from_rows(
            edit.anat, edit.requests, first, made, hparams, anchored.anchors.rows, progress=edit.progress
        )
        if not edit.fits_tokens:
            return _Found(values, report)
        siblings = dict.fromkeys(text for rows in made.made for text in rows.siblings)
        answers = {**(known_answers or {}), **made.answers}
        places = refusal_places(
            edit.form,
            edit.requests,
            choose_anchors(retain, edit.requests, most=MOST_KEPT, seed=edit.seed),
            list(siblings),
            answers,
            edit.catalogue,
            wordings=hparams.token_wordings,
            general=data.questions("train")[::GENERAL_STEP],
        )
        return _Found(values, report, places)
    subjects = subject_prompts(
        edit.anat, edit.form, edit.requests, prompts=hparams.kl_subject_prompts, answer_tokens=hparams.kl_answer_tokens
    )
    assert edit.token_id is not None  # `_prepare` refuses descent without a token
    wanted: list[tuple[int, ...]] = [(edit.token_id,)] * len(edit.requests)
    encoded = EncodedEdit(edit.anat, edit.form, edit.requests, edit.contexts, wanted, subjects)
    return _Found(find_values(encoded, hparams, groups=groups, progress=edit.progress))


def _say(
    edit: _Edit, tok: PreTrainedTokenizerBase, token: UnlearningToken | None, places: RefusalPlaces | None
) -> tuple[UnlearningToken | None, dict[str, list[float]]]:
    """Fits tokens to the edited model and puts them into it, or those that are given for a replay.

    Returns:
        The tokens, and by request id their log-odds where they are wanted (nats).
    """
    said: dict[str, list[float]] = {}
    if not edit.fits_tokens:
        return (None if edit.token_id is None else token), said
    if places is not None:
        fitted = fit_refusal_tokens(
            edit.anat, tok, edit.form, token, places, edit.hparams, seed=edit.seed, progress=edit.progress
        )
        token = fitted.token
        for number, log_odds in zip(places.requests, fitted.log_odds.tolist(), strict=True):
            said.setdefault(edit.requests[number].id, []).append(log_odds)
        unsaid = [name for name, found in said.items() if max(found) < 0]
        if unsaid:
            log.warning(
                "no refusal is said to %d of %d requests, first %s: the model answers them with something else",
                len(unsaid), len(said), ", ".join(unsaid[:5]),
            )  # fmt: skip
    if token is None:
        raise TokenError("values were given without the tokens that were fitted with them; give `result.token`")
    token.add_to(edit.anat.model, tok)
    return token, said


def _with_rows(
    diagnostics: list[dict[str, Any]], rows: RowReport, said: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """The diagnostics of each request with what its rows read, and what its token's log-odds are where it is wanted."""
    found = []
    for entry in diagnostics:
        entry = {**entry, **rows.get(entry["id"], {})}
        odds = said.get(entry["id"])
        if odds:
            mean, missed = round(sum(odds) / len(odds), 3), sum(one < 0 for one in odds)
            entry["target_nll"] = sum(math.log1p(math.exp(-one)) for one in odds) / len(odds)
            entry["rows"] = {**entry["rows"], "say": {"rows": len(odds), "after": mean, "missed": missed}}
        found.append(entry)
    return found


def _solver(
    edit: _Edit,
    spaces: Mapping[int, NullSpace],
    stats: Mapping[int, LayerStats],
    before: AnchorKeys,
    state: EditState,
    *,
    reread: bool,
) -> Solve:
    """The solve of one layer (eq. 11 and 13), with anchors, earlier edits and ordinary text as constraints.

    `reread`: read the anchors' keys of each layer anew, after the layers below it have been written.
    """
    anat, hparams = edit.anat, edit.hparams

    def solve(layer: int, keys: LayerKeys, residual: Tensor) -> LowRank:
        now = anchor_keys(anat, before.anchors, [layer]) if reread else before
        blocks, moment = _weighed(now, layer, hparams, keys.mean)
        blocks.append(state.past_block(layer, keys.mean) * math.sqrt(hparams.past_weight))
        if hparams.text_weight:
            text = stats[layer].moment().to(keys.mean) * hparams.text_weight
            moment = text if moment is None else moment + text
        delta = alphaedit(keys.mean, residual, spaces[layer], l2=hparams.L2, constraints=blocks, moment=moment)
        if hparams.solve == "ridge":
            return delta
        return exact(delta, spaces[layer].like(keys.mean).project(keys.mean), floor=hparams.exact_floor)

    return solve


def _weighed(
    anchored: AnchorKeys, layer: int, hparams: UniEraseHyperParams, like: Tensor
) -> tuple[list[Tensor], Tensor | None]:
    """The anchors' keys of a layer with their weights, as blocks `[d_ff, m]` and a moment, as `like` is kept."""
    own, known = anchored.layers[layer], torch.tensor(anchored.anchors.known, device=like.device)
    at_lookups = hparams.anchor_lookup_weight + hparams.anchor_known_weight * known.to(like)
    blocks = [
        own.every.columns.to(like) * math.sqrt(hparams.anchor_weight),
        own.lookups.to(like) * at_lookups.sqrt(),
    ]
    moment = own.every.moment
    return blocks, None if moment is None else moment.to(like) * hparams.anchor_weight


def _contexts(form: PromptFormat, request: EditRequest, hparams: UniEraseHyperParams) -> list[TokenRow]:
    """The request's question and further phrasings, each in every context template; the plain question first."""
    place = hparams.fact_token if request.subject is not None else "last"
    return encode_contexts(form, request, hparams.context_templates, place)


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
    """The anchors of an edit, chosen from `retain`, and their keys in the model as it is, of `layers` (`None`: those of
    `hparams`) and the gate's; see `apply_unierase_to_model`."""
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
