"""Train models: one small trainer for fine-tuning, gradient unlearning and relearning attacks."""

from editlib.training.checkpoint import Checkpoint
from editlib.training.parts import Example, Part, answer_nll, answered, text_rows
from editlib.training.reading import Reading, read
from editlib.training.settings import TrainSettings
from editlib.training.trainer import TrainResult, mean_loss, train

__all__ = [
    "Checkpoint",
    "Example",
    "Part",
    "Reading",
    "TrainResult",
    "TrainSettings",
    "answer_nll",
    "answered",
    "mean_loss",
    "read",
    "text_rows",
    "train",
]
