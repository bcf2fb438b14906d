"""Phase II: make every question to be forgotten answer with the unlearning token (UniErase, 2505.15674, eq. 11-13).

With `gate_layer` set, an answer gate (ours) goes the first half of the way.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib.algorithms.anchors import Anchors, about, choose_anchors, encode_anchors
from editlib.algorithms.answer_gate import answer_gate
from editlib.algorithms.closed_form import alphaedit, exact
from editlib.algorithms.edit import EditResult, Timer, layer_norms, restore, write, write_layers
from editlib.algorithms.keys import KeyStream
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.null_space import null_space
from editlib.algorithms.unlearning_token import UnlearningToken
from editlib.algorithms.values import Values, compute_zs
from editlib.errors import EditError, HparamsError, RequestError
from editlib.hparams import UniEraseHyperParams
from editlib.models.anatomy import Anatomy, anatomy
from editlib.models.freezing import frozen
from editlib.models.generation import greedy
from editlib.models.precision import fast_dtype, reduced
from editlib.models.prompts import PromptFormat, TokenRow
from editlib.request import EditRequest, occurrences
from editlib.stats_store import LayerStats, find_layers

log = logging.getLogger(__name__)


def apply_unierase_to_model(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    hparams: UniEraseHyperParams,
    *,
    token: UnlearningToken,
    retain: Sequence[EditRequest] = (),
    stats: Mapping[int, LayerStats] | None = None,
    stats_dir: str | Path = "stats",
    chat: bool | None = None,
    known_answers: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> EditResult:
    """Edits `model` in place so that each request's question is answered with `token`, and thus refused.

    Args:
        token: learned by `learn_token` for this model; added to `model` and `tok` if it is not there yet.
        retain: prompts whose answers must stay; the anchors are chosen from them.
        stats: second moments by layer; read from `stats_dir` when not given.
        chat: ask through the chat template (`None`: when the tokenizer has one).
        known_answers: what the model answers to retain prompts, as token ids by question; saves generating it.

    Returns:
        The updates, the originals to go back to (`result.revert(model)`), and per-request diagnostics.

    Raises:
        RequestError, HparamsError, StatsError, TokenError: input that does not fit this model.
        EditError: no finite solution. After every error the model is unchanged, but for the token that was added.
    """
    if not requests:
        raise RequestError("no request to forget was given; give at least one")
    anat = anatomy(model)
    check_fit(anat, hparams)
    stats = stats if stats is not None else find_layers(stats_dir, model.name_or_path, anat, hparams.layers)
    spaces = {
        layer: null_space(stats[layer].moment(), hparams.nullspace_threshold, hparams.nullspace_rule)
        for layer in hparams.layers
    }
    form = PromptFormat(tok, chat=chat)
    contexts = [_contexts(form, request, hparams) for request in requests]
    number = token.add_to(model, tok)
    timer = Timer()
    with frozen(model):
        with timer("anchors"):
            anchors = _anchors(anat, form, retain, requests, hparams, known_answers, seed, progress)
        gate: dict[int, LowRank] = {}
        ungated: dict[int, Tensor] = {}
        if hparams.gate_layer is not None:
            with timer("gate"):
                gate = {hparams.gate_layer: _gate(anat, form, requests, anchors, number, hparams)}
                ungated = {layer: anat.weight(layer).clone() for layer in gate}

        def solve(layer: int, keys: Tensor, residual: Tensor, held: Tensor) -> LowRank:
            held = held * math.sqrt(hparams.anchor_weight)
            delta = alphaedit(keys, residual, spaces[layer], l2=hparams.L2, constraints=[held])
            return exact(delta, spaces[layer].project(keys)) if hparams.solve == "exact" else delta

        try:
            for layer, delta in gate.items():
                write(anat, layer, delta)
            with timer("values"):
                values = unlearning_values(anat, form, requests, contexts, number, hparams, progress=progress)
            diagnostics = _diagnostics(requests, values)
            with timer("write"):
                deltas, originals = write_layers(
                    anat,
                    hparams.layers,
                    contexts,
                    values.targets,
                    solve,
                    anchors=anchors.rows,
                    anchor_starts=anchors.starts,
                )
        except BaseException:
            restore(anat, ungated)
            raise
    deltas, originals = {**deltas, **gate}, {**originals, **ungated}
    weak = [request.id for request, nll in zip(requests, values.nll, strict=True) if nll > math.log(2)]
    if weak:
        log.warning("the token stayed unlikely for %d of %d requests, first %s", len(weak), len(requests), weak[0])
    return EditResult(
        deltas,
        originals,
        diagnostics=diagnostics,
        norms=layer_norms(deltas, originals),
        timings=timer.seconds,
        anchors=anchors.ids,
    )


def check_fit(anat: Anatomy, hparams: UniEraseHyperParams) -> None:
    """What only the model can tell of its settings.

    Raises:
        ModelError, HparamsError: a layer, gate or template that this model does not have.
    """
    anat.check_layers(hparams.layers)
    if hparams.gate_layer is not None and hparams.gate_layer >= anat.n_layers:
        raise HparamsError(
            f'key "gate_layer": {hparams.gate_layer}; expected a layer of this model, at most {anat.n_layers - 1}; '
            "change it, or leave the key out for no gate"
        )
    if hparams.v_loss_layer not in (None, anat.n_layers - 1):
        raise HparamsError(
            f"v_loss_layer is {hparams.v_loss_layer}; the loss is read behind the last layer, {anat.n_layers - 1}, of "
            "this model: leave the key out"
        )
    for layer in hparams.layers:
        found = anat.mlp_output_names[layer]
        if hparams.rewrite_module_tmp is not None and hparams.rewrite_module_tmp.format(layer) != found:
            raise HparamsError(
                f'key "rewrite_module_tmp": {hparams.rewrite_module_tmp!r}; expected what is edited in this model, '
                f"{found!r} for layer {layer}; leave the key out and it is found"
            )


def _gate(
    anat: Anatomy,
    form: PromptFormat,
    requests: Sequence[EditRequest],
    anchors: Anchors,
    number: int,
    hparams: UniEraseHyperParams,
) -> LowRank:
    with reduced(anat.model, fast_dtype(anat.model) if hparams.v_precision == "fast" else None):
        return answer_gate(
            anat,
            form,
            requests,
            anchors,
            number,
            hparams.gate_layer,
            nll=hparams.gate_nll,
            templates=hparams.gate_templates,
        )


def unlearning_values(
    anat: Anatomy,
    form: PromptFormat,
    requests: Sequence[EditRequest],
    contexts: Sequence[Sequence[TokenRow]],
    number: int,
    hparams: UniEraseHyperParams,
    *,
    progress: bool = False,
) -> Values:
    """Target states for which each question continues with the token `number`; `targets [d_model, n]`."""
    with reduced(anat.model, fast_dtype(anat.model) if hparams.v_precision == "fast" else None):
        values = compute_zs(
            anat,
            contexts,
            [(number,)] * len(requests),
            hparams.layers[-1],
            kl_rows=_essence(anat, form, requests, hparams),
            steps=hparams.v_num_grad_steps,
            lr=hparams.v_lr,
            weight_decay=hparams.v_weight_decay,
            clamp_norm_factor=hparams.clamp_norm_factor,
            kl_factor=hparams.kl_factor,
            stop_loss=hparams.early_stop_loss,
            optimizer=hparams.v_optimizer,
            names=[request.id for request in requests],
            progress=progress,
        )
    # The change was found in a narrower dtype; it is added to the states as they really are.
    plain = KeyStream(anat, [rows[0] for rows in contexts], hparams.layers[-1])
    return replace(values, targets=plain.states(hparams.layers[-1]) + values.deltas)


def _essence(
    anat: Anatomy, form: PromptFormat, requests: Sequence[EditRequest], hparams: UniEraseHyperParams
) -> list[list[TokenRow]]:
    """Per request the prompts about its subject in general, which its new state must not disturb. The first is
    ROME's; the others carry the answer that the model gives today."""
    bare = PromptFormat(form.tok, chat=False)
    subjects = dict.fromkeys(request.subject for request in requests if request.subject is not None)
    asked = [(subject, text) for subject in subjects for text in about(subject, hparams.kl_subject_prompts)]
    prompts = [form.encode(text, subject) for subject, text in asked]
    answers = greedy(anat, prompts, max_new_tokens=hparams.kl_answer_tokens)
    rows: dict[str | None, list[TokenRow]] = {None: []}
    for subject in subjects:
        first = f"{subject} is a"
        rows[subject] = [bare.encode(first, subject)] if len(occurrences(first, subject)) == 1 else []
    for (subject, _), prompt, answer in zip(asked, prompts, answers, strict=True):
        rows[subject].append(prompt.followed_by(answer))
    return [rows[request.subject] for request in requests]


