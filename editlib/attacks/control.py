"""Choose control facts that a model never knew: any that seem to leak do so by chance."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from editlib import data
from editlib.attacks.asking import AttackContext, ask_greedily, knows, right_answers
from editlib.evaluation.metrics import has_answer
from editlib.models.loaded import LoadedModel
from editlib.requests.request import EditRequest

CANDIDATES = 6  # candidates per wanted fact


def usable(facts: Sequence[EditRequest]) -> tuple[list[EditRequest], dict[str, int]]:
    """Lists the facts whose leaking can be detected, and counts the others by reason."""
    fitting: list[EditRequest] = []
    left_out: Counter[str] = Counter()
    for fact in facts:
        if fact.answer is None:
            left_out["no answer given"] += 1
        elif has_answer(fact.question, right_answers(fact)):
            left_out["the answer is in the question"] += 1
        else:
            fitting.append(fact)
    return fitting, dict(left_out)


def unknown(base: LoadedModel, facts: Sequence[EditRequest], context: AttackContext) -> list[EditRequest]:
    """Lists the facts that the model answers wrongly, including all of their paraphrases."""
    wrong = [fact for fact, right in zip(facts, knows(base, facts, context), strict=True) if not right]
    prompts = [[base.form.encode(text) for text in fact.filled_paraphrases] for fact in wrong]
    asked = ask_greedily(base, wrong, prompts, context).trials
    return [fact for fact, trial in zip(wrong, asked, strict=True) if not trial.leaked]


def _first_unknown(
    base: LoadedModel, facts: Sequence[EditRequest], count: int, context: AttackContext
) -> list[EditRequest]:
    """Lists the first `count` of `unknown(base, facts)`, without asking further facts."""
    missed: list[EditRequest] = []
    for begin in range(0, len(facts), count):
        if len(missed) < count:
            missed += unknown(base, facts[begin : begin + count], context)
    return missed[:count]


def bundled_control(base: LoadedModel, requests: Sequence[EditRequest], context: AttackContext) -> list[EditRequest]:
    """Picks bundled facts that the model does not know; of each relation as many as are forgotten, if possible.

    For requests outside the bundled relations, facts of all relations are used.
    """
    rng = random.Random(context.seed)
    candidates = data.without_overlap(data.facts(), requests)
    rng.shuffle(candidates)
    known = {fact.relation for fact in candidates}
    wanted = Counter(request.relation if request.relation in known else None for request in requests)
    control: list[EditRequest] = []
    for relation, count in wanted.items():
        fitting = [fact for fact in candidates if fact not in control and relation in (None, fact.relation)]
        control += _first_unknown(base, fitting[: CANDIDATES * count], count, context)
    return control
