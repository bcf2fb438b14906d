"""Forget known facts batch after batch, in chains that are measured in between (`editlib bench sequential`)."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from editlib import data
from editlib.baselines.refusal_edit import REFUSAL
from editlib.benches.counterfact import settings_of
from editlib.benches.points import SequentialPoint
from editlib.chain import Chain
from editlib.chain.create import check_algorithm
from editlib.chain.store import RECORD
from editlib.errors import EditError, HparamsError, OutputError
from editlib.evaluation.answer_cache import ANSWER_TOKENS, AnswerCache
from editlib.evaluation.perplexity import text_windows
from editlib.facts.plots import require_matplotlib
from editlib.facts.sampling import ANCHORED, HELD_OUT, RELATIONS, FactSplit, split_in_proportion
from editlib.facts.scores import build_items, evaluate
from editlib.files import make_folder
from editlib.finding import fit_settings
from editlib.hparams import HyperParams
from editlib.models.loaded import LoadedModel
from editlib.models.positions import check_requests_fit
from editlib.models.prompts import PromptFormat
from editlib.requests.reading import requests_hash, write_requests
from editlib.requests.request import EditRequest
from editlib.shelf import append_cell, read_cells
from editlib.stats.corpus import check_corpus, load_corpus
from editlib.workbench import Workbench

log = logging.getLogger(__name__)

FACTS = 100  # number of facts to forget


def check_plan(
    model: str, algorithms: str, hparams: Sequence[str], sizes: str, *, text: str = "wiki-sample:heldout"
) -> tuple[list[HyperParams], list[int]]:
    """Reads a plan before any long work: settings, and sizes of a batch.

    Raises:
        CorpusError: a text that cannot be read.
        ReportError: matplotlib, which draws the plot, is missing.
        HparamsError: an unknown algorithm or one that cannot be chained, no settings for this model, invalid sizes.
    """
    settings = settings_of(model, algorithms, hparams)
    for setting in settings:
        check_algorithm(setting)
    try:
        wanted = [int(size) for size in sizes.split(",")]
    except ValueError:
        wanted = [0]
    if min(wanted) < 1:
        raise HparamsError(f"--sizes {sizes!r}: expected numbers of requests per batch such as 10,1")
    check_corpus(text)
    require_matplotlib()
    return settings, list(dict.fromkeys(wanted))


def bench_sequential(
    load: Callable[[], Workbench],
    settings: Sequence[HyperParams],
    sizes: Sequence[int],
    out: Path,
    *,
    parts: FactSplit | None = None,
    points: int = 5,
    text: str = "wiki-sample:heldout",
    seed: int = 0,
) -> list[SequentialPoint]:
    """Forgets facts in one chain for each of `settings` and `sizes`.

    The forgotten, anchored and held-out facts are written to `out`, the chains to `out/chains`. An interrupted run
    resumes: chains with their next batch, measurements with the points that are not in `out/points.jsonl`.

    Args:
        load: loads the base model; called once for the measuring and once for each chain.
        parts: which facts are forgotten, anchored and held out; `None`: `FACTS` bundled facts that the model knows, in
            proportion from each relation.
        points: how often each chain is measured, including its end.

    Raises:
        OutputError: `out` holds a chain of other facts or settings.
        EditlibError: input that does not fit the model.
    """
    documents = load_corpus(text).documents
    base = load()
    settings = [fit_settings(base, hparams) for hparams in settings]
    _check_facts_fit(base, parts)
    make_folder(out)
    before = AnswerCache.load(out / "before.json", base.given_prompts.key(base.sha256))
    parts = parts or _mixed(split_in_proportion(base, before, FACTS, seed), seed)
    before.save(out / "before.json")
    for name, part in parts.by_file().items():
        write_requests(out / f"{name}.jsonl", part)
    counts = sorted({round(len(parts.forget) * (i + 1) / points) for i in range(points)} - {0})
    run = _SequentialRun(base, before, parts, out, counts, text_windows(base.tok, documents), seed)
    for hparams in settings:
        for size in sizes:
            run.follow(load, hparams, size)
    return run.points


def _check_facts_fit(base: Workbench, parts: FactSplit | None) -> None:
    """Refuses facts that are longer than the model's positions, before any question is asked."""
    if parts is None:
        asked = [fact for fact in data.facts() if fact.relation in (*RELATIONS, *ANCHORED, *HELD_OUT)]
        asked += [*data.general("test"), *data.general("anchor")]
    else:
        asked = [*parts.forget, *parts.anchors, *parts.held_out]
    check_requests_fit(base.model, PromptFormat.of(base.tok, base.prompts), asked, answer_tokens=ANSWER_TOKENS)


def _mixed(parts: FactSplit, seed: int) -> FactSplit:
    """Puts the facts to forget in one order over all relations."""
    order = torch.randperm(len(parts.forget), generator=torch.Generator().manual_seed(seed)).tolist()
    return replace(parts, forget=[parts.forget[i] for i in order])


