"""The answer begun for the model: an edit that acts on the first token of an answer is stepped over."""

from __future__ import annotations

from collections.abc import Sequence

from editlib.attacks.asking import Prompts, Scene, Target, ask_greedily, right_answers
from editlib.attacks.outcome import Found
from editlib.evaluation.metrics import has_answer
from editlib.request import EditRequest

LEAD = "The answer is"


def prefill_lead(target: Target, facts: Sequence[EditRequest], scene: Scene) -> Found:
    """Every answer begins with `LEAD`."""
    lead = target.form.answer_ids(LEAD)
    prompts = [[target.form.encode(fact.question).followed_by(lead)] for fact in facts]
    return ask_greedily(target, facts, prompts, scene)


def prefill_answer(target: Target, facts: Sequence[EditRequest], scene: Scene) -> Found:
    """Every answer begins with the first token of the right one, which must not be the right one already."""
    return ask_greedily(target, facts, [_begun(target, fact) for fact in facts], scene)


def _begun(target: Target, fact: EditRequest) -> Prompts:
    answer = fact.answer or ""
    start = target.answer_start(answer)
    if len(start) == len(target.form.answer_ids(answer)) or has_answer(target.text(start), right_answers(fact)):
        return "the answer is one token"
    return [target.form.encode(fact.question).followed_by(start)]
