"""Phase II: make every question to be forgotten answer with the unlearning token (UniErase, 2505.15674, eq. 11-13).

Values by descent are optimised for the token, as published; with `gate_layer` set, an answer gate (ours) supplies the
first part of its logit. Values from rows (ours) erase the answer; refusal tokens are then fitted to the edited model.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib import data
from editlib.algorithms.contexts import subject_prompts
from editlib.algorithms.edit import (
    EditResult,
    EditState,
    Timer,
    Written,
    layer_norms,
    restored_on_error,
    write,
    write_layers,
)
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.null_space import null_spaces
from editlib.algorithms.pipeline import EncodedEdit, check_fit, find_values, value_diagnostics
from editlib.algorithms.unierase.anchor_keys import AnchorKeys, GateAnchors
from editlib.algorithms.unierase.anchors import answers_to, choose_anchors
from editlib.algorithms.unierase.answer_gate import check_gate, gate_update, relations_of, remaining_gate_values
from editlib.algorithms.unierase.catalogue import Catalogue
from editlib.algorithms.unierase.constraints import hold_anchors, layer_solve
from editlib.algorithms.unierase.examples import contexts_of
from editlib.algorithms.unierase.gated_neurons import check_neurons
from editlib.algorithms.unierase.other_subjects import other_subjects
from editlib.algorithms.unierase.refusal_marks import fit_marks
from editlib.algorithms.unierase.refusal_places import RefusalPlaces, refusal_places
from editlib.algorithms.unierase.refusal_tokens import fit_refusal_tokens
from editlib.algorithms.unierase.row_values import RowReport, values_from_rows, with_rows
from editlib.algorithms.unierase.subject_neurons import write_neurons
from editlib.algorithms.unierase.subject_rows import SubjectRows, by_subject, check_answers, subject_rows
from editlib.algorithms.unierase.token import UnlearningToken
from editlib.algorithms.values import Values
from editlib.errors import HparamsError, RequestError, TokenError
from editlib.hparams import UniEraseHyperParams
from editlib.models.anatomy import Anatomy, anatomy
from editlib.models.freezing import no_param_grad
from editlib.models.neurons import find_neurons
from editlib.models.positions import positions_of
from editlib.models.precision import cast_params, fast_dtype
from editlib.models.prompts import PromptFormat, TokenRow
from editlib.requests.request import EditRequest
from editlib.stats.file import LayerStats
from editlib.stats.store import find_layers

log = logging.getLogger(__name__)

MOST_KEPT = 600  # most retain prompts after which no refusal token may be generated
GENERAL_STEP = 4  # every fourth bundled question is also kept free of refusal tokens


@dataclass(frozen=True)
class _Edit:
    """Holds one edit's inputs, ready for the model: requests with the wordings made for them, and encoded contexts."""

    anat: Anatomy
    form: PromptFormat
    requests: list[EditRequest]
    hparams: UniEraseHyperParams
    contexts: list[list[TokenRow]]
    catalogue: Catalogue
    token_id: int | None  # of [UNL], the target of values by descent; `None` with values from rows
    seed: int
    progress: bool

    @property
    def fits_tokens(self) -> bool:
        """Whether tokens are fitted to the edited model."""
        return self.hparams.values_from_rows and self.hparams.say

    def steps(self, *, found: bool) -> list[str]:
        """Lists the steps of the edit as its timer names them; values that were `found` before are none."""
        gate, tokens = self.hparams.gate_at is not None, self.fits_tokens
        wanted = {"anchors": True, "gate": gate, "values": not found, "write": True, "tokens": tokens}
        return [name for name, is_one in wanted.items() if is_one]

    def fast(self) -> AbstractContextManager[None]:
        """Runs the model in the dtype that the processor is fast in, where the settings allow it (`v_precision`)."""
        return cast_params(self.anat.model, fast_dtype(self.anat.model) if self.hparams.v_precision == "fast" else None)


@dataclass(frozen=True)
class _Kept:
    """Holds what an edit must preserve: retain prompts, the model's answers to them as far as they are known, and the
    anchors' keys."""

    retain: Sequence[EditRequest]
    answers: Mapping[str, Sequence[int]] | None
    keys: AnchorKeys


