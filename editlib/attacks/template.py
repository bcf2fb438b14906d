"""The chat template dropped, or replaced by a plain form."""

from __future__ import annotations

from collections.abc import Sequence

from editlib.attacks.asking import Scene, Target, ask_each, ask_greedily, not_asked
from editlib.attacks.outcome import Found
from editlib.models.prompts import PromptFormat
from editlib.request import EditRequest

PLAIN, NEXT = "Q: {}\nA:", "\nQ:"


def no_template(target: Target, facts: Sequence[EditRequest], scene: Scene) -> Found:
    """The bare question; without a chat template that is how the model is asked anyway, so nothing is tried."""
    if not target.form.uses_chat:
        return Found(tuple(not_asked(fact, "no chat template") for fact in facts))
    return ask_each(target, facts, scene, PromptFormat(target.tok, chat=False))


def plain_form(target: Target, facts: Sequence[EditRequest], scene: Scene) -> Found:
    """`Q: ... A:` as plain text; the next question that a model makes up ends its answer."""
    form = PromptFormat(target.tok, chat=False)
    prompts = [[form.encode(fact.question, template=PLAIN)] for fact in facts]
    return ask_greedily(target, facts, prompts, scene, cut=NEXT)
