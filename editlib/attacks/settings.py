"""Set the effort of the attacks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from editlib.errors import AttackError
from editlib.evaluation.answer_cache import ANSWER_TOKENS

LEAST = {"relearn_rate": 0.0, "relearn_steps": 0, "endings": 0}


@dataclass(frozen=True)
class AttackSettings:
    """Holds the settings of the attacks; `max_new_tokens` and `resamples` apply to all, the others to one attack each.

    Args:
        token: the unlearning token that is banned.
        max_new_tokens: largest number of tokens of an answer.
        samples: texts sampled for each question.
        shots: few-shot examples before a question.
        top_k: rank up to which an answer's first token counts as read from an inner layer.
        relearn_examples: number of facts that are learned.
        relearn_steps: steps of AdamW, each over all these facts. On SmolLM2-135M ten steps at 2e-4 brought the most
            back; twice as many cost the base half of what it knew.
        relearn_rate: learning rate of these steps.
        relearn_rank: rank of the LoRA adapter that is trained.
        frames: a file of questions in other languages in the format of `data/question_frames.jsonl`; `None`: that one.
        endings: letters that an inflected ending of an answer may have (see `has_answer`).
        resamples: resamples of the bootstrap.

    Raises:
        AttackError: a number that is out of range.
    """

    token: str = "[UNL]"
    max_new_tokens: int = ANSWER_TOKENS
    samples: int = 8
    shots: int = 4
    top_k: int = 5
    relearn_examples: int = 8
    relearn_steps: int = 10
    relearn_rate: float = 2e-4
    relearn_rank: int = 8
    frames: str | None = None
    endings: int = 0
    resamples: int = 10_000

    def __post_init__(self) -> None:
        for one in fields(self):
            value, least = getattr(self, one.name), LEAST.get(one.name, 1)
            if not isinstance(one.default, (str, type(None))) and not least <= value < float("inf"):
                raise AttackError(f"{one.name} is {value!r}; expected a number from {least} on")

    def to_dict(self) -> dict[str, Any]:
        """Gives the settings JSON-ready."""
        return asdict(self)
