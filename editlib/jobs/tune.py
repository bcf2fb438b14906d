"""Run `editlib tune`: search the most important settings on the user's own held-out wordings and neighbours.

Starting from the settings for the model, one is changed at a time; the search continues from the best balance.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from editlib import data, editing
from editlib.errors import HparamsError, RequestError
from editlib.files import make_folder, write_json
from editlib.finding import settings_file
from editlib.hparams import HyperParams
from editlib.hparams.steps import steps
from editlib.jobs.trials import Judge, SettingsTrial
from editlib.reports.tables import write_table
from editlib.requests.request import EditRequest
from editlib.shelf import FINISHED, Finished, from_json
from editlib.workbench import Workbench

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tuned:
    """Holds every trial in order, the best settings, and whether Ctrl-C ended the search."""

    trials: tuple[SettingsTrial, ...]
    best: HyperParams
    interrupted: bool = False

    @property
    def front(self) -> list[SettingsTrial]:
        """The Pareto front: trials that no other one beats in all scores; the best balance first."""
        alive = [trial for trial in self.trials if trial.failed is None]
        unbeaten = [trial for trial in alive if not any(_beats(other, trial) for other in alive)]
        return sorted(unbeaten, key=lambda trial: -trial.balance)


def check_tuning(requests: Sequence[EditRequest], hparams: HyperParams, minutes: float = 0.0) -> None:
    """Checks what can be checked before a model is loaded.

    Raises:
        RequestError: requests without an answer, or none with wordings to hold out.
        HparamsError: an algorithm that does not unlearn, or an invalid budget.
    """
    if not minutes >= 0:
        raise HparamsError(f"the budget is {minutes} minutes; expected a number of at least 0")
    editing.check_wanted(requests, hparams)
    if hparams.has_target:
        raise HparamsError(f"{hparams.algorithm} does not unlearn; tune searches settings of UniErase: leave it out")
    for request in requests:
        if request.answer is None:
            raise RequestError(f'{request.source or request.id}: has no "answer"; scoring needs it; add it')
    if not any(request.paraphrases for request in requests):
        raise RequestError(
            'no request has "paraphrases", wordings that the edit never sees, by which settings are scored; add some'
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
    left_out: Mapping[str, Sequence[str]] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Tuned:
    """Searches around `hparams` for `minutes`, at least one trial, and writes `best.json`, `tune.json` and `table.md`
    to `out`. Finished trials are kept there under the hash of everything that determines them, so the same command
    resumes. After Ctrl-C the trials so far are written as at the end of the time.

    Args:
        retain: prompts whose answers must stay; some of each kind are held out to score the trials. `None`: the bundled
            ones.
        left_out: unusable rows of the request files, by file; `tune.json` lists them.

    Raises:
        OutputError: `out` holds something else.
        EditlibError: see `check_tuning` and `editing.check_settings`.
    """
    check_tuning(requests, hparams, minutes)
    editing.check_settings(bench, hparams)
    finished, ends = Finished(out), clock() + 60 * minutes
    make_folder(out / FINISHED)  # marks the folder as a search, even if it is stopped in its first trial
    judge = Judge(bench, requests, data.retain_prompts(requests) if retain is None else retain, out, text, seed)
    if not hparams.refuses:
        judge.check_known()
    how = {"corpus": corpus, "stats_tokens": stats_tokens, "seed": seed}
    start, best, interrupted = hparams, hparams, False
    trials: dict[str, SettingsTrial] = {}
    try:
        for settings in _walk(hparams, bench.anat.n_layers, trials):
            if trials and clock() >= ends:
                log.info("%g minutes are over after %d trials", minutes, len(trials))
                break
            job = {**judge.identity, **how, "hparams": _deciding(settings)}
            trial = finished.find(job, partial(from_json, SettingsTrial))
            if trial is None:
                trial = judge.tried(settings, _changed(start, settings), how)
                finished.keep("trial", job, asdict(trial))
            trials[_key(settings)] = trial
            log.info("trial %d, %s: balance %.3f", len(trials), _in_words(trial), trial.balance)
            if _key(settings) == _best(trials):
                best = settings
    except KeyboardInterrupt:
        if not trials:
            raise
        interrupted = True
    return _written(Tuned(tuple(trials.values()), best, interrupted), trials[_key(best)], out, left_out)


def table_rows(tuned: Tuned) -> list[list[str]]:
    """Returns head and rows of the front."""
    head = ["settings", "efficacy", "unseen wordings", "retention", "perplexity ratio", "balance", "seconds"]
    rows = [
        [
            _in_words(trial),
            *(f"{value:.2f}" for value in trial.axes),
            "-" if trial.perplexity_ratio is None else f"{trial.perplexity_ratio:.3f}",
            f"{trial.balance:.3f}",
            f"{trial.seconds:.0f}",
        ]
        for trial in tuned.front
    ]
    return [head, *rows]


def _walk(start: HyperParams, n_layers: int, trials: dict[str, SettingsTrial]) -> Iterator[HyperParams]:
    """Yields settings to try, each one step from the best of `trials` so far, until all steps were tried."""
    seen = {_key(start): start}
    yield start
    while True:
        best = seen[_best(trials)]
        fresh = next((step for step in steps(best, n_layers) if _key(step) not in seen), None)
        if fresh is None:
            return
        seen[_key(fresh)] = fresh
        yield fresh


def _beats(one: SettingsTrial, other: SettingsTrial) -> bool:
    return one.axes != other.axes and all(a >= b for a, b in zip(one.axes, other.axes, strict=True))


def _best(trials: dict[str, SettingsTrial]) -> str:
    """Returns the key of the best balance, the first one of a tie."""
    return max(trials, key=lambda key: (trials[key].failed is None, trials[key].balance))


def _deciding(hparams: HyperParams) -> dict[str, Any]:
    """Returns all settings that determine an edit, without notes and file names."""
    return {key: value for key, value in hparams.to_dict().items() if key not in ("notes", "model_name")}


def _key(hparams: HyperParams) -> str:
    return json.dumps(_deciding(hparams), sort_keys=True)


def _changed(start: HyperParams, settings: HyperParams) -> dict[str, Any]:
    before = _deciding(start)
    return {key: value for key, value in _deciding(settings).items() if value != before[key]}


def _in_words(trial: SettingsTrial) -> str:
    """Describes the change in words."""
    words = ", ".join(f"{name} {value}" for name, value in trial.changed.items()) or "as found"
    return words if trial.failed is None else f"{words}, failed"


def _written(tuned: Tuned, best: SettingsTrial, out: Path, left_out: Mapping[str, Sequence[str]] | None) -> Tuned:
    """Writes the files of a search, and returns it with its best settings as written."""
    notes = tuned.best.notes if isinstance(tuned.best.notes, dict) else {"note": tuned.best.notes}
    measured = {key: value for key, value in asdict(best).items() if key not in ("changed", "failed")}
    notes = {**notes, **dict.fromkeys(best.changed, "searched by editlib tune"), "measured": measured}
    finished = replace(tuned, best=replace(tuned.best, notes=notes))
    write_json(out / "best.json", settings_file(finished.best))
    report = {
        "best": asdict(best),
        "front": [asdict(trial) for trial in finished.front],
        "trials": [asdict(trial) for trial in finished.trials],
        "interrupted": finished.interrupted,
        **({"left_out": {name: list(rows) for name, rows in left_out.items()}} if left_out else {}),
    }
    write_json(out / "tune.json", report)
    write_table(table_rows(finished), out / "table.md", "Trials that none beats in all three; higher is better.")
    return finished
