"""Check that prompts fit the model's positions (its longest input)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel

from editlib.errors import RequestError, quote
from editlib.models.prompts import PromptFormat
from editlib.requests.request import EditRequest

POSITIONS = ("max_position_embeddings", "max_seq_len")  # in a config; the second is MPT's
SPARE = 8  # upper bound of the special tokens that a tokenizer adds to a text


def positions_of(model: PreTrainedModel) -> int | None:
    """Returns the most tokens that the model reads at once; `None` if its config names no limit."""
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in POSITIONS]
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def check_prompts(
    model: PreTrainedModel, form: PromptFormat, prompts: Iterable[tuple[str, str]], *, answer_tokens: int = 0
) -> None:
    """Raises `RequestError` if a prompt is longer than the model's positions, before any is run.

    Args:
        prompts: name and question of each.
        answer_tokens: tokens that the answer needs.

    Raises:
        RequestError: names the first such prompt with its length, and the number of others.
    """
    limit = positions_of(model)
    if limit is None:
        return
    named = list(prompts)
    if _surely_fit(form, [question for _, question in named], limit - answer_tokens):
        return
    long = []
    for name, question in named:
        if _surely_fit(form, [question], limit - answer_tokens):
            continue
        if (length := len(form.encode(question)) + answer_tokens) > limit:
            long.append((name, length))
    if long:
        (name, length), others = long[0], len(long) - 1
        more = f" (and {others} more)" if others else ""
        answer = f", {answer_tokens} of them for the answer" if answer_tokens else ""
        raise RequestError(
            f"request {quote(name)}: its prompt needs {length} tokens{answer}; expected at most {limit}, the positions "
            f"of this model{more}: shorten it, or leave it out"
        )


def fitting(
    model: PreTrainedModel, form: PromptFormat, questions: Iterable[str], *, answer_tokens: int = 0
) -> list[str]:
    """Returns the questions whose prompts, with an answer of `answer_tokens`, fit the model's positions."""
    limit, asked = positions_of(model), list(questions)
    if limit is None or _surely_fit(form, asked, limit - answer_tokens):
        return asked
    return [
        question
        for question in asked
        if _surely_fit(form, [question], limit - answer_tokens) or len(form.encode(question)) + answer_tokens <= limit
    ]


def _surely_fit(form: PromptFormat, questions: Sequence[str], limit: int) -> bool:
    """Returns whether the longest of `questions` has at most `limit` tokens, and so all of them, without encoding it.

    A token has at least one byte; the factor of 2 is a margin, since a template may lengthen a text. Rendering each of
    some thousand questions would take longer than all else that is checked.
    """
    longest = max(questions, key=lambda question: len(question.encode()), default=None)
    return longest is None or 2 * len(form.render(longest).encode()) + SPARE <= limit


def check_requests_fit(
    model: PreTrainedModel, form: PromptFormat, requests: Sequence[EditRequest], *, answer_tokens: int = 0
) -> None:
    """Applies `check_prompts` to the questions of `requests`, with all their wordings and target answers."""
    longest = max((len(form.answer_ids(request.target_new)) for request in requests if request.target_new), default=0)
    texts = (
        (request.id, text)
        for request in requests
        for text in (request.question, *request.filled_phrasings, *request.filled_paraphrases)
    )
    check_prompts(model, form, texts, answer_tokens=max(answer_tokens, longest))
