"""Hold the results of an attack: texts, verdicts, and shares with intervals; all JSON-ready."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from editlib.evaluation.intervals import bootstrap
from editlib.evaluation.metrics import Kind, MetricResult, wilson_interval
from editlib.shelf import from_json

COLUMNS = {
    "edited": "the edited model, asked for what it was made to forget",
    "base": "the model before the edit, asked for the same",
    "control": "the edited model, asked for facts that the model before the edit does not know",
}


@dataclass(frozen=True)
class Completion:
    """Holds a text generated after `prompt` (as the model read it), and whether it contains a right answer."""

    prompt: str
    text: str
    leaked: bool


@dataclass(frozen=True)
class Trial:
    """Holds one fact under one attack. `skipped` says why it was not tried; it does not count then."""

    id: str
    question: str
    answers: tuple[str, ...]
    outputs: tuple[Completion, ...] = ()
    skipped: str | None = None

    @property
    def leaked(self) -> bool:
        """Whether any output contains the answer."""
        return any(output.leaked for output in self.outputs)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Trial:
        """Reads the output of `dataclasses.asdict`, also after a JSON round trip."""
        outputs = tuple(from_json(Completion, output) for output in value["outputs"])
        return from_json(cls, {**value, "answers": tuple(value["answers"]), "outputs": outputs})


@dataclass(frozen=True, kw_only=True)
class LeakRate(MetricResult):
    """Holds the share of `n` facts that leaked (`agg_value`; lower is better), with two intervals.

    `interval` is the 95 % percentile bootstrap over facts (Efron 1979), which is a single point if all facts or none
    leaked; `wilson` is the Wilson interval, which never is. `skipped` counts facts that were not tried by reason.
    """

    name: str = "leak_rate"
    kind: Kind | None = "generated"
    higher_is_better: bool | None = False
    meaning: str = "share of the facts whose answer an attack brought back"
    n: int
    interval: tuple[float, float]
    leaked: int
    wilson: tuple[float, float]
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def rate(self) -> float | None:
        """The share of the facts that leaked; `None` if none was tried."""
        return self.agg_value

    def to_row(self) -> dict[str, Any]:
        """Returns the fields of a share in `attacks.json`."""
        return {
            "leaked": self.leaked,
            "n": self.n,
            "rate": self.rate,
            "interval": list(self.interval),
            "wilson": list(self.wilson),
            "skipped": dict(self.skipped),
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> LeakRate:
        """Reads the output of `to_row`.

        Raises:
            KeyError, TypeError: a field is missing, or holds something else.
        """
        ends = {name: tuple(row[name]) for name in ("interval", "wilson")}
        given = {name: row[name] for name in ("leaked", "n", "skipped")}
        return from_json(cls, {"agg_value": row["rate"], **given, **ends})


@dataclass(frozen=True)
class AttackOutcome:
    """Holds the result of one attack on one model: one trial per fact, and further numbers (losses of a training)."""

    trials: tuple[Trial, ...]
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AttackResult:
    """Holds one attack by column (see `COLUMNS`): shares, and the trials that each share summarises."""

    attack: str
    meaning: str
    shares: Mapping[str, LeakRate]
    trials: Mapping[str, tuple[Trial, ...]]
    notes: Mapping[str, Mapping[str, float]]
    seconds: float

    @classmethod
    def of(
        cls,
        attack: str,
        meaning: str,
        trials: Mapping[str, Sequence[Trial]],
        notes: Mapping[str, Mapping[str, float]],
        seconds: float,
        *,
        resamples: int,
        seed: int,
    ) -> AttackResult:
        """Sums up the trials of each column; columns without notes have no entry in `notes`."""
        shares = {column: share_of(of_column, resamples=resamples, seed=seed) for column, of_column in trials.items()}
        kept = {column: dict(of_column) for column, of_column in notes.items() if of_column}
        rows = {column: tuple(of_column) for column, of_column in trials.items()}
        return cls(attack, meaning, shares, rows, kept, round(seconds, 2))

    def to_dict(self) -> dict[str, Any]:
        """Returns the result JSON-ready."""
        return {
            "attack": self.attack,
            "meaning": self.meaning,
            "shares": {column: share.to_row() for column, share in self.shares.items()},
            "trials": {column: [asdict(trial) for trial in trials] for column, trials in self.trials.items()},
            "notes": {column: dict(notes) for column, notes in self.notes.items()},
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> AttackResult:
        """Reads the output of `to_dict`, also after a JSON round trip."""
        shares = {column: LeakRate.from_row(share) for column, share in value["shares"].items()}
        trials = {column: tuple(map(Trial.from_dict, rows)) for column, rows in value["trials"].items()}
        return from_json(cls, {**value, "shares": shares, "trials": trials})


def share_of(trials: Sequence[Trial], *, resamples: int, seed: int) -> LeakRate:
    """Counts the facts that leaked, with a 95 % bootstrap interval and a Wilson interval of their share."""
    counted = [trial.leaked for trial in trials if trial.skipped is None]
    skipped = Counter(trial.skipped for trial in trials if trial.skipped is not None)
    leaked, n = sum(counted), len(counted)
    return LeakRate(
        leaked=leaked,
        n=n,
        agg_value=leaked / n if n else None,
        interval=bootstrap(counted, resamples=resamples, seed=seed),
        wilson=wilson_interval(leaked, n),
        skipped=dict(sorted(skipped.items())),
    )
