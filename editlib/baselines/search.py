"""A small search over learning rate and steps, with the same budget for every baseline."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib.baselines.apply import apply_baseline_to_model, check_baseline, keep, pairs_for, put_back
from editlib.baselines.registry import baseline, canonical_name
from editlib.baselines.settings import BaselineSettings, Budget
from editlib.baselines.validation import Score, Validation, recalls, score, validation_hash
from editlib.errors import EditError, HparamsError, OutputError
from editlib.files import write_json
from editlib.models.anatomy import anatomy
from editlib.models.weights import weights_sha256
from editlib.requests.reading import requests_hash
from editlib.requests.request import EditRequest
from editlib.shelf import append_cell, differing, read_cells

log = logging.getLogger(__name__)

TRIALS, JOB = "trials.jsonl", "search.json"


@dataclass(frozen=True)
class TrialRun:
    """One point that was tried: settings, what came of it on the validation questions, and the seconds that it took
    (training on from the trial before it of the same run, and the measurement): those of all trials add up to the
    search's. `failed` says why there is no score; such a trial counts as balance 0."""

    learning_rate: float | None
    steps: int | None
    forgetting: float
    retention: float
    balance: float
    seconds: float
    failed: str | None = None


@dataclass(frozen=True)
class SearchResult:
    """The best settings and every trial, in the order of the search. `edges` names what of the best lies at an end of
    its range ("learning_rate low"): a wider search might find better."""

    name: str
    best: BaselineSettings
    chosen: TrialRun
    trials: tuple[TrialRun, ...]
    edges: tuple[str, ...]
    before: tuple[float, float]
    budget: Budget

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "best": self.best.to_dict()}


def search(
    name: str,
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    forget: Sequence[EditRequest],
    retain: Sequence[EditRequest],
    validation: Validation,
    budget: Budget | None = None,
    settings: BaselineSettings | None = None,
    *,
    seed: int = 0,
    model_name: str | None = None,
    own_answers: Mapping[str, Sequence[int]] | None = None,
    out: Path | None = None,
    progress: bool = False,
) -> SearchResult:
    """Tries `budget.rates` learning rates, spread evenly in their logarithm over the range, each at `budget.points`
    numbers of steps, and takes the trial of the highest balance on `validation` (of equals the one
    with fewer steps, then the smaller rate). The learning rate of a gradient run does not decay, so that one run is
    measured on its way at all numbers of steps; an editor runs once a trial. A baseline without either has one trial.

    Model and tokenizer are as they were afterwards, bit for bit.

    Args:
        forget, retain, validation: as `validation.split` makes them.
        settings: all but learning rate and steps.
        spoken: see `make_pairs`.
        out: a folder that keeps every finished trial; the same search goes on from there.

    Raises:
        OutputError: `out` holds another search, or cannot be written.
        EditlibError: see `apply_baseline_to_model`. A loss that is not finite is a failed trial, not an error.
    """
    name, budget, settings = canonical_name(name), budget or Budget(), settings or BaselineSettings()
    entry = baseline(name)
    check_baseline(name, forget, retain, settings)
    check_range(name, budget)
    job = {
        "baseline": name,
        "model": weights_sha256(model),
        "forget": requests_hash(forget),
        "retain": requests_hash(retain),
        "validation": validation_hash(validation),
        "budget": asdict(budget),
        "settings": settings.to_dict(),
        "seed": seed,
    }
    done = {} if out is None else _opened(out, job)
    anat, kept, template = anatomy(model), keep(model), copy.copy(tok.chat_template)
    before = recalls(anat, tok, validation)

    def tried(rate: float | None, steps: int | None, failed: str | None = None) -> TrialRun:
        nonlocal begun
        measured = Score(0.0, 0.0, 0.0) if failed else score(recalls(anat, tok, validation), before)
        begun, since = time.perf_counter(), begun
        trial = TrialRun(rate, steps, **asdict(measured), seconds=begun - since, failed=failed)
        log.info("%s: rate %s, steps %s: balance %.3f", name, rate, steps, trial.balance)
        if out is not None:
            append_cell(out / TRIALS, asdict(trial))
        done[rate, steps] = trial
        return trial

    pairs, begun = None, time.perf_counter()
    try:
        for rate, points in _plan(name, budget):
            if all((rate, steps) in done for steps in points):
                continue
            run = replace(settings, learning_rate=rate, steps=points[-1])
            given: dict[str, Any] = {"seed": seed, "model_name": model_name, "progress": progress}
            if entry.kind == "gradient":
                pairs = pairs or pairs_for(entry, anat, tok, forget, retain, seed=seed, own_answers=own_answers)
                missing = [steps for steps in points if (rate, steps) not in done]
                look = lambda steps, rate=rate: tried(rate, steps)  # noqa: E731
                given |= {"pairs": pairs, "watch": look, "watched": missing}
            try:
                apply_baseline_to_model(name, model, tok, forget, retain, run, **given)
            except EditError as error:
                for steps in points:
                    if (rate, steps) not in done:
                        tried(rate, steps, str(error))
            else:
                if entry.kind != "gradient":
                    tried(rate, points[-1])
            put_back(model, kept)
            tok.chat_template = template
    finally:
        put_back(model, kept)
        tok.chat_template = template
    trials = [done[rate, steps] for rate, points in _plan(name, budget) for steps in points]
    trials = list(dict.fromkeys(trials))
    chosen = max(trials, key=lambda t: (t.balance, -(t.steps or 0), -(t.learning_rate or 0)))
    best = replace(settings, learning_rate=chosen.learning_rate, steps=chosen.steps)
    edges = _edges(chosen, trials)
    if edges:
        log.info("%s: the best settings lie at the edge of the search (%s)", name, ", ".join(edges))
    return SearchResult(name, best, chosen, tuple(trials), edges, before.means, budget)


