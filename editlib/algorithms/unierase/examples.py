"""Make few-shot prompts: a request's question after other facts, each asked and answered.

After examples a model answers with the bare name, and its state at the subject is different. An answer that is erased
for the plain question may come back in a few-shot prompt, so rows and keys come from both.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from editlib.algorithms.pipeline import encode_contexts
from editlib.hparams import UniEraseHyperParams
from editlib.models.prompts import PromptFormat, TokenRow
from editlib.requests.request import EditRequest

EXAMPLES = 3  # before a question, at most
FEWEST = 2  # with fewer there is no few-shot prompt
LONGEST = 25  # characters of an example's answer: a name, not a sentence


def few_shot_format(
    form: PromptFormat,
    request: EditRequest,
    retain: Sequence[EditRequest],
    seed: int = 0,
    *,
    limit: int | None = None,
) -> PromptFormat | None:
    """Returns a prompt format with few-shot examples for `request`; `None` if `retain` has too few examples, or if with
    too few of them each wording fits `limit` tokens.

    The examples are drawn from facts of `retain` in other relations, so that the edit does not learn to answer a list
    of the request's relation. They contain neither its subject nor its answer.
    """
    named = [text.lower() for text in (request.subject, request.answer) if text]
    usable = [
        (fact.question, fact.answer)
        for fact in retain
        if fact.answer is not None
        and fact.subject is not None
        and len(fact.answer) <= LONGEST
        and (fact.relation is None or fact.relation != request.relation)
        and not any(name in f"{fact.question} {fact.answer}".lower() for name in named)
    ]
    if len(usable) < FEWEST:
        return None
    shots = random.Random(f"{seed} {request.id}").sample(usable, min(EXAMPLES, len(usable)))
    made = replace(form, shots=tuple(shots))
    while limit is not None and any(len(made.encode(text)) > limit for text in request.wordings):
        if len(made.shots) <= FEWEST:
            return None
        made = replace(made, shots=made.shots[1:])
    return made


def contexts_of(
    form: PromptFormat,
    request: EditRequest,
    retain: Sequence[EditRequest],
    hparams: UniEraseHyperParams,
    seed: int,
    limit: int | None,
) -> list[TokenRow]:
    """Encodes the request's question and further phrasings in every context template, the plain question first.

    Where rows also read few-shot prompts, the question in such a prompt comes last.
    """
    place = hparams.fact_token if request.subject is not None else "last"
    contexts = encode_contexts(form, request, hparams.context_templates, place)
    few_shot = few_shot_format(form, request, retain, seed, limit=limit) if hparams.reads_examples else None
    if few_shot is not None:
        contexts += encode_contexts(few_shot, replace(request, phrasings=()), ["{}"], place)
    return contexts
