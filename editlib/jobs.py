"""From requests to an edited folder: what the commands `edit` and `unlearn` do."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editlib import bundled
from editlib.algorithms.edit import EditResult, Timer
from editlib.algorithms.preparation import check_fit, check_requests
from editlib.algorithms.registry import apply_function
from editlib.algorithms.unierase import apply_unierase_to_model, check_gate
from editlib.algorithms.unlearning_token import UnlearningToken
from editlib.errors import RequestError
from editlib.export import make_delta, make_receipt, save_edited
from editlib.export.delta import check_file
from editlib.hparams import (
    ClosedFormHyperParams,
    FTHyperParams,
    HyperParams,
    ROMEHyperParams,
    UniEraseHyperParams,
)
from editlib.models.files import check_output
from editlib.request import EditRequest
from editlib.stats_store import LayerStats, spelling
from editlib.workbench import Workbench

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Means:
    """What an edit is made with beside its requests: second moments by layer, and UniErase's token."""

    stats: Mapping[int, LayerStats]
    token: UnlearningToken | None = None


def unlearn(
    bench: Workbench,
    requests: Sequence[EditRequest],
    hparams: UniEraseHyperParams,
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
) -> tuple[EditResult, dict[str, Any]]:
    """Unlearns `requests` and writes the edited model with its receipt to `out`, and the edit alone to the file `delta`
    when one is given; returns the edit and the receipt.

    Raises:
        EditlibError: any input that does not fit; nothing is written then.
    """
    check_places(Path(out), delta, overwrite=overwrite)
    check_settings(bench, hparams)
    timer = Timer()
    means = gather(bench, hparams, token=token, corpus=corpus, stats_tokens=stats_tokens, seed=seed, timer=timer)
    given = {
        "retain": bundled.retain_prompts(requests) if retain is None else retain,
        "known_answers": known_answers,
        "seed": seed,
    }
    return _edited(bench, requests, hparams, means, out, timer, given, delta, overwrite=overwrite)


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
) -> tuple[EditResult, dict[str, Any]]:
    """Edits `requests` towards their `target_new` by the algorithm that `hparams` are for, and writes the edited model
    with its receipt to `out`, and the edit alone to the file `delta` when one is given; returns the edit and the
    receipt.

    Args:
        corpus: what statistics are made from where there are none. Of those that are there, the ones of the corpus that
            `hparams` names (`mom2_dataset`) come first; which were taken is logged.
        chat: ask through the chat template (`None`: when the tokenizer has one).

    Raises:
        EditlibError: any input that does not fit; nothing is written then.
    """
    check_places(Path(out), delta, overwrite=overwrite)
    apply_function(hparams)  # refuses UniErase, which has no target
    check_settings(bench, hparams)
    check_wanted(requests, hparams)
    timer = Timer()
    means = gather(bench, hparams, corpus=corpus, stats_tokens=stats_tokens, seed=seed, timer=timer)
    return _edited(
        bench, requests, hparams, means, out, timer, {"chat": chat, "seed": seed}, delta, overwrite=overwrite
    )


def gather(
    bench: Workbench,
    hparams: HyperParams,
    *,
    token: Path | None = None,
    corpus: str = "wiki-sample",
    stats_tokens: int = 100_000,
    seed: int = 0,
    timer: Timer | None = None,
) -> Means:
    """Finds what an edit with these settings needs, and makes what is not there.

    Raises:
        EditlibError: statistics or a token that do not fit the model.
    """
    timer = timer or Timer()
    stats: Mapping[int, LayerStats] = {}
    with timer("statistics"):
        if needs_statistics(hparams):
            stats = _statistics(bench, hparams, corpus, stats_tokens, seed)
    if not isinstance(hparams, UniEraseHyperParams):
        return Means(stats)
    with timer("token"):
        return Means(stats, bench.find_or_make_token(token, seed=seed))