@dataclass(frozen=True)
class _Found:
    """Holds the values of an edit; if they were found and not given, also the report of their rows and the tokens'
    places."""

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
            from rows it is optional: the fitted tokens start from it. With `values` given, it holds the tokens that
            were fitted with them.
        retain: prompts whose answers must stay; the anchors are chosen from them.
        stats: second moments by layer; read from `stats_dir` when not given.
        chat: ask through the chat template (`None`: when the tokenizer has one).
        known_answers: what the model answers to retain prompts, as token ids by question; saves generating it.
        anchored: the result of `hold_anchors` in a model before several edits, in place of `retain`; without it, an
            edit reads the keys of each layer after the layers below have been written.
        state: state after earlier edits (`result.state`), whose keys are constraints.
        values: values found before (`result.values`), for a replay; `None`: they are found.

    Returns:
        The updates, the original weights to restore (`result.revert(model)`), and per-request diagnostics.

    Raises:
        RequestError, HparamsError, StatsError, TokenError: input that does not fit this model.
        EditError: no finite solution. After every error the model is unchanged, except that the token may have been
            added.
    """
    state = state or EditState()
    anat = anatomy(model)
    _check(anat, requests, hparams, state)
    stats = stats if stats is not None else find_layers(stats_dir, str(model.name_or_path), anat, hparams.layers)
    spaces = {} if hparams.neurons else null_spaces(stats, hparams, anat.device)
    edit = _prepare(anat, tok, requests, retain, hparams, token, chat, seed, progress)
    timer = Timer(edit.steps(found=values is not None) if progress else ())
    with no_param_grad(model):
        # 1. What must be preserved: the anchors' keys, read before anything changes.
        with timer("anchors"):
            kept = _keep(edit, requests, retain, known_answers, anchored, answered=values is None)
        # 2. The gate comes first: values by descent start from the model with the gate.
        with timer("gate"):
            opened, gate = _open_gate(edit, kept.keys.gate, values, state.opened)
        originals = {layer: anat.weight(layer).clone() for layer in gate}
        with restored_on_error(anat, originals):
            for layer, delta in gate.items():
                write(anat, layer, delta)
            # 3. The values, unless they are given for a replay.
            found = _find_values(edit, kept, timer) if values is None else _Found(values)
            values = replace(found.values, gate=opened)
            diagnostics = value_diagnostics(requests, values)
            # 4. One solve per layer reaches them.
            with timer("write"):
                neurons: dict[int, Sequence[int]] = {}
                if hparams.neurons:
                    written, neurons = _write_neurons(edit, kept, values, stats, state)
                else:
                    solve = layer_solve(anat, hparams, spaces, stats, kept.keys, state, reread=anchored is None)
                    written = write_layers(anat, hparams.layers, edit.contexts, values.targets, solve)
            originals |= written.originals
            # 5. Tokens are fitted last: to the edited model, whose late layers mark erased facts for them.
            with timer("tokens"):
                marks, marking = _mark(edit, values, found.places, originals, state)
                token, said = _say(edit, tok, token, found.places)
    deltas = {**written.deltas, **gate, **marks}
    neurons |= marking
    return EditResult(
        deltas,
        originals,
        diagnostics=with_rows(diagnostics, found.rows, said),
        norms=layer_norms(deltas, originals),
        timings=timer.seconds,
        anchors=kept.keys.anchors.ids,
        state=replace(
            state.with_keys(written.keys).with_neurons(neurons),
            opened=state.opened | relations_of(opened),
        ),
        values=replace(values, marks=marks, marking=marking),
        keys=written.keys,
        token=token,
        token_ids=token.ids(tok) if token is not None and edit.fits_tokens else [],
        neurons=neurons,
    )


def _prepare(
    anat: Anatomy,
    tok: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    retain: Sequence[EditRequest],
    hparams: UniEraseHyperParams,
    token: UnlearningToken | None,
    chat: bool | None,
    seed: int,
    progress: bool,
) -> _Edit:
    """Returns the edit's requests with generated wordings and contexts; adds the token of values by descent to the
    model.

    Raises:
        HparamsError: no token where one is needed.
    """
    if hparams.uses_token and token is None:
        raise HparamsError('no unlearning token was given; give one, or set "values" to "rows"')
    catalogue = Catalogue.bundled()
    reworded = [catalogue.with_wordings(request, hparams.wordings) for request in requests]
    form = PromptFormat.of(tok, chat)
    limit = positions_of(anat.model)
    contexts = [contexts_of(form, request, retain, hparams, seed, limit) for request in reworded]
    descends = not hparams.values_from_rows and token is not None
    token_id = token.add_to(anat.model, tok)[0] if descends and token is not None else None
    return _Edit(anat, form, reworded, hparams, contexts, catalogue, token_id, seed, progress)


def _check(anat: Anatomy, requests: Sequence[EditRequest], hparams: UniEraseHyperParams, state: EditState) -> None:
    """Raises what `apply_unierase_to_model` raises for input that does not fit, before anything is changed."""
    if not requests:
        raise RequestError("no request to forget was given; give at least one")
    if hparams.values_from_rows:
        check_answers(requests)
    check_fit(anat, hparams)
    if hparams.neurons:
        check_neurons(anat, hparams.layers[-1], len(by_subject(requests)), state.taken(hparams.layers[-1]))
    check_gate(anat, hparams.gate_layer)
    if hparams.mark_layer is not None:
        check_gate(anat, hparams.mark_layer, "mark_layer")
        find_neurons(anat, hparams.mark_layer)


def _keep(
    edit: _Edit,
    requests: Sequence[EditRequest],
    retain: Sequence[EditRequest],
    known_answers: Mapping[str, Sequence[int]] | None,
    anchored: AnchorKeys | None,
    *,
    answered: bool,
) -> _Kept:
    """Chooses the anchors and reads their keys, unless they were read before (`anchored`).

    `answered`: also generate the answers to the chosen retain prompts, for tokens that will be fitted.
    """
    if edit.fits_tokens and answered:
        retain = choose_anchors(retain, requests, most=edit.hparams.max_anchors, seed=edit.seed)
        with edit.fast():
            known_answers = answers_to(edit.anat, edit.form, retain, known=known_answers, progress=edit.progress)
    keys = anchored or hold_anchors(
        edit.anat,
        edit.form,
        retain,
        requests,
        edit.hparams,
        layers=(),  # each layer's are read when it is solved, after those below were written
        known_answers=known_answers,
        seed=edit.seed,
        progress=edit.progress,
    )
    return _Kept(retain, known_answers, keys)


def _open_gate(
    edit: _Edit, anchored: GateAnchors | None, values: Values | None, opened: Collection[str]
) -> tuple[dict[str | None, Tensor], dict[int, LowRank]]:
    """Returns the gate's values by relation, and its update by layer; both are empty without a gate."""
    if edit.hparams.gate_layer is None or edit.token_id is None:
        return {}, {}
    common = edit.anat, edit.form, edit.requests
    known = dict(values.gate) if values else {}
    layer = edit.hparams.gate_layer
    found = remaining_gate_values(*common, edit.token_id, layer, edit.hparams, known, opened)
    return found, gate_update(*common, anchored, edit.token_id, layer, edit.hparams, found)