def rates(name: str, budget: Budget) -> list[float]:
    """The learning rates that are tried: over the budget's range, or else the baseline's own, evenly spread in their
    logarithm; one alone is the middle."""
    count, (low, high) = budget.rates, map(math.log, _ends(name, budget))
    places = [0.5] if count == 1 else [i / (count - 1) for i in range(count)]
    return [float(f"{math.exp(low + (high - low) * place):.3g}") for place in places]


def check_range(name: str, budget: Budget) -> None:
    """Raises `HparamsError` where a search for this baseline has no learning rates between `low` and `high`."""
    if not baseline(name).searched:
        if (budget.low, budget.high) != (None, None):
            raise HparamsError(f"{name} has no learning rate to search for; leave low and high out")
        return
    low, high = _ends(name, budget)
    if low > high:
        raise HparamsError(
            f"a search for {name} from the learning rate {low:g} to {high:g}: expected a range from low to high; "
            "change low or high"
        )


def _ends(name: str, budget: Budget) -> tuple[float, float]:
    entry = baseline(name)
    return budget.low or entry.low, budget.high or entry.high


def _plan(name: str, budget: Budget) -> Iterator[tuple[float | None, tuple[int | None, ...]]]:
    """Runs: a learning rate, and the numbers of steps that it is measured at."""
    entry = baseline(name)
    if not entry.searched:
        yield None, (None,)
        return
    for rate in rates(name, budget):
        if entry.kind == "gradient":
            yield rate, budget.measured
        else:
            for steps in budget.measured:
                yield rate, (steps,)


def _edges(chosen: TrialRun, trials: Sequence[TrialRun]) -> tuple[str, ...]:
    found = []
    for key in ("learning_rate", "steps"):
        values = {getattr(trial, key) for trial in trials} - {None}
        value = getattr(chosen, key)
        if len(values) > 1 and value in (min(values), max(values)):
            found.append(f"{key} {'low' if value == min(values) else 'high'}")
    return tuple(found)


def _opened(out: Path, job: dict[str, Any]) -> dict[tuple[float | None, int | None], TrialRun]:
    """The finished trials of this very search in `out`, which is made ready for more."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        kept = json.loads((out / JOB).read_text(encoding="utf-8")) if (out / JOB).is_file() else None
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror}; check the folder") from None
    except ValueError:
        kept = {}
    if kept is not None and kept != job:
        raise OutputError(
            f"{out} holds another search (other {differing(kept, job)}); choose another folder, or remove it"
        )
    if kept is None:
        write_json(out / JOB, job)
    trials = [TrialRun(**cell) for cell in read_cells(out / TRIALS)]
    return {(trial.learning_rate, trial.steps): trial for trial in trials}
