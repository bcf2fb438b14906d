"""Score the trials of a search by questions that are used neither for training nor for the report."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from editlib.errors import RequestError
from editlib.evaluation.metrics import balance, rouge_l_recall
from editlib.models.anatomy import Anatomy
from editlib.models.generation import greedy
from editlib.models.prompts import Asking, PromptFormat
from editlib.models.thinking import answer_texts
from editlib.requests.reading import requests_hash
from editlib.requests.request import EditRequest
from editlib.requests.templates import literal

ANSWER_TOKENS = 24
HELD_OUT = 4  # one in four retain prompts is held out


@dataclass(frozen=True)
class Validation:
    """Holds questions with their true answers, to forget and to keep; `ids` of the retain prompts among them."""

    forget: tuple[tuple[str, str], ...]
    retain: tuple[tuple[str, str], ...]
    ids: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, list[list[str]]]:
        """Returns the questions JSON-ready."""
        return {kind: [list(pair) for pair in getattr(self, kind)] for kind in ("forget", "retain")}


@dataclass(frozen=True)
class ValidationSplit:
    """Holds requests and prompts to train on, and the questions that are held out."""

    forget: tuple[EditRequest, ...]
    retain: tuple[EditRequest, ...]
    validation: Validation


@dataclass(frozen=True)
class ValidationScores:
    """Holds the share of the earlier answers that is gone (forget) and that remains (retain), 0..1, and their harmonic
    mean.

    Plain numbers, not a `MetricResult`: they only rank the trials of a search, each a row of `trials.jsonl`, and are
    never reported as a result.
    """

    forgetting: float
    retention: float
    balance: float


def split(
    forget: Sequence[EditRequest], retain: Sequence[EditRequest], *, questions: int = 24, seed: int = 0
) -> ValidationSplit:
    """Holds out validation questions, at most `questions` of each kind.

    Each request to forget gives its last phrasing, which is then not trained on; without phrasings its first paraphrase
    (listed in `Validation.forget`, to be left out of a report); without either the question itself, which is a weaker
    test. Of the retain prompts with an answer one in four is drawn by `seed`, and not trained on.

    Raises:
        RequestError: fewer than four retain prompts with an answer, or no request with one.
    """
    rng = random.Random(f"{seed} validation")
    answered = [prompt for prompt in retain if prompt.answer is not None]
    if len(answered) < HELD_OUT:
        raise RequestError(
            f"a search needs at least {HELD_OUT} retain prompts with an answer to hold some out; {len(answered)} were "
            "given: give more, or leave the search out"
        )
    held_out = rng.sample(answered, min(questions, len(answered) // HELD_OUT))
    ids = {prompt.id for prompt in held_out}
    asked = [request for request in forget if request.answer is not None]
    if not asked:
        raise RequestError('a search needs the true "answer" of the requests to forget; none of them has one')
    some = rng.sample(asked, min(questions, len(asked)))
    return ValidationSplit(
        tuple(replace(request, phrasings=request.phrasings[:-1]) for request in forget),
        tuple(prompt for prompt in retain if prompt.id not in ids),
        Validation(
            tuple((_apart(request), str(request.answer)) for request in some),
            tuple((prompt.question, str(prompt.answer)) for prompt in held_out),
            tuple(prompt.id for prompt in held_out),
        ),
    )


def _apart(request: EditRequest) -> str:
    return next(iter((*request.filled_phrasings[-1:], *request.filled_paraphrases[:1], request.question)))


@dataclass(frozen=True)
class Recalls:
    """Holds ROUGE-L recall of the answers to the forget and the retain questions, in their order."""

    forget: tuple[float, ...]
    retain: tuple[float, ...]

    @property
    def means(self) -> tuple[float, float]:
        """Mean recall on the forget and on the retain questions."""
        return sum(self.forget) / len(self.forget), sum(self.retain) / len(self.retain)


def recalls(anat: Anatomy, tok: PreTrainedTokenizerBase, validation: Validation, how: Asking = None) -> Recalls:
    """Computes the ROUGE-L recall of the greedy answers (24 tokens) to the validation questions.

    Raises:
        MetricError: `rouge-score` is not installed.
    """
    form = PromptFormat.of(tok, how)
    pairs = (*validation.forget, *validation.retain)
    said = greedy(anat, [form.encode(question) for question, _ in pairs], max_new_tokens=ANSWER_TOKENS)
    texts = answer_texts(form, said)
    rouge = rouge_l_recall(texts, [answer for _, answer in pairs], on="retain")
    scores = tuple(float(item["rougeL_recall"] or 0.0) for item in rouge.value_by_index.values())
    cut = len(validation.forget)
    return Recalls(scores[:cut], scores[cut:])


def score(now: Recalls, before: Recalls) -> ValidationScores:
    """Scores recalls against those of the unedited model.

    `forgetting` is the share of the earlier recall on forget questions that is gone, `retention` the share on retain
    questions that remains. Both are computed question by question, since newly learned answers are not retention. If
    nothing was recalled before, the set counts as forgotten, or as kept.
    """

    def left(new: Sequence[float], old: Sequence[float]) -> float | None:
        known = sum(old)
        return sum(map(min, new, old)) / known if known > 0 else None

    hidden, kept = left(now.forget, before.forget), left(now.retain, before.retain)
    gone, stays = 1 - (hidden or 0.0), 1.0 if kept is None else kept
    return ValidationScores(gone, stays, float(balance(gone, stays).agg_value or 0.0))


def validation_hash(validation: Validation) -> str:
    """Hashes the questions and answers."""
    pairs = [("forget", *pair) for pair in validation.forget] + [("retain", *pair) for pair in validation.retain]
    requests = [
        EditRequest(f"{kind}:{i}", literal(question), answer=answer) for i, (kind, question, answer) in enumerate(pairs)
    ]
    return requests_hash(requests)
