"""What a gradient baseline reads: questions with the answers that are unlearned or kept, and refusals to them."""

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
from editlib.models.prompts import PromptFormat, TokenRow
from editlib.requests.request import EditRequest
from editlib.training import Item

OWN_TOKENS = 48
BARE_WORDS = 4  # an answer of so few words is a bare name, which is not how a model says it


@dataclass(frozen=True)
class Pairs:
    """Rows of questions with their answers, and of the same questions with refusals, in one order."""

    answers: tuple[TokenRow, ...]
    refusals: tuple[TokenRow, ...]

    @property
    def known(self) -> list[Item]:
        """One item an answer."""
        return [(row,) for row in self.answers]

    @property
    def refused(self) -> list[Item]:
        """One item a refusal."""
        return [(row,) for row in self.refusals]

    @property
    def both(self) -> list[Item]:
        """Items of refusal and answer."""
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
) -> Pairs:
    """Each request's question and its `phrasings` with the answer.

    The answer is the request's, except where that is a bare name or missing: a model says "The capital of France is
    Paris.", and unlearning or keeping "Paris" as its first word would leave that as it is. There the model's own greedy
    answer stands, if it holds the right one. Refusals are drawn from `seed`.

    Args:
        own: the model's own answer stands for a bare one even if it is wrong: what is to be kept is what the model
            says, and names that it does not know would teach it to answer in bare names.
        spoken: what `own_answers` gave for this very model and these requests, taken as it is; generated without it.

    Raises:
        RequestError: no request at all.
    """
    if not requests:
        raise RequestError("no request was given to train on; give at least one")
    form = PromptFormat(tok)
    own_answers = generate_own_answers(anat, tok, requests, known=own_answers)
    asked = [(text, request) for request in requests for text in request.wordings]
    rows = [form.encode(text) for text, _ in asked]
    rng = random.Random(seed)
    told = list(refusals or data.refusals())
    ended = form.end_ids(end_tokens(anat))
    answers, refused = [], []
    for row, (question, request) in zip(rows, asked, strict=True):
        ids = tuple(own_answers[question]) if _is_bare(request) else ()
        text = tok.decode(ids, skip_special_tokens=True)
        right = request.answer is None or has_answer(text, (request.answer, *request.aliases))
        cut = len(ids) == OWN_TOKENS
        if request.answer is not None and not (ids and (own or right)):
            ids, cut = form.answer_ids(request.answer, question), False
        answers.append(row.followed_by((*ids, *(() if cut else ended))))
        refused.append(row.followed_by((*form.answer_ids(rng.choice(told), question), *ended)))
    kept = [i for i, row in enumerate(answers) if row.extra]  # a model may have nothing to say
    return Pairs(tuple(answers[i] for i in kept), tuple(refused[i] for i in kept))


def generate_own_answers(
    anat: Anatomy,
    tok: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    *,
    known: Mapping[str, Sequence[int]] | None = None,
    progress: str | None = None,
) -> dict[str, tuple[int, ...]]:
    """What the model says, greedily and in at most 48 tokens, to the wordings of the requests whose answer is a bare
    name or missing: token ids by question, without the end token. The `known` ones are not asked again."""
    found = {question: tuple(ids) for question, ids in (known or {}).items()}
    wanted = [text for request in requests if _is_bare(request) for text in request.wordings]
    missing = [text for text in dict.fromkeys(wanted) if text not in found]
    form = PromptFormat(tok)
    said = greedy(anat, [form.encode(text) for text in missing], max_new_tokens=OWN_TOKENS, progress=progress)
    return found | dict(zip(missing, said, strict=True))


def _is_bare(request: EditRequest) -> bool:
    return request.answer is None or len(request.answer.split()) <= BARE_WORDS
