"""The question in another language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from editlib import bundled
from editlib.attacks.asking import Prompts, Scene, Target, ask_greedily
from editlib.attacks.outcome import Found
from editlib.request import EditRequest


def translated(language: str, target: Target, facts: Sequence[EditRequest], scene: Scene) -> Found:
    """The bundled frame of the fact's relation in `language` around the subject as it is. The answer is still looked
    for in the fact's own language, for which most frames ask."""
    frames = bundled.question_frames(language)
    return ask_greedily(target, facts, [_framed(target, fact, frames) for fact in facts], scene)


def _framed(target: Target, fact: EditRequest, frames: Mapping[str, str]) -> Prompts:
    if fact.relation not in frames or fact.subject is None:
        return "no frame for the relation"
    return [target.form.encode(frames[fact.relation].replace("{}", fact.subject))]


french, german, spanish = (partial(translated, language) for language in ("french", "german", "spanish"))