def apply(
    bench: Workbench, requests: Sequence[EditRequest], hparams: HyperParams, means: Means, **given: Any
) -> EditResult:
    """Edits the model of `bench` in place; `given` is what the algorithm's `apply_<name>_to_model` takes besides."""
    if isinstance(hparams, UniEraseHyperParams):
        function, given = apply_unierase_to_model, {**given, "token": means.token}
    else:
        function = apply_function(hparams)
    if means.stats:
        given = {**given, "stats": means.stats}
    return function(bench.model, bench.tok, requests, hparams, progress=bench.progress, **given)


def _edited(
    bench: Workbench,
    requests: Sequence[EditRequest],
    hparams: HyperParams,
    means: Means,
    out: str | Path,
    timer: Timer,
    given: Mapping[str, Any],
    delta: Path | None,
    *,
    overwrite: bool,
) -> tuple[EditResult, dict[str, Any]]:
    """Edits, and writes the folder with its receipt, and the edit alone to `delta`."""
    result = apply(bench, requests, hparams, means, **given)
    result.timings = {**timer.seconds, **result.timings}
    base = {"base": bench.name, "base_sha256": bench.sha256}
    receipt = make_receipt(
        result,
        **base,
        requests=requests,
        hparams=hparams,
        stats=means.stats,
        token=means.token,
        seed=given["seed"],
    )
    receipt["result_sha256"] = save_edited(bench.model, bench.tok, Path(out), receipt, overwrite=overwrite)
    if delta is not None:
        alone = make_delta(
            bench.anat,
            result.deltas,
            result.originals,
            **base,
            result_sha256=receipt["result_sha256"],
            token=means.token,
            receipt=receipt,
        )
        alone.save(delta)
        log.info("delta: %s, %.1f kB", delta, delta.stat().st_size / 1000)
    return result, receipt


def check_places(out: Path, delta: Path | None, *, overwrite: bool = False) -> None:
    """Raises `OutputError` when what an edit will write has no place to go; call it before long work starts."""
    check_output(out, overwrite=overwrite)
    if delta is not None:
        check_file(delta, overwrite=overwrite)


def check_wanted(requests: Sequence[EditRequest], hparams: HyperParams) -> None:
    """Raises `RequestError` when there is no request, or one lacks what the algorithm of `hparams` needs."""
    if not isinstance(hparams, UniEraseHyperParams):
        check_requests(requests, hparams.algorithm, subject=getattr(hparams, "fact_token", "last") != "last")
    elif not requests:
        raise RequestError("no request to forget was given; give at least one")


def needs_statistics(hparams: HyperParams) -> bool:
    """Whether an algorithm with these settings reads layer statistics."""
    if isinstance(hparams, FTHyperParams):
        return False
    return not isinstance(hparams, ROMEHyperParams) or hparams.mom2_adjustment


def _statistics(
    bench: Workbench, hparams: ClosedFormHyperParams, corpus: str, tokens: int, seed: int
) -> dict[int, LayerStats]:
    return bench.find_or_make_stats(
        hparams.layers,
        corpus=corpus,
        tokens=tokens,
        seed=seed,
        dataset=hparams.mom2_dataset,
        samples=hparams.mom2_n_samples,
    )


def check_settings(bench: Workbench, hparams: HyperParams) -> None:
    """Raises `ModelError` or `HparamsError` for settings that this model cannot have; warns of another model's."""
    check_fit(bench.anat, hparams)
    if isinstance(hparams, UniEraseHyperParams):
        check_gate(bench.anat, hparams)
    if hparams.model_name and not same_model(hparams.model_name, bench.name):
        log.warning(
            "these settings were found for %s, not for %s; layers and thresholds seldom carry over: give your own with "
            "--hparams",
            hparams.model_name,
            spelling(bench.name),
        )


def same_model(called: str, name: str) -> bool:
    """Whether settings found for `called` ("Llama3-8B") are meant for `name` ("meta-llama/Meta-Llama-3-8B")."""
    bare = [re.sub(r"[^a-z0-9.]", "", some.lower()) for some in (called, spelling(name))]
    return bare[1].endswith(bare[0]) or bare[0].endswith(bare[1])
