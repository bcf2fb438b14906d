"""Search a grid of learning rates and steps, with the same budget for every baseline."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib.baselines.apply import apply_baseline_to_model, check_baseline, keep, pairs_for, put_back
from editlib.baselines.data import Pairs
from editlib.baselines.registry import baseline, canonical_name
from editlib.baselines.settings import BaselineSettings, Budget
from editlib.baselines.validation import Validation, ValidationScores, recalls, score, validation_hash
from editlib.errors import EditError, HparamsError, OutputError
from editlib.files import write_json
from editlib.models.anatomy import anatomy
from editlib.models.prompt_settings import PromptSettings
from editlib.models.weights import weights_sha256
from editlib.requests.reading import requests_hash
from editlib.requests.request import EditRequest
from editlib.shelf import append_cell, check_same_job, read_cells, read_kept

log = logging.getLogger(__name__)

TRIALS, JOB = "trials.jsonl", "search.json"


@dataclass(frozen=True)
class TrialRun:
    """Holds one trial: its settings, and the scores (0..1) on the validation questions.

    `seconds` counts the training since the last trial of the same run, and the measurement, so that the trials' seconds
    add up to the search's. `failed` is the reason why there is no score; such a trial has balance 0.
    """

    learning_rate: float | None
    steps: int | None
    forgetting: float
    retention: float
    balance: float
    seconds: float
    failed: str | None = None


@dataclass(frozen=True)
class SearchResult:
    """Holds the best settings, and every trial in the order of the search.

    Args:
        edges: settings of the best trial that lie at an end of their range, such as "learning_rate low".
        before: mean recall of the unedited model on the forget and on the retain questions.
    """

    name: str
    best: BaselineSettings
    chosen: TrialRun
    trials: tuple[TrialRun, ...]
    edges: tuple[str, ...]
    before: tuple[float, float]
    budget: Budget

    def to_dict(self) -> dict[str, Any]:
        """Returns the result JSON-ready."""
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
    how: PromptSettings | None = None,
    out: Path | None = None,
    progress: bool = False,
) -> SearchResult:
    """Finds the learning rate and the number of steps with the highest balance on `validation`.

    Tries `budget.rates` learning rates, evenly spaced in their logarithm, each at `budget.points` numbers of steps.
    Ties go to fewer steps, then to the smaller rate. The learning rate of a gradient run does not decay, so one run is
    measured at all its numbers of steps; an editor runs once per trial. A baseline without either has one trial.

    Model and tokenizer are unchanged afterwards, bit for bit.

    Args:
        forget, retain, validation: as `validation.split` makes them.
        settings: everything except learning rate and steps.
        own_answers, how: see `make_pairs`.
        out: a folder for finished trials; the same search resumes from it.

    Raises:
        OutputError: `out` holds another search, or cannot be written.
        EditlibError: see `apply_baseline_to_model`. A loss that is not finite is a failed trial, not an error.
    """
    name, budget, settings = canonical_name(name), budget or Budget(), settings or BaselineSettings()
    check_baseline(name, forget, retain, settings, how)
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
        **({} if how is None else {"prompts": how.to_dict()}),
    }
    finished = {} if out is None else _opened(out, job)
    given = {"seed": seed, "model_name": model_name, "how": how, "progress": progress}
    tries = _Search(name, model, tok, forget, retain, validation, settings, finished, own_answers, out, given)
    plan = list(_plan(name, budget))
    for rate, points in plan:
        tries.run_rate(rate, points)
    trials = list(dict.fromkeys(tries.trials[rate, steps] for rate, points in plan for steps in points))
    chosen = max(trials, key=lambda trial: (trial.balance, -(trial.steps or 0), -(trial.learning_rate or 0)))
    best = replace(settings, learning_rate=chosen.learning_rate, steps=chosen.steps)
    edges = _edges(chosen, trials)
    if edges:
        log.info("%s: the best settings lie at the edge of the search (%s)", name, ", ".join(edges))
    return SearchResult(name, best, chosen, tuple(trials), edges, tries.before.means, budget)


class _Search:
    """Runs the trials of one call of `search`; every run starts from the same weights and chat template."""

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tok: PreTrainedTokenizerBase,
        forget: Sequence[EditRequest],
        retain: Sequence[EditRequest],
        validation: Validation,
        settings: BaselineSettings,
        finished: Mapping[tuple[float | None, int | None], TrialRun],
        own_answers: Mapping[str, Sequence[int]] | None,
        out: Path | None,
        given: Mapping[str, Any],
    ) -> None:
        """Keeps the weights, and measures the unedited model.

        Args:
            finished: trials of an earlier run by learning rate and steps.
            given: `seed`, `model_name`, `how` and `progress` of `apply_baseline_to_model`.
        """
        self.name, self.model, self.tok, self.forget, self.retain = name, model, tok, forget, retain
        self.validation, self.settings, self.out, self.given = validation, settings, out, given
        self.trials = dict(finished)
        self._own_answers = own_answers
        self._pairs: tuple[Pairs, Pairs | None] | None = None
        self._entry, self._anat = baseline(name), anatomy(model)
        self._weights, self._template = keep(model), copy.copy(tok.chat_template)
        self.before = recalls(self._anat, tok, validation, given["how"])
        self._since = time.perf_counter()  # the end of the last trial

    def run_rate(self, rate: float | None, points: Sequence[int | None]) -> None:
        """Runs the baseline once with a learning rate, and records its trials at the numbers of steps `points`.

        Trials that are recorded already are left out. Weights and chat template are restored afterwards.
        """
        missing = [steps for steps in points if (rate, steps) not in self.trials]
        if not missing:
            return
        settings = replace(self.settings, learning_rate=rate, steps=points[-1])
        try:
            apply_baseline_to_model(
                self.name, self.model, self.tok, self.forget, self.retain, settings,
                **self.given, **self._measured_on_the_way(rate, missing),
            )  # fmt: skip
            if self._entry.kind != "gradient":
                self.record(rate, points[-1])
        except EditError as error:
            for steps in missing:
                if (rate, steps) not in self.trials:
                    self.record(rate, steps, failed=str(error))
        finally:
            put_back(self.model, self._weights)
            self.tok.chat_template = self._template

    def record(self, rate: float | None, steps: int | None, *, failed: str | None = None) -> None:
        """Measures the current model and records the trial; one that `failed` scores 0."""
        measured = ValidationScores(0.0, 0.0, 0.0)
        if failed is None:
            measured = score(recalls(self._anat, self.tok, self.validation, self.given["how"]), self.before)
        now = time.perf_counter()
        trial = TrialRun(rate, steps, **asdict(measured), seconds=now - self._since, failed=failed)
        self._since = now
        log.info("%s: rate %s, steps %s: balance %.3f", self.name, rate, steps, trial.balance)
        if self.out is not None:
            append_cell(self.out / TRIALS, asdict(trial))
        self.trials[rate, steps] = trial

    def _measured_on_the_way(self, rate: float | None, points: Sequence[int | None]) -> dict[str, Any]:
        """Returns arguments that let a gradient run record its trials while it trains; none for other baselines."""
        if self._entry.kind != "gradient":
            return {}
        if self._pairs is None:
            self._pairs = pairs_for(
                self._entry, self._anat, self.tok, self.forget, self.retain,
                seed=self.given["seed"], own_answers=self._own_answers, how=self.given["how"],
            )  # fmt: skip
        return {"pairs": self._pairs, "watch": lambda steps: self.record(rate, steps), "watched": points}


def rates(name: str, budget: Budget) -> list[float]:
    """Returns the learning rates of a search, evenly spaced in their logarithm; a single one is the middle of the
    range.

    The range is the budget's, or else the baseline's own.
    """
    count, (low, high) = budget.rates, map(math.log, _ends(name, budget))
    fractions = [0.5] if count == 1 else [i / (count - 1) for i in range(count)]
    return [float(f"{math.exp(low + (high - low) * fraction):.3g}") for fraction in fractions]


def check_range(name: str, budget: Budget) -> None:
    """Raises `HparamsError` if a search for this baseline has no learning rates between `low` and `high`."""
    if not baseline(name).searched:
        if (budget.low, budget.high) != (None, None):
            raise HparamsError(f"{name} has no learning rate to search for; remove low and high")
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
    """Yields the runs of a search: a learning rate, and the numbers of steps to measure it at."""
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
    """Returns the settings of the chosen trial that are at an end of their range."""
    edges = []
    for key in ("learning_rate", "steps"):
        values = {getattr(trial, key) for trial in trials} - {None}
        value = getattr(chosen, key)
        if len(values) > 1 and value in (min(values), max(values)):
            edges.append(f"{key} {'low' if value == min(values) else 'high'}")
    return tuple(edges)


def _opened(out: Path, job: dict[str, Any]) -> dict[tuple[float | None, int | None], TrialRun]:
    """Returns the finished trials of the same search in `out`; makes the folder if needed."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror}; check the folder") from None
    # A damaged file counts as another search: the origin of the trials beside it is unknown.
    kept = (read_kept(out / JOB) or {}) if (out / JOB).is_file() else None
    check_same_job(out, kept, job, held="another search", remedy="choose another folder, or remove it")
    if kept is None:
        write_json(out / JOB, job)
    trials = read_cells(out / TRIALS, TrialRun)
    return {(trial.learning_rate, trial.steps): trial for trial in trials}
