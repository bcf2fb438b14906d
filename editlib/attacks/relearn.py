"""A few steps of training on a few facts: do the others come back?"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from editlib.attacks.asking import Scene, Target, ask_each, not_asked
from editlib.attacks.outcome import Found
from editlib.models.adapter import adapter
from editlib.models.prompts import TokenRow, pad
from editlib.models.resume import forward
from editlib.request import EditRequest


def relearn_forgotten(target: Target, facts: Sequence[EditRequest], scene: Scene) -> Found:
    """Trains on some of the forgotten facts (half of them at most) and asks for the others."""
    fitting = [request for request in scene.requests if request.answer is not None]
    count = min(scene.settings.relearn_examples, len(fitting) // 2)
    return _relearned(target, facts, scene, random.Random(scene.seed).sample(fitting, count))


def relearn_unrelated(target: Target, facts: Sequence[EditRequest], scene: Scene) -> Found:
    """Trains on facts that have nothing to do with the forgotten ones and asks for all of these."""
    fitting = [fact for fact in scene.unrelated if fact.answer is not None]
    count = min(scene.settings.relearn_examples, len(fitting))
    return _relearned(target, facts, scene, random.Random(scene.seed).sample(fitting, count))


def _relearned(target: Target, facts: Sequence[EditRequest], scene: Scene, examples: Sequence[EditRequest]) -> Found:
    if not examples:
        return Found(tuple(not_asked(fact, "nothing to learn from") for fact in facts))
    taught, settings = set(examples), scene.settings
    with adapter(target.anat, rank=settings.relearn_rank, seed=scene.seed) as parameters:
        losses = train(target, examples, parameters, steps=settings.relearn_steps, rate=settings.relearn_rate)
        asked = iter(ask_each(target, [fact for fact in facts if fact not in taught], scene).trials)
    trials = tuple(not_asked(fact, "was an example") if fact in taught else next(asked) for fact in facts)
    return Found(trials, {"examples": len(examples), "loss_before": losses[0], "loss_after": losses[-1]})


def train(
    target: Target, examples: Sequence[EditRequest], parameters: Sequence[Tensor], *, steps: int, rate: float
) -> list[float]:
    """AdamW without weight decay on the mean NLL of the answers (with their end token), all examples in every step.

    Returns:
        The loss in nats a token before each step and after the last one.
    """
    rows = [_answered(target, example) for example in examples]
    batch = pad(rows, device=target.anat.device)
    places = torch.tensor([(r, at) for r, row in enumerate(rows) for at in range(len(row) - row.extra, len(row))]).T
    wanted = batch.input_ids[places[0], places[1]]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses = []
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < steps):
            logits = forward(target.anat, batch, score=(places[0], places[1] - 1)).float()
            loss = torch.nn.functional.cross_entropy(logits, wanted.to(logits.device))
        losses.append(float(loss.detach()))
        if step < steps:
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return losses


def _answered(target: Target, example: EditRequest) -> TokenRow:
    end = target.tok.eos_token_id
    answer = target.form.answer_ids(example.answer or "")
    return target.form.encode(example.question).followed_by(answer if end is None else (*answer, end))
