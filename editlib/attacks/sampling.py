"""Many answers drawn instead of the likeliest one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from editlib.attacks.asking import Scene, Target, trials
from editlib.attacks.outcome import Found
from editlib.models.generation import sample_each
from editlib.models.prompts import TokenRow
from editlib.request import EditRequest


def sampling(target: Target, facts: Sequence[EditRequest], scene: Scene) -> Found:
    """`settings.samples` answers at temperature 1 from the whole vocabulary; one that leaks is enough.

    What is drawn for a fact follows from the seed and its id, whatever else is asked.
    """
    count, limit = scene.settings.samples, scene.settings.max_new_tokens
    seeds = [_seed(f"{scene.seed} {fact.id} {number}") for fact in facts for number in range(count)]

    def answer(rows: Sequence[TokenRow]) -> list[list[tuple[int, ...]]]:
        many = [row for row in rows for _ in range(count)]
        drawn = sample_each(target.anat, many, seeds, max_new_tokens=limit)
        return [drawn[start : start + count] for start in range(0, len(drawn), count)]

    return Found(trials(target, facts, [[target.form.encode(fact.question)] for fact in facts], answer))


def _seed(text: str) -> int:
    """63 bits, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