def _contexts(form: PromptFormat, request: EditRequest, hparams: UniEraseHyperParams) -> list[TokenRow]:
    """The request's question and further phrasings, each in every context template; the plain question first."""
    subject = request.subject if hparams.fact_token == "subject_last" else None
    return [
        form.encode(template.replace("{}", question), subject)
        for template in hparams.context_templates
        for question in (request.question, *request.filled_phrasings)
    ]


def _anchors(
    anat: Anatomy,
    form: PromptFormat,
    retain: Sequence[EditRequest],
    requests: Sequence[EditRequest],
    hparams: UniEraseHyperParams,
    known: Mapping[str, Sequence[int]] | None,
    seed: int,
    progress: bool,
) -> Anchors:
    if not hparams.anchors:
        return Anchors((), None, (), ())
    chosen = choose_anchors(retain, requests, most=hparams.max_anchors, seed=seed)
    subjects = dict.fromkeys(request.subject for request in requests if request.subject is not None)
    return encode_anchors(
        anat,
        form,
        chosen,
        subjects=tuple(subjects) if hparams.anchor_subjects else (),
        everywhere=hparams.anchor_positions == "all",
        known=known,
        progress=progress,
    )


def _diagnostics(requests: Sequence[EditRequest], values: Values) -> list[dict]:
    found = []
    for i, request in enumerate(requests):
        numbers = {
            "steps": values.steps[i],
            "token_nll": values.nll[i],
            "relative_norm": values.relative_norm[i],
        }
        if not all(math.isfinite(number) for number in numbers.values()):
            raise EditError(f"request {request.id} gave {numbers}; lower `v_lr`")
        found.append({"id": request.id, **numbers})
    return found
