"""Phase II: make every question to be forgotten answer with the unlearning token (UniErase, 2505.15674, eq. 11-13).

Values by descent are optimised for the token, as published; with `gate_layer` set, an answer gate (ours) supplies the
first part of its logit. Values from rows (ours) erase the answer; refusal tokens are then fitted to the edited model,
and the values are moved until these tokens are generated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib.algorithms.edit import (
    EditResult,
    EditState,
    Timer,
    Written,
    layer_norms,
    restore,
    restored_on_error,
    write_all,
)
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.null_space import null_spaces
from editlib.algorithms.pipeline import check_fit, value_diagnostics
from editlib.algorithms.unierase.anchor_keys import AnchorKeys, GateAnchors
from editlib.algorithms.unierase.anchors import answers_to, choose_anchors
from editlib.algorithms.unierase.answer_gate import check_gate, gate_update, relations_of, remaining_gate_values
from editlib.algorithms.unierase.catalogue import Catalogue
from editlib.algorithms.unierase.constraints import hold_anchors
from editlib.algorithms.unierase.examples import contexts_of
from editlib.algorithms.unierase.finding import edit_values, values_that_say
from editlib.algorithms.unierase.gated_neurons import check_neurons
from editlib.algorithms.unierase.held_places import HeldPlaces
from editlib.algorithms.unierase.inputs import FoundValues, KeptInputs, UniEraseInputs
from editlib.algorithms.unierase.refusal_tokens import TokenRows, fit_places, fit_refusal_tokens
from editlib.algorithms.unierase.row_values import with_rows
from editlib.algorithms.unierase.subject_rows import by_subject, check_answers
from editlib.algorithms.unierase.token import UnlearningToken
from editlib.algorithms.unierase.writing import write_values
from editlib.algorithms.values import Values
from editlib.errors import HparamsError, RequestError, TokenError
from editlib.hparams import UniEraseHyperParams
from editlib.models.anatomy import Anatomy, anatomy
from editlib.models.freezing import no_param_grad
from editlib.models.positions import positions_of
from editlib.models.prompts import PromptFormat
from editlib.requests.request import EditRequest
from editlib.stats.file import LayerStats
from editlib.stats.store import find_layers

log = logging.getLogger(__name__)


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
    erased. Then, unless `hparams.say` is false, one token for each relation is fitted to the edited model
    (`fit_refusal_tokens`), and the values are moved until it is generated where an answer was.

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
    stats = find_layers(stats_dir, str(model.name_or_path), anat, hparams.statistics_layers, given=stats)
    spaces = {} if hparams.neurons else null_spaces(stats, hparams, anat.device)
    edit = _prepare(anat, tok, requests, retain, hparams, token, chat, seed, progress)
    timer = Timer(edit.steps(found=values is not None) if progress else ())
    with no_param_grad(model):
        # 1. What must be preserved: the anchors' keys, read before anything changes.
        with timer("anchors"):
            kept = _keep(edit, requests, retain, known_answers, anchored, answered=values is None)
        write = partial(write_values, edit, kept, spaces=spaces, stats=stats, state=state, reread=anchored is None)
        # 2. The gate comes first: values by descent start from the model with the gate.
        with timer("gate"):
            opened, gate = _open_gate(edit, kept.keys.gate, values, state.opened)
        originals = {layer: anat.weight(layer).clone() for layer in gate}
        with restored_on_error(anat, originals):
            write_all(anat, gate)
            # 3. The values, unless they are given for a replay.
            found = edit_values(edit, kept, timer) if values is None else FoundValues(values)
            # 4. One solve per layer, or one neuron for each subject, reaches them.
            with timer("write"):
                written = write(found.values)
            originals |= written.originals
            # 5. Tokens learn to tell erased facts from all else; values are moved to where the tokens are generated.
            found, written, fitted = _move_values(edit, kept, token, found, written, write, timer)
            values = replace(found.values, gate=opened)
            diagnostics = value_diagnostics(requests, values)
            # 6. Tokens are fitted last: to the edited model.
            with timer("tokens"):
                token, said = _say(edit, tok, token, fitted)
    deltas, neurons = {**written.deltas, **gate}, written.neurons
    return EditResult(
        deltas,
        originals,
        diagnostics=with_rows(diagnostics, found.rows, said),
        norms=layer_norms(deltas, originals),
        timings=timer.seconds,
        anchors=kept.keys.anchors.ids,
        state=replace(state.with_keys(written.keys).with_neurons(neurons), opened=state.opened | relations_of(opened)),
        values=values,
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
) -> UniEraseInputs:
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
    return UniEraseInputs(anat, form, reworded, hparams, contexts, catalogue, token_id, seed, progress)


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


def _keep(
    edit: UniEraseInputs,
    requests: Sequence[EditRequest],
    retain: Sequence[EditRequest],
    known_answers: Mapping[str, Sequence[int]] | None,
    anchored: AnchorKeys | None,
    *,
    answered: bool,
) -> KeptInputs:
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
    return KeptInputs(retain, known_answers, keys)


def _open_gate(
    edit: UniEraseInputs, anchored: GateAnchors | None, values: Values | None, opened: Collection[str]
) -> tuple[dict[str | None, Tensor], dict[int, LowRank]]:
    """Returns the gate's values by relation, and its update by layer; both are empty without a gate."""
    if edit.hparams.gate_layer is None or edit.token_id is None:
        return {}, {}
    common = edit.anat, edit.form, edit.requests
    known = dict(values.gate) if values else {}
    layer = edit.hparams.gate_layer
    found = remaining_gate_values(*common, edit.token_id, layer, edit.hparams, known, opened)
    return found, gate_update(*common, anchored, edit.token_id, layer, edit.hparams, found)