def _write_neurons(
    edit: _Edit, kept: _Kept, values: Values, stats: Mapping[int, LayerStats], state: EditState
) -> tuple[Written, dict[int, Sequence[int]]]:
    """Writes each subject's change into a neuron of the last layer, which stays inactive at what must be kept."""
    layer, requests = edit.hparams.layers[-1], edit.requests
    owner = {i: number for number, group in enumerate(by_subject(requests)) for i in group}
    general = [edit.form.encode(text) for text in data.questions("train")[::GENERAL_STEP]]
    written, numbers = write_neurons(
        edit.anat,
        layer,
        edit.contexts,
        values.targets,
        [owner[i] for i in range(len(requests))],
        [*kept.keys.anchors.rows, *general],
        stats[layer].moment(),
        state.taken(layer),
    )
    return written, {layer: numbers}


def _find_values(edit: _Edit, kept: _Kept, timer: Timer) -> _Found:
    """Finds the values of all requests, from rows or by descent, the report of the rows, and the tokens' places."""
    with timer("values"):
        return _from_rows(edit, kept) if edit.hparams.values_from_rows else _by_descent(edit)


def _from_rows(edit: _Edit, kept: _Kept) -> _Found:
    """Finds values that erase each answer, as fitted rows of its subject read it."""
    hparams = edit.hparams
    with edit.fast():
        made = subject_rows(
            edit.anat,
            edit.form,
            edit.requests,
            kept.retain,
            by_subject(edit.requests),
            siblings=hparams.siblings,
            examples=hparams.example_wordings,
            catalogue=edit.catalogue,
            known_answers=kept.answers,
            seed=edit.seed,
            progress=edit.progress,
        )
    first = [rows[0] for rows in edit.contexts]
    values, report = values_from_rows(
        edit.anat, edit.requests, first, made, hparams, kept.keys.anchors.rows, progress=edit.progress
    )
    return _Found(values, report, _places(edit, kept, made) if edit.fits_tokens else None)


