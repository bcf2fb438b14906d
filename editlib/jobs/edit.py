"""Run `editlib edit` and `editlib unlearn`: from requests to an edited folder."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from editlib import data
from editlib.algorithms.edit import EditResult, Timer
from editlib.algorithms.registry import apply_function
from editlib.algorithms.unierase.anchors import bundled_anchors, with_relations
from editlib.algorithms.unierase.catalogue import Catalogue
from editlib.algorithms.unierase.subject_rows import RequestRows, by_subject, check_answers, subject_rows
from editlib.editing import EditInputs, answer_tokens_for, apply, check_settings, check_wanted, load_inputs
from editlib.errors import HparamsError
from editlib.export import asked_as, make_delta, make_receipt, save_edited
from editlib.files import check_file, check_output, check_room
from editlib.hparams import HyperParams, UniEraseHyperParams, takes_retain
from editlib.models.positions import check_requests_fit
from editlib.models.prompts import PromptFormat
from editlib.models.weights import stored_bytes
from editlib.requests.request import EditRequest
from editlib.workbench import Workbench

log = logging.getLogger(__name__)


def unlearn(
    bench: Workbench,
    requests: Sequence[EditRequest],
    hparams: HyperParams,
    out: str | Path,
    *,
    retain: Sequence[EditRequest] | None = None,
    token: Path | None = None,
    corpus: str = "wiki-sample",
    stats_tokens: int = 20_000,
    known_answers: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    delta: Path | None = None,
    overwrite: bool = False,
    left_out: Mapping[str, Sequence[str]] | None = None,
    as_given: Sequence[EditRequest] | None = None,
    guessed: Mapping[str, str] | None = None,
) -> tuple[EditResult, dict[str, Any]]:
    """Unlearns `requests` and writes the edited model with its receipt to `out`, and with `delta` the edit alone to
    that file; returns the edit and the receipt.

    Args:
        left_out: unusable rows of the request files, by file; the receipt lists them.
        as_given: the requests as in their file, for the receipt; default: `requests`.
        guessed: subjects that were guessed (`guess_subjects`), by id; the receipt lists them.

    Raises:
        EditlibError: any input that does not fit; nothing is written then.
    """
    check_places(Path(out), delta, overwrite=overwrite)
    check_settings(bench, hparams)
    named, kept = _with_bundled(requests, hparams, seed) if retain is None else (requests, retain)
    form = PromptFormat.of(bench.tok, bench.asking())
    check_requests_fit(bench.model, form, [*requests, *kept], answer_tokens=answer_tokens_for(hparams))
    check_room(Path(out), stored_bytes(bench.model))
    timer = Timer()
    means = load_inputs(bench, hparams, token=token, corpus=corpus, stats_tokens=stats_tokens, seed=seed, timer=timer)
    given = {
        "retain": kept,
        "known_answers": known_answers,
        "chat": bench.asking(),
        "seed": seed,
    }
    return _edited(
        bench, named, hparams, means, out, timer, given, delta,
        recorded=requests if as_given is None else as_given, overwrite=overwrite, left_out=left_out, guessed=guessed,
    )  # fmt: skip


def _with_bundled(
    requests: Sequence[EditRequest], hparams: HyperParams, seed: int
) -> tuple[Sequence[EditRequest], list[EditRequest]]:
    """Returns the requests, and bundled retain prompts if the user gives none: all of them, or with values from rows as
    many as the requests need. The requests then get the relations of bundled facts."""
    if not (takes_retain(hparams) and hparams.values_from_rows):
        return requests, data.retain_prompts(requests)
    named = with_relations(requests)
    return named, bundled_anchors(named, seed=seed)


def rows_of(
    bench: Workbench,
    requests: Sequence[EditRequest],
    hparams: UniEraseHyperParams,
    *,
    retain: Sequence[EditRequest] | None = None,
    known_answers: Mapping[str, Sequence[int]] | None = None,
) -> list[RequestRows]:
    """Makes the rows of `requests` without an edit, for `editlib unlearn --show-rows`.

    Raises:
        HparamsError: settings with values by descent, which have no rows.
        RequestError: a request without an answer.
    """
    if not hparams.values_from_rows:
        raise HparamsError(
            f'--show-rows needs settings with "values": "rows"; these have "{hparams.values}": give others with '
            "--hparams, such as smollm2-135m-erase"
        )
    check_answers(requests)
    requests = with_relations(requests) if retain is None else requests
    catalogue = Catalogue.bundled()
    reworded = [catalogue.with_wordings(request, hparams.wordings) for request in requests]
    made = subject_rows(
        bench.anat,
        PromptFormat(bench.tok),
        reworded,
        data.retain_prompts(requests) if retain is None else retain,
        by_subject(reworded),
        siblings=hparams.siblings,
        catalogue=catalogue,
        known_answers=known_answers,
        progress=bench.progress,
    )
    return made.made


def edit(
    bench: Workbench,
    requests: Sequence[EditRequest],
    hparams: HyperParams,
    out: str | Path,
    *,
    corpus: str = "wiki-sample",
    stats_tokens: int = 100_000,
    chat: bool | None = False,
    seed: int = 0,
    delta: Path | None = None,
    overwrite: bool = False,
    left_out: Mapping[str, Sequence[str]] | None = None,
    as_given: Sequence[EditRequest] | None = None,
    guessed: Mapping[str, str] | None = None,
) -> tuple[EditResult, dict[str, Any]]:
    """Edits `requests` towards their `target_new` by the algorithm of `hparams`, and writes the edited model with its
    receipt to `out`, and with `delta` the edit alone to that file; returns the edit and the receipt.

    Args:
        corpus: text from which missing statistics are computed. Of stored ones, those of the corpus in `hparams`
            (`mom2_dataset`) are preferred; the choice is logged.
        chat: ask through the chat template (`None`: when the tokenizer has one).
        left_out, as_given, guessed: see `unlearn`.

    Raises:
        EditlibError: any input that does not fit; nothing is written then.
    """
    check_places(Path(out), delta, overwrite=overwrite)
    apply_function(hparams)  # refuses UniErase, which has no target
    check_settings(bench, hparams)
    check_wanted(requests, hparams)
    check_requests_fit(bench.model, PromptFormat.of(bench.tok, bench.asking(chat)), requests)
    check_room(Path(out), stored_bytes(bench.model))
    timer = Timer()
    means = load_inputs(bench, hparams, corpus=corpus, stats_tokens=stats_tokens, seed=seed, timer=timer)
    return _edited(
        bench, requests, hparams, means, out, timer, {"chat": bench.asking(chat), "seed": seed}, delta,
        recorded=as_given, overwrite=overwrite, left_out=left_out, guessed=guessed,
    )  # fmt: skip


def _edited(
    bench: Workbench,
    requests: Sequence[EditRequest],
    hparams: HyperParams,
    means: EditInputs,
    out: str | Path,
    timer: Timer,
    given: Mapping[str, Any],
    delta: Path | None,
    *,
    overwrite: bool,
    left_out: Mapping[str, Sequence[str]] | None,
    recorded: Sequence[EditRequest] | None = None,
    guessed: Mapping[str, str] | None = None,
) -> tuple[EditResult, dict[str, Any]]:
    """Edits the model, and writes the folder with its receipt, and the edit alone to `delta`.

    `recorded`: the requests as they were given, for the receipt; default: `requests`.
    """
    recorded = requests if recorded is None else recorded
    result = apply(bench, requests, hparams, means, **given)
    result.timings = {**timer.seconds, **result.timings}
    base = {"base": bench.name, "base_sha256": bench.sha256}
    receipt = make_receipt(
        result,
        **base,
        requests=recorded,
        hparams=hparams,
        stats=means.stats,
        token=result.token,
        seed=given["seed"],
    ) | asked_as(bench.tok, given["chat"], recorded)
    if left_out:
        receipt["left_out"] = {name: list(rows) for name, rows in left_out.items()}
    if guessed:
        receipt["guessed_subjects"] = dict(guessed)
    receipt["result_sha256"] = save_edited(bench.model, bench.tok, Path(out), receipt, overwrite=overwrite)
    if delta is not None:
        alone = make_delta(
            bench.anat,
            result.deltas,
            result.originals,
            **base,
            result_sha256=receipt["result_sha256"],
            token=result.token,
            receipt=receipt,
        )
        alone.save(delta)
        log.info("delta: %s, %.1f kB", delta, delta.stat().st_size / 1000)
    return result, receipt


def check_places(
    out: Path, delta: Path | None, *, overwrite: bool = False, inputs: Iterable[str | Path | None] = ()
) -> None:
    """Raises `OutputError` if the output of an edit cannot be written, or would replace one of its `inputs`; call it
    before long work."""
    check_output(out, overwrite=overwrite, inputs=inputs)
    if delta is not None:
        check_file(delta, overwrite=overwrite)
