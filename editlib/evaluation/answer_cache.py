"""Ask a model many questions, and keep the base model's answers so that they are generated once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from editlib.errors import OutputError
from editlib.files import check_file, write_json
from editlib.models.anatomy import Anatomy
from editlib.models.generation import greedy
from editlib.models.positions import check_prompts
from editlib.models.prompts import Asking, PromptFormat

ANSWER_TOKENS = 24


@dataclass(frozen=True)
class AnswerCache:
    """Keeps answers of the base model, so that they are generated once: `{question: token ids}` of one model."""

    model_sha256: str
    answers: dict[str, tuple[int, ...]]

    def save(self, path: Path) -> None:
        """Writes the answers as JSON, atomically."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path, model_sha256: str) -> AnswerCache:
        """Reads saved answers; empty if the file is missing, damaged or of another model, since answers only save
        time."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["model_sha256"] == model_sha256:
                answers = {question: tuple(ids) for question, ids in content["answers"].items()}
                if all(type(number) is int for ids in answers.values() for number in ids):
                    return cls(model_sha256, answers)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        return cls(model_sha256, {})


def check_answers_file(path: Path) -> None:
    """Raises `OutputError` if answers cannot be saved at `path`: another kind of file is there, or none can be
    written."""
    check_file(path, overwrite=True)
    if not path.exists():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not {"model_sha256", "answers"} <= content.keys():
        raise OutputError(f"{path}: not a file of a model's answers; give a name that does not exist yet")


def ask(
    anat: Anatomy,
    tok: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    drafts: Mapping[str, Sequence[int]] | None = None,
    max_new_tokens: int = ANSWER_TOKENS,
    how: Asking = None,
    progress: str | None = None,
) -> dict[str, tuple[int, ...]]:
    """Generates greedy answers, as token ids by question.

    Args:
        drafts: likely answers by question, as token ids; they are verified, which is faster than generating.
        max_new_tokens: length of an answer, in tokens.
        how: settings of the prompts.

    Raises:
        RequestError: a question is longer than the model's positions; nothing is generated then.
    """
    form = PromptFormat.of(tok, how)
    unique = list(dict.fromkeys(questions))
    check_prompts(anat.model, form, zip(unique, unique, strict=True), answer_tokens=max_new_tokens)
    rows = [form.encode(question) for question in unique]
    known = None if drafts is None else [tuple(drafts.get(question, ())) for question in unique]
    answers = greedy(anat, rows, drafts=known, max_new_tokens=max_new_tokens, progress=progress)
    return dict(zip(unique, answers, strict=True))
