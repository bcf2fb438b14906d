"""Fewer bits a weight: an update smaller than a rounding step is rounded away."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from editlib.attacks.asking import Scene, Target, ask_each
from editlib.attacks.outcome import Found
from editlib.models.rounding import rounded
from editlib.request import EditRequest


def quantised(bits: int, target: Target, facts: Sequence[EditRequest], scene: Scene) -> Found:
    """The plain question to a model with weights of `bits` bits (arXiv 2410.16454); the weights are put back."""
    with rounded(target.anat, bits):
        return ask_each(target, facts, scene)


int8, int4 = (partial(quantised, bits) for bits in (8, 4))
