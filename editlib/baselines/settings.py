"""Set how a baseline trains, and the budget of a search."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from editlib.errors import HparamsError
from editlib.training.settings import Precision, TrainSettings


@dataclass(frozen=True)
class BaselineSettings:
    """Holds the settings of a baseline; `None` means the baseline's default, see docs/reference/baselines.md.

    Args:
        learning_rate: learning rate; for an editor aimed at a refusal, that of its values (`v_lr`).
        steps: optimiser steps; for an editor aimed at a refusal, those of its values (`v_num_grad_steps`).
        batch_size: items of each part of the loss per step.
        warmup_steps: steps of the linear warm-up.
        beta: β of NPO, SimNPO, DPO and AP.
        gamma: γ of SimNPO.
        forget_weight: weight of the loss on what is forgotten.
        retain_weight: weight of the loss on what is kept.
        rank: rank of a LoRA adapter that is merged at the end; `None`: all weights are trained.
        layer: the layer whose states RMU steers; `None`: `n_layers // 4`.
        steering: RMU's coefficient `c`, in units of the mean norm of these states before training.
        precision: dtype of the training's matrix products, as in `TrainSettings`.
        hparams: settings of an editor: a JSON file or a bundled name; `None`: those bundled for the model.
        stats_dir: folder of an editor's statistics.
        corpus: text that missing statistics are computed from.

    Raises:
        HparamsError: a value out of range.
    """

    learning_rate: float | None = None
    steps: int | None = None
    batch_size: int = 16
    warmup_steps: int = 5
    beta: float | None = None
    gamma: float = 0.0
    forget_weight: float | None = None
    retain_weight: float = 1.0
    rank: int | None = None
    layer: int | None = None
    steering: float = 2.0
    precision: Precision = "auto"
    hparams: str | None = None
    stats_dir: str | Path = "stats"
    corpus: str = "wiki-sample"

    def __post_init__(self) -> None:
        for name in ("learning_rate", "beta", "forget_weight", "retain_weight", "steering"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise HparamsError(f"{name} is {value!r}; expected a number above 0")
        for name in ("steps", "rank", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise HparamsError(f"{name} is {value!r}; expected 1 or more")

    def training(self, rate: float, steps: int, seed: int) -> TrainSettings:
        """Returns the trainer's settings."""
        return TrainSettings(
            learning_rate=self.learning_rate or rate,
            steps=self.steps or steps,
            batch_size=self.batch_size,
            warmup_steps=self.warmup_steps,
            precision=self.precision,
            seed=seed,
        )

    def to_dict(self) -> dict[str, Any]:
        """Gives the settings JSON-ready."""
        return {**asdict(self), "stats_dir": str(self.stats_dir)}


@dataclass(frozen=True)
class Budget:
    """Sets the budget of a search: `rates` runs of at most `steps` steps, each measured at `points` numbers of steps.

    Args:
        questions: number of each kind (forget, retain) that a trial asks, at most.
        low, high: range of the learning rates; `None`: the baseline's, see `registry.BASELINES`.

    Raises:
        HparamsError: a number out of range.
    """

    rates: int = 4
    steps: int = 60
    points: int = 3
    questions: int = 24
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        for name in ("rates", "steps", "points", "questions"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise HparamsError(f"{name} of a search is {value!r}; expected a whole number, 1 or more")
        for name in ("low", "high"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1000:
                raise HparamsError(f"{name} of a search is {value:.4g}; expected a learning rate, above 0")
        if self.points > self.steps:
            raise HparamsError(f"a search measures at {self.points} points, but runs for {self.steps} steps; lower one")

    @property
    def measured(self) -> tuple[int, ...]:
        """The numbers of steps at which a run is measured: `steps`, and repeatedly half of it."""
        return tuple(sorted({max(1, round(self.steps / 2**i)) for i in range(self.points)}))
