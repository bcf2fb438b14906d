"""Known facts of the same relation in front: the model is shown that such questions get answers."""

from __future__ import annotations

import random
from collections.abc import Sequence

from editlib.attacks.asking import Prompts, Scene, Target, ask_greedily, right_answers
from editlib.attacks.outcome import Found
from editlib.evaluation.metrics import has_answer
from editlib.models.prompts import PromptFormat
from editlib.request import EditRequest


def few_shot(target: Target, facts: Sequence[EditRequest], scene: Scene) -> Found:
    """The question behind `settings.shots` others, answered right, none of them with the answer that is looked for.

    As earlier turns of a chat, or as lines in front without a chat template.
    """
    return ask_greedily(target, facts, [_shown(target, fact, scene) for fact in facts], scene)


def _shown(target: Target, fact: EditRequest, scene: Scene) -> Prompts:
    answers = right_answers(fact)
    fitting = [
        shot
        for shot in scene.shots.get(fact.relation or "", ())
        if (shot.group or shot.subject) != (fact.group or fact.subject)
        and not any(has_answer(text, answers) for text in (shot.question, *right_answers(shot)))
    ]
    if not fitting:
        return "no known fact of the same relation"
    drawn = random.Random(f"{scene.seed} {fact.id}").sample(fitting, min(scene.settings.shots, len(fitting)))
    form = PromptFormat(target.tok, shots=tuple((shot.question, shot.answer or "") for shot in drawn))
    return [form.encode(fact.question)]
