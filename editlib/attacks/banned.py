"""The unlearning token banned: what does the model say when it cannot say `[UNL]`?"""

from __future__ import annotations

from collections.abc import Sequence

from editlib.attacks.asking import Scene, Target, ask_greedily
from editlib.attacks.outcome import Found
from editlib.models.vocabulary import token_id
from editlib.request import EditRequest


def banned_token(target: Target, facts: Sequence[EditRequest], scene: Scene) -> Found:
    """Greedy answers without the token; a model that does not have it is just asked."""
    token = token_id(target.tok, scene.settings.token)
    prompts = [[target.form.encode(fact.question)] for fact in facts]
    return ask_greedily(target, facts, prompts, scene, banned=() if token is None else (token,))
