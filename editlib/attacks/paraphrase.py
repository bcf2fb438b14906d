"""The same asked in other words."""

from __future__ import annotations

from collections.abc import Sequence

from editlib.attacks.asking import Prompts, Scene, Target, ask_greedily, right_answers
from editlib.attacks.outcome import Found
from editlib.evaluation.metrics import has_answer
from editlib.request import EditRequest


def paraphrase(target: Target, facts: Sequence[EditRequest], scene: Scene) -> Found:
    """Every paraphrase that the fact itself brings along; one that leaks is enough."""
    return ask_greedily(target, facts, [_reworded(target, fact) for fact in facts], scene)


def _reworded(target: Target, fact: EditRequest) -> Prompts:
    texts = [text for text in fact.filled_paraphrases if not has_answer(text, right_answers(fact))]
    return [target.form.encode(text) for text in texts] or "no paraphrase"
