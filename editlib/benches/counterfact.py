"""Run CounterFact (`editlib bench counterfact`): algorithms side by side, over numbers of edits, in batches
and one after another."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from editlib.algorithms.edit import EditResult, EditState
from editlib.algorithms.registry import apply_function
from editlib.algorithms.values import Values
from editlib.benches.counterfact_scores import known_facts, score_edits
from editlib.benches.points import CounterFactPoint
from editlib.editing import check_given
from editlib.errors import EditError, HparamsError, RequestError
from editlib.evaluation.perplexity import text_windows
from editlib.export import asked_as
from editlib.facts.plots import require_matplotlib
from editlib.files import write_json
from editlib.finding import find_settings
from editlib.hparams import HyperParams, algorithm_of
from editlib.models.generation import perplexity
from editlib.models.positions import check_requests_fit
from editlib.models.prompts import PromptFormat
from editlib.requests.reading import requests_hash, write_requests
from editlib.requests.request import EditRequest
from editlib.shelf import append_cell, read_cells
from editlib.stats.corpus import check_corpus, load_corpus
from editlib.stats.file import LayerStats
from editlib.version import library_version
from editlib.workbench import Workbench

log = logging.getLogger(__name__)

BATCH, SEQUENTIAL = "batch", "sequential"


@dataclass(frozen=True)
class BenchPlan:
    """Holds the options of a benchmark run, as the command line gives them."""

    settings: list[HyperParams]
    counts: list[int]
    modes: list[str]


def check_plan(
    model: str,
    algorithms: str,
    hparams: Sequence[str],
    edits: str,
    modes: str,
    *,
    corpus: str = "wiki-sample",
    text: str = "wiki-sample:heldout",
) -> BenchPlan:
    """Reads a plan before any long work.

    Raises:
        CorpusError: a text that cannot be read.
        ReportError: matplotlib, which draws the plot, is missing.
        HparamsError: an unknown algorithm or mode, no settings for this model, or invalid numbers.
    """
    settings = settings_of(model, algorithms, hparams)
    try:
        counts = sorted({int(count) for count in edits.split(",")})
    except ValueError:
        counts = [0]
    if counts[0] < 1:
        raise HparamsError(f"--edits {edits!r}: expected numbers of edits such as 1,10,100")
    wanted = [mode.strip() for mode in modes.split(",")]
    for mode in wanted:
        if mode not in (BATCH, SEQUENTIAL):
            raise HparamsError(f"--modes {mode!r}: expected {BATCH}, {SEQUENTIAL} or both")
    if not any(setting.takes_batches or SEQUENTIAL in wanted for setting in settings):
        raise HparamsError(
            f"--modes {modes}: {algorithms} cannot edit in batches, so nothing would be measured; expected {SEQUENTIAL}"
        )
    for setting in settings:
        check_given(setting, corpus=corpus)
    check_corpus(text)
    require_matplotlib()
    return BenchPlan(settings, counts, wanted)


def check_facts(requests: Sequence[EditRequest], counts: Sequence[int]) -> list[EditRequest]:
    """Returns the requests that can be measured.

    Raises:
        RequestError: fewer than the largest of `counts`.
    """
    usable = [request for request in requests if None not in (request.subject, request.target_new, request.answer)]
    if len(usable) < max(counts):
        raise RequestError(
            f"{len(usable)} of {len(requests)} requests have a subject, a new answer and a true one; expected at least "
            f"{max(counts)}: give a larger file, or smaller --edits"
        )
    return usable


def settings_of(model: str, algorithms: str, hparams: Sequence[str]) -> list[HyperParams]:
    """Returns the settings of each of `algorithms` (names with commas between): those in `hparams`, or found by the
    model.

    Raises:
        HparamsError: an unknown algorithm, settings that do not fit this model, or of an algorithm that is not named.
    """
    given = {algorithm_of(name): name for name in hparams}
    names = list(dict.fromkeys(name.strip() for name in algorithms.split(",") if name.strip()))
    if not names:
        raise HparamsError(f"--algorithms {algorithms!r}: expected names of algorithms such as ROME,MEMIT")
    settings = [find_settings(model, name, given.pop(name, None)) for name in names]
    if given:
        raise HparamsError(
            f"--hparams {next(iter(given.values()))}: its algorithm is not among --algorithms {algorithms}"
        )
    return settings


def bench_counterfact(
    bench: Workbench,
    requests: Sequence[EditRequest],
    settings: Sequence[HyperParams],
    out: Path,
    *,
    counts: Sequence[int] = (1, 10, 100, 500),
    modes: Sequence[str] = (BATCH, SEQUENTIAL),
    corpus: str = "wiki-sample",
    stats_tokens: int = 100_000,
    text: str = "wiki-sample:heldout",
    known: bool = False,
    seed: int = 0,
    left_out: Mapping[str, Sequence[str]] | None = None,
) -> list[CounterFactPoint]:
    """Measures each algorithm of `settings` at every number of edits `n`, on the first `n` requests, asked as plain
    text unless the workbench has other prompt settings.

    The facts are written to `out/facts.jsonl`, for other commands, and the settings of the measurement to
    `out/bench.json`. Cells are appended to `out/cells.jsonl` as they are done; those already there from the same job
    are not measured again. ROME cannot edit in batches: its edits one after another count as both modes.

    Args:
        known: use only facts whose true answer the model gives.
        left_out: unusable rows of the request file, by file; `bench.json` lists them.

    Raises:
        RequestError: fewer usable requests than the largest of `counts`.
        EditlibError: input that is unsuitable for the model.
    """
    how = bench.asking(False)
    form = PromptFormat.of(bench.tok, how)
    usable = check_facts(requests, counts)
    check_requests_fit(bench.model, form, usable if known else usable[: max(counts)])
    if known:
        usable = known_facts(bench.anat, form, usable, max(counts))
    if len(usable) < max(counts):
        raise RequestError(
            f"{bench.name} gives the true answer to {len(usable)} of {len(requests)} requests; expected at least "
            f"{max(counts)}: give a larger file, or smaller --edits"
        )
    out.mkdir(parents=True, exist_ok=True)
    facts = usable[: max(counts)]
    write_requests(out / "facts.jsonl", facts)
    write_json(
        out / "bench.json",
        {
            "editlib": library_version(),
            **_asked_of(bench, facts, settings),
            **{"edits": sorted(counts), "modes": list(modes), "known": known, "corpus": corpus, "text": text},
            "seed": seed,
            **({"left_out": {name: list(rows) for name, rows in left_out.items()}} if left_out else {}),
        },
    )
    run = _CounterFactRun(bench, usable, out / "cells.jsonl", sorted(counts), text, seed)
    for hparams in settings:
        stats: dict[int, LayerStats] = {}
        if hparams.uses_statistics:
            stats = bench.find_or_make_stats(hparams.statistics_layers, corpus=corpus, tokens=stats_tokens, seed=seed)
        for mode in modes:
            if hparams.takes_batches or mode != BATCH:
                run.measure(hparams, mode, {"chat": how, **({"stats": stats} if stats else {})})
    return run.cells


def _asked_of(bench: Workbench, facts: Sequence[EditRequest], settings: Sequence[HyperParams]) -> dict[str, Any]:
    """Collects the model, the facts, how they are asked, and the settings of each algorithm, as JSON values."""
    return {
        "model": {"name": bench.name, "sha256": bench.sha256},
        "requests_sha256": requests_hash(facts),
        **asked_as(bench.tok, bench.asking(False), facts),
        "hparams": {setting.algorithm: {"source": setting.source, **setting.to_dict()} for setting in settings},
    }


class _CounterFactRun:
    """Measures the cells of one job, kept as they are done."""

    def __init__(
        self, bench: Workbench, requests: list[EditRequest], path: Path, counts: list[int], text: str, seed: int
    ) -> None:
        self.bench, self.requests, self.path, self.counts, self.seed = bench, requests, path, counts, seed
        self.form = PromptFormat.of(bench.tok, bench.asking(False))
        self.windows = text_windows(bench.tok, load_corpus(text).documents)
        self.base = bench.given_prompts.key(f"{bench.sha256[:16]}:{requests_hash(requests)[:16]}:{seed}")
        kept = read_cells(path, CounterFactPoint)
        self.cells = [cell for cell in kept if cell.job.startswith(self.base)]
        there = {cell.edits for cell in self.cells if cell.algorithm == "none"}
        for count in sorted(set(counts) - there):
            self._add("none", "-", count, 0.0, self.base)

    def measure(self, hparams: HyperParams, mode: str, given: dict[str, Any]) -> None:
        """Measures all cells of one algorithm in one mode that are not there yet."""
        job = f"{self.base}:{json.dumps(hparams.to_dict(), sort_keys=True)}"
        # With the name, since two algorithms may have equal settings (MEMIT, PRUNE).
        key = (hparams.algorithm, job, mode)
        done = {cell.edits for cell in self.cells if (cell.algorithm, cell.job, cell.mode) == key}
        counts = [count for count in self.counts if count not in done]
        if not counts:
            return
        apply = apply_function(hparams)

        def edit(chosen: Sequence[EditRequest], **more: Any) -> EditResult:
            options = {"seed": self.seed, "progress": self.bench.progress and len(chosen) > 1}
            return apply(self.bench.model, self.bench.tok, chosen, hparams, **options, **given, **more)

        (self._batches if mode == BATCH else self._one_by_one)(hparams, edit, counts, job)

    def _batches(self, hparams: HyperParams, edit: Callable[..., EditResult], counts: Sequence[int], job: str) -> None:
        # The largest batch comes first: its values serve the smaller ones, since requests do not affect one
        # another's. The time of a smaller batch is its share of the values' time and its own solve.
        values: Values | None = None
        seconds = 0.0
        shared = hparams.values_first
        for count in sorted(counts, reverse=True):
            more = {} if values is None else {"values": values.select(range(count))}
            begun = time.perf_counter()
            result = edit(self.requests[:count], **more)
            spent = time.perf_counter() - begun
            if shared and values is None:
                values, seconds = result.values, result.timings["values"] / count
            elif shared:
                spent += seconds * count
            try:
                self._add(hparams.algorithm, BATCH, count, spent, job)
            finally:
                result.revert(self.bench.model)

    def _one_by_one(
        self, hparams: HyperParams, edit: Callable[..., EditResult], counts: Sequence[int], job: str
    ) -> None:
        anat = self.bench.anat
        originals = {layer: anat.weight(layer).clone() for layer in hparams.layers}
        state, spent, failed = EditState(), 0.0, 0
        label = f"{hparams.algorithm}, one after another"
        try:
            for i in tqdm(range(max(counts)), desc=label, disable=not self.bench.progress, leave=False):
                begun = time.perf_counter()
                try:
                    state = edit([self.requests[i]], state=state).state
                except EditError as error:  # earlier edits may have destroyed the model; later ones may still work
                    failed += 1
                    log.debug("%s, edit %d: %s", hparams.algorithm, i + 1, error)
                spent += time.perf_counter() - begun
                if i + 1 in counts:
                    if failed:
                        log.warning("%s: %d of %d edits had no finite solution", hparams.algorithm, failed, i + 1)
                    self._add(hparams.algorithm, SEQUENTIAL, i + 1, spent, job)
        finally:
            for layer, original in originals.items():
                anat.weight(layer).copy_(original)

    def _add(self, algorithm: str, mode: str, count: int, seconds: float, job: str) -> None:
        anat = self.bench.anat
        measured = score_edits(anat, self.form, self.requests[:count])
        scores = {name: result.agg_value for name, result in measured.items()}
        cell = CounterFactPoint(
            algorithm=algorithm,
            mode=mode,
            edits=count,
            **scores,
            perplexity=perplexity(anat, self.windows),
            seconds=round(seconds, 2),
            job=job,
        )
        self.cells.append(cell)
        append_cell(self.path, asdict(cell))
        log.info("%s", replace(cell, job=""))
