"""Apply any algorithm to a workbench: load its inputs, check them first, and edit."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editlib.algorithms.edit import EditResult, Timer
from editlib.algorithms.pipeline import check_fit, check_requests, encode_contexts
from editlib.algorithms.registry import apply_function
from editlib.algorithms.unierase.anchors import ANSWER_TOKENS
from editlib.algorithms.unierase.answer_gate import check_gate
from editlib.algorithms.unierase.apply import apply_unierase_to_model
from editlib.algorithms.unierase.subject_rows import check_answers
from editlib.algorithms.unierase.token import UnlearningToken
from editlib.errors import HparamsError, RequestError
from editlib.files import check_room
from editlib.hparams import KNOWN, HyperParams, ModelShape, takes_retain
from editlib.models.positions import check_requests_fit
from editlib.models.prompts import PromptFormat
from editlib.models.weights import stored_bytes
from editlib.requests.reading import guess_subjects
from editlib.requests.request import EditRequest
from editlib.stats.corpus import check_corpus
from editlib.stats.file import LayerStats
from editlib.stats.store import check_stored, model_slug
from editlib.workbench import Workbench

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EditInputs:
    """Holds the inputs of an edit other than the requests: layer statistics, and UniErase's token."""

    stats: Mapping[int, LayerStats]
    token: UnlearningToken | None = None


def check_given(hparams: HyperParams, *, token: Path | None = None, corpus: str | None = None) -> None:
    """Checks the files of an edit other than its requests; call it before a model is loaded.

    Raises:
        HparamsError: a token for settings without one.
        TokenError: the file is not a token.
        CorpusError: the file has no text, or is of an unsupported kind.
    """
    if token is not None and hparams.refuses and not hparams.uses_token:
        raise HparamsError(
            f"a token was given ({token}), but these settings fit tokens of their own to the edited model "
            '("values": "rows"); leave it out'
        )
    if token is not None and hparams.uses_token:
        UnlearningToken.load(token)
    if corpus is not None and hparams.uses_statistics:
        check_corpus(corpus)


def load_inputs(
    bench: Workbench,
    hparams: HyperParams,
    *,
    token: Path | None = None,
    corpus: str = "wiki-sample",
    stats_tokens: int = 100_000,
    seed: int = 0,
    timer: Timer | None = None,
) -> EditInputs:
    """Finds the inputs of an edit with these settings, and makes missing ones.

    Raises:
        EditlibError: statistics or a token of another model.
    """
    timer = timer or Timer()
    kept = bench.find_token(token) if hparams.uses_token else None  # a wrong one is reported before minutes pass
    stats: Mapping[int, LayerStats] = {}
    with timer("statistics"):
        if hparams.uses_statistics:
            wanted = hparams.wanted_statistics
            stats = bench.find_or_make_stats(
                hparams.statistics_layers, corpus=corpus, tokens=stats_tokens, seed=seed, **wanted
            )
    if not hparams.uses_token:
        return EditInputs(stats)
    with timer("token"):
        return EditInputs(stats, kept or bench.find_or_make_token(token, seed=seed))


def apply(
    bench: Workbench, requests: Sequence[EditRequest], hparams: HyperParams, means: EditInputs, **given: Any
) -> EditResult:
    """Edits the model of `bench` in place; `given` are further arguments of the algorithm's `apply_<name>_to_model`."""
    if hparams.has_target:
        function = apply_function(hparams)
    else:
        function, given = apply_unierase_to_model, {**given, "token": means.token}
    if means.stats:
        given = {**given, "stats": means.stats}
    return function(bench.model, bench.tok, requests, hparams, progress=bench.progress, **given)


def check_wanted(requests: Sequence[EditRequest], hparams: HyperParams) -> None:
    """Raises `RequestError` if there is no request, or one lacks a field that the algorithm of `hparams` needs."""
    if hparams.has_target:
        check_requests(requests, hparams.algorithm, subject=hparams.lookup_place != "last")
    elif not requests:
        raise RequestError("no request to forget was given; give at least one")
    elif hparams.values_from_rows:
        check_answers(requests)


