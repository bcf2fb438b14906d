"""Set how a baseline trains, and the budget of a search."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from editlib.errors import HparamsError
from editlib.settings import check_fields, setting
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
        forget_weight: weight of the forget part of the loss.
        retain_weight: weight of the retain part of the loss.
        rank: rank of a LoRA adapter that is merged at the end; `None`: all weights are trained.
        layer: the layer whose states RMU steers; `None`: `n_layers // 4`.
        steering: RMU's coefficient `c`, in units of the mean norm of these states before training.
        precision: dtype of the training's matrix products, as in `TrainSettings`.
        hparams: settings of an editor: a JSON file or a bundled name; `None`: those bundled for the model.
        stats_dir: folder of an editor's statistics.
        corpus: text that missing statistics are computed from.

    Raises:
        HparamsError: a value of the wrong type or out of range.
    """

    learning_rate: float | None = setting(None, above=0)
    steps: int | None = setting(None, min=1)
    batch_size: int = setting(16, min=1)
    warmup_steps: int = setting(5, min=0)
    beta: float | None = setting(None, above=0)
    gamma: float = 0.0
    forget_weight: float | None = setting(None, above=0)
    retain_weight: float = setting(1.0, above=0)
    rank: int | None = setting(None, min=1)
    layer: int | None = setting(None, min=0)
    steering: float = setting(2.0, above=0)
    precision: Precision = "auto"
    hparams: str | None = None
    stats_dir: str | Path = "stats"
    corpus: str = "wiki-sample"

    def __post_init__(self) -> None:
        check_fields(self)

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
        """Returns the settings JSON-ready."""
        return {**asdict(self), "stats_dir": str(self.stats_dir)}


@dataclass(frozen=True)
class Budget:
    """Sets the budget of a search: `rates` runs of at most `steps` steps, each measured at `points` numbers of steps.

    Args:
        rates: number of learning rates to try.
        steps: steps of the longest run.
        points: numbers of steps at which a run is measured: `steps`, and repeatedly half of it.
        questions: most questions of each kind (forget, retain) per trial.
        low, high: range of the learning rates; `None`: the baseline's, see `registry.BASELINES`.

    Raises:
        HparamsError: a number of the wrong type or out of range.
    """

    rates: int = setting(4, min=1)
    steps: int = setting(60, min=1)
    points: int = setting(3, min=1)
    questions: int = setting(24, min=1)
    low: float | None = setting(None, above=0, max=1000)
    high: float | None = setting(None, above=0, max=1000)

    def __post_init__(self) -> None:
        check_fields(self, of=" of a search")
        if self.points > self.steps:
            raise HparamsError(f"a search measures at {self.points} points, but runs for {self.steps} steps; lower one")

    @property
    def measured(self) -> tuple[int, ...]:
        """The numbers of steps at which a run is measured: `steps`, and repeatedly half of it."""
        return tuple(sorted({max(1, round(self.steps / 2**i)) for i in range(self.points)}))
