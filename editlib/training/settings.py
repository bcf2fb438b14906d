"""Define the settings of a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from editlib.settings import check_fields, setting

Decay = Literal["constant", "linear", "cosine"]
Precision = Literal["auto", "float32", "bfloat16"]
LEAST_SHARE = 0.1  # of the learning rate, at the end of its decay


@dataclass(frozen=True)
class TrainSettings:
    """Holds the settings of a run: AdamW (1711.05101) with a linear warm-up.

    Args:
        learning_rate: largest learning rate, reached after the warm-up.
        steps: optimiser steps.
        batch_size: items of each part of the loss per step, drawn from shuffled epochs.
        warmup_steps: steps of the linear warm-up.
        decay: learning rate after the warm-up: "constant", or falling to a tenth at the last step. With "constant" a
            longer run passes through the final weights of a shorter one.
        max_grad_norm: gradients are clipped to this L2 norm; `None`: no clipping.
        weight_decay: AdamW's weight decay.
        precision: dtype of the matrix products; weights, gradients and AdamW's moments are always fp32. "auto" is
            bfloat16 if the processor is faster in it.
        seed: seed of the order of the items.

    Raises:
        HparamsError: a value of the wrong type or out of range.
    """

    learning_rate: float = setting(1e-5, min=0)
    steps: int = setting(100, min=0)
    batch_size: int = setting(16, min=1)
    warmup_steps: int = setting(5, min=0)
    decay: Decay = "constant"
    weight_decay: float = setting(0.0, min=0)
    max_grad_norm: float | None = setting(1.0, above=0)
    precision: Precision = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def rate(self, step: int) -> float:
        """Returns the learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        if self.decay == "constant":
            return self.learning_rate
        gone = (step - self.warmup_steps) / max(self.steps - self.warmup_steps - 1, 1)
        left = 1 - gone if self.decay == "linear" else (1 + math.cos(math.pi * gone)) / 2
        return self.learning_rate * (LEAST_SHARE + (1 - LEAST_SHARE) * left)

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings JSON-ready."""
        return asdict(self)