def _places(edit: _Edit, kept: _Kept, made: SubjectRows) -> RefusalPlaces:
    """Returns where tokens should be generated, and where not: at retain prompts, other facts of the subjects, general
    questions."""
    siblings = dict.fromkeys(text for rows in made.made for text in rows.siblings)
    retain = choose_anchors(kept.retain, edit.requests, most=MOST_KEPT, seed=edit.seed)
    most, progress = edit.hparams.other_subjects, edit.progress
    known = {**(kept.answers or {}), **made.answers}
    with edit.fast():
        others = other_subjects(edit.anat, edit.form, edit.requests, retain, most, seed=edit.seed, progress=progress)
        known |= answers_to(edit.anat, edit.form, others, known=known, progress=progress)
    return refusal_places(
        edit.form,
        edit.requests,
        [*retain, *others],
        list(siblings),
        known,
        edit.catalogue,
        wordings=edit.hparams.token_wordings,
        general=data.questions("train")[::GENERAL_STEP],
    )


def _by_descent(edit: _Edit) -> _Found:
    """Finds values at which each question is answered with [UNL], as published."""
    hparams = edit.hparams
    subjects = subject_prompts(
        edit.anat, edit.form, edit.requests, prompts=hparams.kl_subject_prompts, answer_tokens=hparams.kl_answer_tokens
    )
    assert edit.token_id is not None  # `_prepare` refuses descent without a token
    wanted: list[tuple[int, ...]] = [(edit.token_id,)] * len(edit.requests)
    encoded = EncodedEdit(edit.anat, edit.form, edit.requests, edit.contexts, wanted, subjects)
    return _Found(find_values(encoded, hparams, groups=by_subject(edit.requests), progress=edit.progress))


def _mark(
    edit: _Edit, values: Values, places: RefusalPlaces | None, originals: dict[int, Tensor], state: EditState
) -> tuple[Mapping[int, LowRank], Mapping[int, Sequence[int]]]:
    """Writes marks of erased facts for the tokens to read, those of `values` on a replay; adds the weights before to
    `originals`.

    Returns:
        The update of each matrix, and by layer the neurons.
    """
    marks, marking = values.marks, values.marking
    layer = edit.hparams.mark_layer
    if places is not None and layer is not None:
        size, seed, progress = edit.hparams.mark_size, edit.seed, edit.progress
        marks, numbers = fit_marks(edit.anat, places, layer, size, state.taken(layer), seed=seed, progress=progress)
        marking = {layer: numbers}
    for number, update in marks.items():
        originals[number] = edit.anat.weight(number).clone()
        write(edit.anat, number, update)
    return marks, marking


def _say(
    edit: _Edit, tok: PreTrainedTokenizerBase, token: UnlearningToken | None, places: RefusalPlaces | None
) -> tuple[UnlearningToken | None, dict[str, list[float]]]:
    """Fits refusal tokens to the edited model and adds them to it; on a replay adds the given ones.

    Returns:
        The tokens, and by request id their log-odds at the wanted places (nats).
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
                "no refusal is generated for %d of %d requests, first %s: the model answers them with something else",
                len(unsaid), len(said), ", ".join(unsaid[:5]),
            )  # fmt: skip
    if token is None:
        raise TokenError("values were given without the tokens that were fitted with them; give `result.token`")
    token.add_to(edit.anat.model, tok)
    return token, said
