"""The job behind `editlib tune`: the decisive settings, searched on the user's own held-out wordings and neighbours.

From settings that were found for the model, one is changed at a time; what balances best is the next to start from.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from editlib import data, editing
from editlib.errors import EditError, HparamsError, RequestError
from editlib.evaluation.answer_cache import AnswerCache, ask
from editlib.evaluation.metrics import balance
from editlib.evaluation.perplexity import text_windows
from editlib.facts.scores import build_items, evaluate
from editlib.files import write_json
from editlib.finding import settings_file
from editlib.hparams import HyperParams
from editlib.models.generation import perplexity
from editlib.reports.tables import write_table
from editlib.requests.reading import requests_hash
from editlib.requests.request import EditRequest
from editlib.shelf import Finished
from editlib.stats.corpus import load_corpus
from editlib.workbench import Workbench

log = logging.getLogger(__name__)

WATCHED = 20  # retain prompts of each kind that are asked after every trial
KEPT = ("neighbour_retention", "same_subject_retention", "other_retention")
SCALES = {"early_stop_loss": 2.0, "anchor_weight": 3.0, "L2": 3.0, "nullspace_threshold": 2.0}
"""Numbers that are tried larger and smaller by a factor, the most decisive first."""


@dataclass(frozen=True)
class Trial:
    """Settings that were tried (`changed`: in which fields from the first ones) and what came of them, shares in 0..1;
    `failed` says why there is nothing else."""

    changed: dict[str, Any]
    efficacy: float = 0.0
    unseen: float = 0.0
    retention: float = 0.0
    perplexity_ratio: float | None = None
    seconds: float = 0.0
    failed: str | None = None

    @property
    def balance(self) -> float:
        """The harmonic mean of forgetting (efficacy and unseen wordings alike) and retention."""
        return float(balance((self.efficacy + self.unseen) / 2, self.retention).agg_value or 0.0)

    @property
    def axes(self) -> tuple[float, float, float]:
        """What a front is taken over, higher is better."""
        return self.efficacy, self.unseen, self.retention


@dataclass(frozen=True)
class Tuned:
    """Every trial in order, the best settings, and whether Ctrl-C ended the search."""

    trials: tuple[Trial, ...]
    best: HyperParams
    interrupted: bool = False

    @property
    def front(self) -> list[Trial]:
        """The trials that no other one beats in one number without being beaten in another; the best balance first."""
        alive = [trial for trial in self.trials if trial.failed is None]
        found = [trial for trial in alive if not any(_beats(other, trial) for other in alive)]
        return sorted(found, key=lambda trial: -trial.balance)


def check_tuning(requests: Sequence[EditRequest], hparams: HyperParams) -> None:
    """What can be said before a model is loaded.

    Raises:
        RequestError: requests without an answer, or none with wordings to hold out.
        HparamsError: an algorithm that does not unlearn.
    """
    editing.check_wanted(requests, hparams)
    if hparams.has_target:
        raise HparamsError(f"{hparams.algorithm} does not unlearn; tune searches settings of UniErase: leave it out")
    for request in requests:
        if request.answer is None:
            raise RequestError(f'{request.source or request.id}: has no "answer"; scoring needs it; add it')
    if not any(request.paraphrases for request in requests):
        raise RequestError(
            'no request has "paraphrases", wordings that the edit never sees and that settings are judged by; add some'
        )


def tune(
    bench: Workbench,
    requests: Sequence[EditRequest],
    hparams: HyperParams,
    out: Path,
    *,
    minutes: float,
    retain: Sequence[EditRequest] | None = None,
    corpus: str = "wiki-sample",
    stats_tokens: int = 20_000,
    text: str = "wiki-sample:heldout",
    seed: int = 0,
    clock: Callable[[], float] = time.monotonic,
) -> Tuned:
    """Searches around `hparams` for `minutes`, one trial at least, and writes `best.json`, `tune.json` and `table.md`
    to `out`. Finished trials are kept there by the hash of all that decides them: the same command goes on. After
    Ctrl-C what is done is written as if the time had been over.

    Args:
        retain: prompts whose answers must stay; some of each kind are never held and judge the trials. `None`: the
            bundled ones.

    Raises:
        OutputError: `out` holds something else.
        EditlibError: see `check_tuning` and `editing.check_settings`.
    """
    check_tuning(requests, hparams)
    editing.check_settings(bench, hparams)
    finished, ends = Finished(out), clock() + 60 * minutes
    judge = _Judge(bench, requests, data.retain_prompts(requests) if retain is None else retain, out, text, seed)
    how = {"corpus": corpus, "stats_tokens": stats_tokens, "seed": seed}
    start, best, interrupted = hparams, hparams, False
    trials: dict[str, Trial] = {}
    try:
        for settings in _walk(hparams, bench.anat.n_layers, trials):
            if trials and clock() >= ends:
                log.info("%g minutes are over after %d trials", minutes, len(trials))
                break
            job = {**judge.identity, **how, "hparams": _deciding(settings)}
            trial = finished.find(job, lambda kept: Trial(**kept))
            if trial is None:
                trial = judge.tried(settings, _changed(start, settings), how)
                finished.keep("trial", job, asdict(trial))
            trials[_key(settings)] = trial
            log.info("trial %d, %s: balance %.3f", len(trials), _told(trial), trial.balance)
            if _key(settings) == _best(trials):
                best = settings
    except KeyboardInterrupt:
        if not trials:
            raise
        interrupted = True
    return _written(Tuned(tuple(trials.values()), best, interrupted), trials[_key(best)], out)


def table_rows(tuned: Tuned) -> list[list[str]]:
    """Head and rows of the front."""
    head = ["settings", "efficacy", "unseen wordings", "retention", "perplexity ratio", "balance", "seconds"]
    rows = [
        [
            _told(trial),
            *(f"{value:.2f}" for value in trial.axes),
            "-" if trial.perplexity_ratio is None else f"{trial.perplexity_ratio:.3f}",
            f"{trial.balance:.3f}",
            f"{trial.seconds:.0f}",
        ]
        for trial in tuned.front
    ]
    return [head, *rows]


class _Judge:
    """What trials are judged by: asked of the model as it is once, and after every trial."""

    def __init__(
        self,
        bench: Workbench,
        requests: Sequence[EditRequest],
        retain: Sequence[EditRequest],
        out: Path,
        text: str,
        seed: int,
    ) -> None:
        self.bench, self.requests = bench, list(requests)
        self.before = AnswerCache.load(out / "before.json", bench.sha256)
        self.held, self.watched = _parted(self.requests, retain, seed)
        questions = [item.question for item in build_items(self.requests, self.watched)]
        missing = [question for question in questions if question not in self.before.answers]
        self.before.answers.update(ask(bench.anat, bench.tok, missing, progress="before" if bench.progress else None))
        self.before.save(out / "before.json")
        self.windows = text_windows(bench.tok, load_corpus(text).documents)
        self.perplexity = perplexity(bench.anat, self.windows)
        self.identity = {
            "model": bench.sha256,
            "requests": requests_hash(self.requests),
            "held": requests_hash(self.held),
            "watched": requests_hash(self.watched),
            "text": text,
        }

    def tried(self, hparams: HyperParams, changed: dict[str, Any], how: dict[str, Any]) -> Trial:
        """Edits, asks, and puts the weights back."""
        begun, bench = time.perf_counter(), self.bench
        means = editing.load_inputs(bench, hparams, **how)
        try:
            result = editing.apply(
                bench, self.requests, hparams, means,
                retain=self.held, known_answers=self.before.answers, seed=how["seed"],
            )  # fmt: skip
        except (EditError, HparamsError) as error:
            return Trial(changed, seconds=time.perf_counter() - begun, failed=str(error))
        try:
            pair = (bench.anat, bench.tok)
            # One model serves as both: every answer of before is known, so that nothing is asked of it.
            items = build_items(self.requests, self.watched)
            told = evaluate(pair, pair, items, before=self.before, progress=bench.progress)
            ratio = perplexity(bench.anat, self.windows) / self.perplexity
        finally:
            result.revert(bench.model)
        kept = [told[name] for name in KEPT if told[name] is not None]
        return Trial(
            changed,
            told["efficacy"],
            told["paraphrase_efficacy"],
            sum(kept) / len(kept) if kept else 0.0,
            ratio,
            time.perf_counter() - begun,
        )


def _parted(
    requests: Sequence[EditRequest], retain: Sequence[EditRequest], seed: int
) -> tuple[list[EditRequest], list[EditRequest]]:
    """Retain prompts to hold, and others to watch: of each kind that have an answer every second one, at most
    `WATCHED`.

    Raises:
        RequestError: nothing is left to watch, and no request has neighbours.
    """
    by_id = {prompt.id: prompt for prompt in retain if prompt.answer is not None}
    kinds: dict[str, list[str]] = {}
    for item in build_items(requests, list(by_id.values())):
        if item.kind not in ("request", "paraphrase") and item.counted and item.id in by_id:
            kinds.setdefault(item.kind, []).append(item.id)
    chosen: set[str] = set()
    for kind, names in sorted(kinds.items()):
        random.Random(f"{seed} {kind}").shuffle(names)
        chosen.update(names[: min(WATCHED, (len(names) + 1) // 2)])
    if not chosen and not any(probe.answer for request in requests for probe in request.neighbours):
        raise RequestError('nothing to judge retention by: give "neighbours" with answers, or --retain with answers')
    held = [prompt for prompt in retain if prompt.id not in chosen]
    return held, [by_id[name] for name in by_id if name in chosen]


def _walk(start: HyperParams, n_layers: int, trials: dict[str, Trial]) -> Iterator[HyperParams]:
    """Settings to try, each one step from the best of `trials` so far; ends where every step was tried."""
    seen = {_key(start): start}
    yield start
    while True:
        best = seen[_best(trials)]
        fresh = next((step for step in steps(best, n_layers) if _key(step) not in seen), None)
        if fresh is None:
            return
        seen[_key(fresh)] = fresh
        yield fresh


def steps(hparams: HyperParams, n_layers: int) -> Iterator[HyperParams]:
    """One change each of the decisive fields that an algorithm has and uses: the window of layers moved, narrowed or
    widened, the gate moved or left out, and `SCALES`. Values that the settings refuse are left out."""
    known, layers = {item.name for item in fields(hparams)}, list(hparams.layers)
    low, high, by = layers[0], layers[-1], max(n_layers // 15, 1)
    windows = [(low - by, high - by), (low + by, high + by), (low, high + by), (low, high - by), (low - by, high)]
    changes: list[dict[str, Any]] = [
        {"layers": list(range(first, last + 1))} for first, last in windows if 0 <= first <= last < n_layers
    ]
    for name, factor in SCALES.items():
        value = getattr(hparams, name, None) if name in known else None
        changes += [] if not value else [{name: float(f"{value * times:.3g}")} for times in (factor, 1 / factor)]
    gate = getattr(hparams, "gate_layer", None)
    if gate is not None:
        changes += [{"gate_layer": gate - by}, {"gate_layer": min(gate + by, n_layers - 1)}, {"gate_layer": None}]
    for change in changes:
        with suppress(HparamsError):
            found = replace(hparams, **change)
            if found != hparams:
                yield found


def _beats(one: Trial, other: Trial) -> bool:
    return one.axes != other.axes and all(a >= b for a, b in zip(one.axes, other.axes, strict=True))


def _best(trials: dict[str, Trial]) -> str:
    """The key of the best balance, the first of equals."""
    return max(trials, key=lambda key: (trials[key].failed is None, trials[key].balance))


def _deciding(hparams: HyperParams) -> dict[str, Any]:
    """All that decides an edit: no words about it."""
    return {key: value for key, value in hparams.to_dict().items() if key not in ("notes", "model_name")}


def _key(hparams: HyperParams) -> str:
    return json.dumps(_deciding(hparams), sort_keys=True)


def _changed(start: HyperParams, settings: HyperParams) -> dict[str, Any]:
    before = _deciding(start)
    return {key: value for key, value in _deciding(settings).items() if value != before[key]}


def _told(trial: Trial) -> str:
    """What was changed, in words."""
    words = ", ".join(f"{name} {value}" for name, value in trial.changed.items()) or "as found"
    return words if trial.failed is None else f"{words}, failed"


def _written(tuned: Tuned, best: Trial, out: Path) -> Tuned:
    """Writes the files of a search, and gives it back with its best settings as they were written."""
    notes = tuned.best.notes if isinstance(tuned.best.notes, dict) else {"note": tuned.best.notes}
    measured = {key: value for key, value in asdict(best).items() if key not in ("changed", "failed")}
    notes = {**notes, **dict.fromkeys(best.changed, "searched by editlib tune"), "measured": measured}
    found = replace(tuned, best=replace(tuned.best, notes=notes))
    write_json(out / "best.json", settings_file(found.best))
    report = {
        "best": asdict(best),
        "front": [asdict(trial) for trial in found.front],
        "trials": [asdict(trial) for trial in found.trials],
        "interrupted": found.interrupted,
    }
    write_json(out / "tune.json", report)
    write_table(table_rows(found), out / "table.md", "Trials that none beats in all three; higher is better.")
    return found
