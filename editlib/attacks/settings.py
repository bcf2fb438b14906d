"""Set the effort of the attacks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from editlib.errors import AttackError
from editlib.evaluation.answer_cache import ANSWER_TOKENS
from editlib.settings import check_fields, setting


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
        relearn_steps: steps of AdamW, each over all these facts. On SmolLM2-135M ten steps at 2e-4 recovered the most;
            with twice as many the base lost half of its own knowledge.
        relearn_rate: learning rate of these steps.
        relearn_rank: rank of the LoRA adapter that is trained.
        frames: a file of questions in other languages in the format of `data/question_frames.jsonl`; `None`: that file.
        endings: letters that an inflected ending of an answer may have (see `has_answer`).
        resamples: resamples of the bootstrap.

    Raises:
        AttackError: a value of the wrong type or out of range.
    """

    token: str = "[UNL]"
    max_new_tokens: int = setting(ANSWER_TOKENS, min=1)
    samples: int = setting(8, min=1)
    shots: int = setting(4, min=1)
    top_k: int = setting(5, min=1)
    relearn_examples: int = setting(8, min=1)
    relearn_steps: int = setting(10, min=0)
    relearn_rate: float = setting(2e-4, min=0)
    relearn_rank: int = setting(8, min=1)
    frames: str | None = None
    endings: int = setting(0, min=0)
    resamples: int = setting(10_000, min=1)

    def __post_init__(self) -> None:
        check_fields(self, error=AttackError)

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings JSON-ready."""
        return asdict(self)
