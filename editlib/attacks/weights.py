"""Attack by changing the model's weights: fewer bits, or a little training; the weights are restored."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from editlib import training
from editlib.attacks.asking import AttackContext, ask_each, not_asked
from editlib.attacks.outcome import AttackOutcome
from editlib.models.loaded import LoadedModel
from editlib.models.lora import lora_adapter
from editlib.models.quantization import quantized
from editlib.requests.request import EditRequest
from editlib.training import Part, TrainSettings, answer_nll, answered


# A few steps of training on a few facts: do the others come back?
def relearn_forgotten(target: LoadedModel, facts: Sequence[EditRequest], context: AttackContext) -> AttackOutcome:
    """Trains on some of the forgotten facts (half of them at most) and asks for the others."""
    fitting = [request for request in context.requests if request.answer is not None]
    count = min(context.settings.relearn_examples, len(fitting) // 2)
    return _relearned(target, facts, context, random.Random(context.seed).sample(fitting, count))


def relearn_unrelated(target: LoadedModel, facts: Sequence[EditRequest], context: AttackContext) -> AttackOutcome:
    """Trains on facts unrelated to the forgotten ones and asks for all of these."""
    fitting = [fact for fact in context.unrelated if fact.answer is not None]
    count = min(context.settings.relearn_examples, len(fitting))
    return _relearned(target, facts, context, random.Random(context.seed).sample(fitting, count))


def _relearned(
    target: LoadedModel, facts: Sequence[EditRequest], context: AttackContext, examples: Sequence[EditRequest]
) -> AttackOutcome:
    if not examples:
        return AttackOutcome(tuple(not_asked(fact, "nothing to learn from") for fact in facts))
    taught, settings = set(examples), context.settings
    with lora_adapter(target.anat, rank=settings.relearn_rank, seed=context.seed) as parameters:
        losses = train(target, examples, parameters, steps=settings.relearn_steps, rate=settings.relearn_rate)
        asked = iter(ask_each(target, [fact for fact in facts if fact not in taught], context).trials)
    trials = tuple(not_asked(fact, "was an example") if fact in taught else next(asked) for fact in facts)
    return AttackOutcome(trials, {"examples": len(examples), "loss_before": losses[0], "loss_after": losses[-1]})


def train(
    target: LoadedModel, examples: Sequence[EditRequest], parameters: Sequence[Tensor], *, steps: int, rate: float
) -> list[float]:
    """Trains by AdamW without weight decay on the mean NLL of the answers (with their end token), all examples in every
    step.

    Returns:
        The loss in nats per token before each step and after the last one.
    """
    rows = [answered(target.tok, example.question, example.answer or "", form=target.form) for example in examples]
    part = Part("examples", [(row,) for row in rows], answer_nll)
    settings = TrainSettings(
        learning_rate=rate,
        steps=steps,
        batch_size=len(rows),
        warmup_steps=0,
        max_grad_norm=None,
        precision="float32",
    )
    named = {str(number): parameter for number, parameter in enumerate(parameters)}
    result = training.train(target.anat, [part], named, settings)
    return [*result.losses, training.mean_loss(target.anat, part, settings)]


# Fewer bits per weight: an update smaller than a rounding step is rounded away.
def quantised(bits: int, target: LoadedModel, facts: Sequence[EditRequest], context: AttackContext) -> AttackOutcome:
    """Asks a model with weights of `bits` bits the plain question (arXiv 2410.16454); the weights are restored."""
    with quantized(target.anat, bits):
        return ask_each(target, facts, context)


int8, int4 = (partial(quantised, bits) for bits in (8, 4))