def _move_values(
    edit: UniEraseInputs,
    kept: KeptInputs,
    token: UnlearningToken | None,
    found: FoundValues,
    written: Written,
    write: Callable[[Values], Written],
    timer: Timer,
) -> tuple[FoundValues, Written, tuple[HeldPlaces, TokenRows] | None]:
    """Fits the tokens' rows to the edited model, moves the values until the tokens are generated, and writes these.

    Without places of tokens nothing is changed.

    Returns:
        The values, what was written, and the tokens' places with the rows.
    """
    if found.places is None:
        return found, written, None
    with timer("tokens"):
        with edit.fast():
            held = HeldPlaces.of(edit.anat, found.places, seed=edit.seed, progress=edit.progress)
        rows = fit_places(edit.anat, token, held, edit.hparams, seed=edit.seed)
    # Values are found in the model as it was.
    restore(edit.anat, written.originals)
    with timer("values"):
        found = values_that_say(edit, kept, found, held, rows)
    with timer("write"):
        written = write(found.values)
    return found, written, (held, rows)


def _say(
    edit: UniEraseInputs,
    tok: PreTrainedTokenizerBase,
    token: UnlearningToken | None,
    fitted: tuple[HeldPlaces, TokenRows] | None,
) -> tuple[UnlearningToken | None, dict[str, list[float]]]:
    """Fits refusal tokens to the edited model and adds them to it; on a replay adds the given ones.

    `fitted`: the tokens' places and rows (`_move_values`), if values were found.

    Returns:
        The tokens, and by request id their log-odds at the wanted places (nats).
    """
    said: dict[str, list[float]] = {}
    if not edit.fits_tokens:
        return (None if edit.token_id is None else token), said
    if fitted is not None:
        held, rows = fitted
        made = fit_refusal_tokens(
            edit.anat, tok, edit.form, token, held, rows, edit.hparams, seed=edit.seed, progress=edit.progress
        )
        token = made.token
        for number, log_odds in zip(held.places.requests, made.log_odds.tolist(), strict=True):
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
