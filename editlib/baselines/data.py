"""Make the training data of gradient baselines: questions with the answers to unlearn or keep, and with refusals."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from editlib import data
from editlib.errors import RequestError
from editlib.evaluation.metrics import has_answer
from editlib.models.anatomy import Anatomy
from editlib.models.generation import end_tokens, greedy
from editlib.models.prompts import Asking, PromptFormat, TokenRow
from editlib.models.thinking import answer_texts
from editlib.requests.request import EditRequest
from editlib.training import Example

OWN_TOKENS = 48
BARE_WORDS = 4  # words: a shorter answer, or one of this length, is a bare name and not a sentence


@dataclass(frozen=True)
class Pairs:
    """Holds token rows of questions with their answers, and of the same questions with refusals, in the same order."""

    answers: tuple[TokenRow, ...]
    refusals: tuple[TokenRow, ...]

    @property
    def known(self) -> list[Example]:
        """Items of one row: the answers."""
        return [(row,) for row in self.answers]

    @property
    def refused(self) -> list[Example]:
        """Items of one row: the refusals."""
        return [(row,) for row in self.refusals]

    @property
    def both(self) -> list[Example]:
        """Items of two rows: refusal and answer."""
        return list(zip(self.refusals, self.answers, strict=True))


def make_pairs(
    anat: Anatomy,
    tok: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    *,
    seed: int,
    refusals: Sequence[str] | None = None,
    own: bool = False,
    own_answers: Mapping[str, Sequence[int]] | None = None,
    how: Asking = None,
) -> Pairs:
    """Pairs each request's question and its `phrasings` with an answer and a refusal.

    The answer is the request's. If that is a bare name or missing, the model's own greedy answer is used, provided
    that it contains the right one: a model says "The capital of France is Paris.", and training on "Paris" as the first
    word would not change that sentence. Refusals are drawn by `seed`.

    Args:
        own: use the model's own answer in place of a bare name even if it is wrong. For prompts to keep, the model's
            own behaviour is what is kept; bare names would teach it to answer in bare names.
        own_answers: the result of `generate_own_answers` for this model and these requests; default: generated.
        how: the prompts' settings.

    Raises:
        RequestError: no request.
    """
    if not requests:
        raise RequestError("no request was given to train on; give at least one")
    form = PromptFormat.of(tok, how)
    own_answers = generate_own_answers(anat, tok, requests, known=own_answers, how=how)
    asked = [(text, request) for request in requests for text in request.wordings]
    rows = [form.encode(text) for text, _ in asked]
    rng = random.Random(seed)
    refusal_texts = list(refusals or data.refusals())
    ended = form.end_ids(end_tokens(anat))
    answers, refused = [], []
    for row, (question, request) in zip(rows, asked, strict=True):
        ids = tuple(own_answers[question]) if _is_bare(request) else ()
        text = answer_texts(form, [ids], warn=False)[0]
        right = request.answer is None or has_answer(text, (request.answer, *request.aliases))
        cut = len(ids) == OWN_TOKENS
        if request.answer is not None and not (ids and (own or right)):
            ids, cut = form.answer_ids(request.answer, question), False
        answers.append(row.followed_by((*ids, *(() if cut else ended))))
        refused.append(row.followed_by((*form.answer_ids(rng.choice(refusal_texts), question), *ended)))
    kept = [i for i, row in enumerate(answers) if row.extra]  # the model's own answer may be empty
    return Pairs(tuple(answers[i] for i in kept), tuple(refused[i] for i in kept))


def generate_own_answers(
    anat: Anatomy,
    tok: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    *,
    known: Mapping[str, Sequence[int]] | None = None,
    how: Asking = None,
    progress: str | None = None,
) -> dict[str, tuple[int, ...]]:
    """Generates the model's greedy answers (at most 48 tokens) for requests whose answer is a bare name or missing.

    Args:
        known: answers that are not generated again.
        how: the prompts' settings.

    Returns:
        Token ids by question, without the end token, including the `known` ones.
    """
    answers = {question: tuple(ids) for question, ids in (known or {}).items()}
    wanted = [text for request in requests if _is_bare(request) for text in request.wordings]
    missing = [text for text in dict.fromkeys(wanted) if text not in answers]
    form = PromptFormat.of(tok, how)
    said = greedy(anat, [form.encode(text) for text in missing], max_new_tokens=OWN_TOKENS, progress=progress)
    return answers | dict(zip(missing, said, strict=True))


def _is_bare(request: EditRequest) -> bool:
    return request.answer is None or len(request.answer.split()) <= BARE_WORDS
