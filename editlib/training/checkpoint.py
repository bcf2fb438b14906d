"""Save the state of a training run on disk, so that it resumes after a crash with the same result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from editlib.errors import OutputError, quote
from editlib.files import atomic_path


@dataclass(frozen=True)
class Checkpoint:
    """Keeps a run's weights and AdamW's moments in a file, replaced in one step.

    Args:
        job: identifies the run; a file of another job is refused.
        seconds: least time between two writes; nothing is written after the last step.
    """

    path: Path
    job: Mapping[str, Any]
    seconds: float = 300.0

    def save(
        self, weights: Mapping[str, Tensor], optimiser: torch.optim.Optimizer, step: int, notes: Mapping[str, Any]
    ) -> None:
        """Writes the state after `step` steps.

        Raises:
            OutputError: the file cannot be written.
        """
        tensors = {}
        for name, weight in weights.items():
            state = optimiser.state[weight]
            tensors[f"weight.{name}"] = weight.detach().contiguous()
            tensors[f"mean.{name}"] = state["exp_avg"].contiguous()
            tensors[f"square.{name}"] = state["exp_avg_sq"].contiguous()
        about = {"job": _text(self.job), "step": str(step), "notes": json.dumps(notes)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path) as temporary:
            save_file(tensors, temporary, metadata=about)

    def load(self, weights: Mapping[str, Tensor], optimiser: torch.optim.Optimizer) -> tuple[int, dict[str, Any]]:
        """Restores weights and moments; returns the number of finished steps and the notes, `(0, {})` without a file.

        Raises:
            OutputError: the file is damaged or another job's.
        """
        if not self.path.is_file():
            return 0, {}
        try:
            with safe_open(self.path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("job") != _text(self.job):
                    raise OutputError(
                        f"{self.path} belongs to another job (other model, data or settings); remove it, or choose "
                        "another --out"
                    )
                step = int(about["step"])
                with torch.no_grad():
                    for name, weight in weights.items():
                        weight.copy_(file.get_tensor(f"weight.{name}"))
                        optimiser.state[weight] = {
                            "step": torch.tensor(float(step), device=weight.device),
                            "exp_avg": file.get_tensor(f"mean.{name}").to(weight),
                            "exp_avg_sq": file.get_tensor(f"square.{name}").to(weight),
                        }
                notes = json.loads(about["notes"])
                kinds = {"losses": list, "parts": dict, "tokens": int}
                if not isinstance(notes, dict) or any(
                    name in notes and not isinstance(notes[name], kind) for name, kind in kinds.items()
                ):
                    raise ValueError(f"its notes are {quote(notes)}")
                return step, notes
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"{self.path}: a damaged checkpoint ({error}); remove it to start again") from None

    def drop(self) -> None:
        """Removes the file."""
        self.path.unlink(missing_ok=True)


def _text(job: Mapping[str, Any]) -> str:
    return json.dumps(job, sort_keys=True)
