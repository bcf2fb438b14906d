"""What a gradient baseline reads: questions with the answers that are unlearned or kept, and refusals to them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from editlib import bundled
from editlib.errors import RequestError
from editlib.evaluation.metrics import has_answer
from editlib.models.anatomy import Anatomy
from editlib.models.generation import greedy
from editlib.models.prompts import PromptFormat, TokenRow
from editlib.request import EditRequest
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
    known_answers: Mapping[str, Sequence[int]] | None = None,
) -> Pairs:
    """Each request's question and its `phrasings` with the answer.

    The answer is the request's, except where that is a bare name or missing: a model says "The capital of France is
    Paris.", and unlearning or keeping "Paris" as its first word would leave that as it is. There the model's own greedy
    answer stands, if it holds the right one. Refusals are drawn from `seed`.

    Args:
        own: the model's own answer stands for a bare one even if it is wrong: what is to be kept is what the model
            says, and names that it does not know would teach it to answer in bare names.
        known_answers: what the model is known to say, or the beginning of it, as token ids by question; it is checked
            instead of generated, and a wrong one changes nothing but the time.

    Raises:
        RequestError: no request at all.
    """
    if not requests:
        raise RequestError("no request was given to train on; give at least one")
    form, end = PromptFormat(tok), tok.eos_token_id
    asked = [(text, request) for request in requests for text in (request.question, *request.filled_phrasings)]
    rows = [form.encode(text) for text, _ in asked]
    bare = [i for i, (_, request) in enumerate(asked) if _is_bare(request)]
    known = known_answers or {}
    drafts = [known.get(asked[i][0], ()) for i in bare]
    said = greedy(anat, [rows[i] for i in bare], max_new_tokens=OWN_TOKENS, drafts=drafts if any(drafts) else None)
    spoken = dict(zip(bare, said, strict=True))
    rng = random.Random(seed)
    told = list(refusals or bundled.refusals())
    ended = () if end is None else (end,)
    answers, refused = [], []
    for i, (row, (_, request)) in enumerate(zip(rows, asked, strict=True)):
        ids = spoken.get(i, ())
        text = tok.decode(ids, skip_special_tokens=True)
        right = request.answer is None or has_answer(text, (request.answer, *request.aliases))
        if request.answer is not None and not (ids and (own or right)):
            ids = form.answer_ids(request.answer)
        answers.append(row.followed_by((*ids, *(ended if len(ids) < OWN_TOKENS or i not in spoken else ()))))
        refused.append(row.followed_by((*form.answer_ids(rng.choice(told)), *ended)))
    kept = [i for i, row in enumerate(answers) if row.extra]  # a model may have nothing to say
    return Pairs(tuple(answers[i] for i in kept), tuple(refused[i] for i in kept))


def _is_bare(request: EditRequest) -> bool:
    return request.answer is None or len(request.answer.split()) <= BARE_WORDS