class _SequentialRun:
    """Measures the points of one job, saved as they are done."""

    def __init__(
        self,
        base: Workbench,
        before: AnswerCache,
        parts: FactSplit,
        out: Path,
        counts: Sequence[int],
        windows: list[list[int]],
        seed: int,
    ) -> None:
        self.base, self.before, self.parts, self.out, self.seed = base, before, parts, out, seed
        self.counts, self.windows = counts, windows
        asked = [*parts.forget, *parts.anchors, *parts.held_out]
        self.job = base.given_prompts.key(f"{base.sha256[:16]}:{requests_hash(asked)[:16]}:{seed}")
        kept = read_cells(out / "points.jsonl", SequentialPoint)
        self.points = [point for point in kept if point.job.startswith(self.job)]

    def follow(self, load: Callable[[], Workbench], hparams: HyperParams, size: int) -> None:
        """Follows one chain to its end, measured at `counts`."""
        job = f"{self.job}:{json.dumps(hparams.to_dict(), sort_keys=True)}"
        # With the name, since two algorithms may have equal settings (MEMIT, PRUNE).
        key = (hparams.algorithm, job, size)
        there = {point.edits for point in self.points if (point.algorithm, point.job, point.size) == key}
        if there >= set(self.counts):
            return
        wanted = self._requests(hparams)
        chain = self._chain(load(), hparams, size, wanted)
        seconds: list[float] = []
        for start in range(0, len(wanted), size):
            batch, end = wanted[start : start + size], min(start + size, len(wanted))
            held = {request.id for request in chain.requests}
            if not held.issuperset(request.id for request in batch):
                begun = time.perf_counter()
                try:
                    chain.add(batch)
                except EditError as error:  # earlier edits may have destroyed the model; later ones may still work
                    log.warning("%s, edits %d to %d: %s", hparams.algorithm, start + 1, end, error)
                seconds.append(time.perf_counter() - begun)
                log.info("%s, %d of %d edits, %.1f s", hparams.algorithm, end, len(wanted), seconds[-1])
            due = {count for count in self.counts if start < count <= end} - there
            # An earlier state of a chain cannot be measured once later batches are added.
            if due and held.isdisjoint(request.id for request in wanted[end:]):
                self._measure(chain, hparams, size, end, seconds, job)
                seconds = []

    def _requests(self, hparams: HyperParams) -> list[EditRequest]:
        if not hparams.has_target:
            return self.parts.forget
        return [replace(fact, target_new=REFUSAL.lstrip()) for fact in self.parts.forget]

    def _chain(self, bench: Workbench, hparams: HyperParams, size: int, wanted: Sequence[EditRequest]) -> Chain:
        folder = self.out / "chains" / f"{hparams.algorithm}-{size}"
        if not (folder / RECORD).exists():
            return Chain.create(
                folder,
                bench,
                hparams,
                retain=None if hparams.has_target else self.parts.anchors,
                chat=PromptFormat.of(bench.tok, bench.prompts).uses_chat,
                seed=self.seed,
            )
        chain = Chain.open(folder, bench)
        same = chain.record.hparams == json.loads(json.dumps(hparams.to_dict())) and chain.record.seed == self.seed
        alike = same and self._asks_alike(chain)
        if not alike or not {request.id for request in wanted}.issuperset(request.id for request in chain.requests):
            held = "a chain of other facts, settings or prompts"
            raise OutputError(f"{folder} holds {held}; choose another --out, or remove it")
        return chain

    def _asks_alike(self, chain: Chain) -> bool:
        """Returns whether a chain has the prompt settings of a chain started now; today's date is ignored."""
        given = self.base.given_prompts
        set_names = [name for name in ("system", "arguments", "tags", "date") if getattr(given, name)]
        return all(chain.record.prompts.get(name) == given.to_dict()[name] for name in set_names)

    def _measure(
        self, chain: Chain, hparams: HyperParams, size: int, edits: int, seconds: Sequence[float], job: str
    ) -> None:
        items = build_items(self.parts.forget[:edits], self.parts.held_out)
        metrics = evaluate(
            self.base.loaded,
            LoadedModel(chain.anat, chain.tok),
            items,
            before=self.before,
            how=self.base.prompts,
            windows=self.windows,
            progress=self.base.progress,
        )
        self.before.save(self.out / "before.json")
        asked = [item for item in items if item.kind == "request"]
        point = SequentialPoint(
            algorithm=hparams.algorithm,
            size=size,
            edits=edits,
            efficacy=metrics["efficacy"],
            gone=sum(not item.right_after for item in asked) / len(asked),
            paraphrases=metrics["paraphrase_efficacy"],
            neighbours=metrics["neighbour_retention"],
            same_subject=metrics["same_subject_retention"],
            other=metrics["other_retention"],
            perplexity_ratio=metrics["perplexity_ratio"],
            seconds=round(sum(seconds) / len(seconds), 2) if seconds else 0.0,
            job=job,
        )
        self.points.append(point)
        append_cell(self.out / "points.jsonl", asdict(point))
        log.info("%s", replace(point, job=""))