def check_last_token(wanted: bool, hparams: HyperParams) -> None:
    """Raises `HparamsError` where requests without a subject are to be edited at the last token by an algorithm whose
    settings decide the place for all requests."""
    if wanted and hparams.has_target:
        raise HparamsError(
            f'--last-token is for UniErase, but these settings are for {hparams.algorithm}; set "fact_token" to "last" '
            "in a settings file instead"
        )


def subjects_for(
    requests: Sequence[EditRequest], hparams: HyperParams, *, last_token: bool = False, remedy: str = ""
) -> tuple[list[EditRequest], dict[str, str]]:
    """Guesses the subjects that requests lack (`guess_subjects`), unless the settings edit at every prompt's last
    token.

    Raises:
        RequestError: a request's subject is neither given nor evident.
    """
    if hparams.has_target and hparams.lookup_place == "last":
        return list(requests), {}
    return guess_subjects(requests, otherwise_last=last_token, remedy=remedy)


def check_draft(
    bench: Workbench,
    requests: Sequence[EditRequest],
    hparams: HyperParams,
    *,
    kept: Sequence[EditRequest] = (),
    chat: bool | None = None,
    out: Path | None = None,
    token: Path | None = None,
) -> None:
    """Checks everything about an edit that needs no weights of the model (`Workbench.load(first=...)`).

    Args:
        kept: prompts whose answers must stay.
        chat: ask through the chat template; `None`: by the prompt settings.
        out: the folder for the edited model.
        token: the file with the token; `None`: the one stored for this model, if any.

    Raises:
        TokenError, StatsError: a token or stored statistics that are damaged, or of another width.
        HparamsError: settings that name a module that the model lacks.
        RequestError: prompts that are longer than the model's positions, or whose subject the chat template changes.
        OutputError: too little free space.
    """
    template, modules = hparams.rewrite_module_tmp, {name for name, _ in bench.model.named_modules()}
    for layer in hparams.layers:
        if template is not None and template.format(layer) not in modules:
            raise HparamsError(
                f'key "rewrite_module_tmp": {template!r}; this model has no module {template.format(layer)!r}: leave '
                "the key out and it is found"
            )
    form = PromptFormat.of(bench.tok, bench.asking(chat))
    check_requests_fit(bench.model, form, [*requests, *kept], answer_tokens=answer_tokens_for(hparams))
    for request in requests:
        encode_contexts(form, request, ["{}"], hparams.lookup_place)
    if hparams.uses_token:
        bench.check_draft_token(token)
    if hparams.uses_statistics:
        check_stored(bench.stats_dir, bench.name, bench.model, hparams.statistics_layers)
    if out is not None:
        check_room(out, stored_bytes(bench.model))


def answer_tokens_for(hparams: HyperParams) -> int:
    """Returns the length in tokens of the model's answers that an edit reads after each prompt."""
    return ANSWER_TOKENS if takes_retain(hparams) else 0


def check_settings(bench: Workbench, hparams: HyperParams) -> None:
    """Raises `ModelError` or `HparamsError` for settings that are impossible for this model; warns if they are for
    another one."""
    check_fit(bench.anat, hparams)
    check_gate(bench.anat, hparams.gate_at)
    if hparams.model_name and not _meant_for(hparams.model_name, bench):
        log.warning(
            "these settings were found for %s, not for %s; layers and thresholds seldom carry over: give your own with "
            "--hparams",
            hparams.model_name,
            model_slug(bench.name),
        )


def _meant_for(called: str, bench: Workbench) -> bool:
    """Returns whether settings found for `called` are meant for this model: by its name, or by an equal shape."""
    shape = ModelShape.of(bench.model.config, bench.name)
    return same_model(called, bench.name) or (called in KNOWN and KNOWN[called].same_form(shape))


def same_model(called: str, name: str) -> bool:
    """Returns whether settings found for `called` ("Llama3-8B") are meant for `name` ("meta-llama/Meta-Llama-3-8B")."""
    bare = [re.sub(r"[^a-z0-9.]", "", label.lower()) for label in (called, model_slug(name))]
    return bare[1].endswith(bare[0]) or bare[0].endswith(bare[1])
