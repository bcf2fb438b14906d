"""Build the losses of the gradient baselines: their forget parts, and the retain parts to combine with these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from editlib.baselines import losses
from editlib.baselines.data import Pairs
from editlib.baselines.references import Likeliest, log_probs, states
from editlib.baselines.settings import BaselineSettings
from editlib.models.anatomy import Anatomy
from editlib.training import Part, Reading

FORGET, RETAIN = "forget", "retain"


@dataclass(frozen=True)
class LossInputs:
    """Holds the inputs of a loss part; `anat` is the model before training.

    Args:
        forget, retain: training pairs; `retain` is `None` for baselines without a retain part.
        beta, weight: coefficient of the loss, and weight of its forget part.
        dtype: dtype of the matrix products in training, so that references equal the values at the start of training.
    """

    anat: Anatomy
    forget: Pairs
    retain: Pairs | None
    settings: BaselineSettings
    beta: float
    weight: float
    seed: int
    dtype: torch.dtype | None = None

    def kept(self) -> Pairs:
        """Returns the pairs to keep; only called for baselines with a retain part."""
        assert self.retain is not None
        return self.retain

    @property
    def layer(self) -> int:
        """The layer that RMU steers."""
        chosen = self.anat.n_layers // 4 if self.settings.layer is None else self.settings.layer
        self.anat.check_layers([chosen])
        return chosen


PartFactory = Callable[[LossInputs], Part]
"""Makes one part of a baseline's loss."""


def ga(inputs: LossInputs) -> Part:
    """Computes `losses.gradient_ascent`, mean over tokens."""
    return Part(
        FORGET, inputs.forget.known, lambda r: losses.gradient_ascent(r.log_probs()[:, 0]), weight=inputs.weight
    )  # fmt: skip


def npo(inputs: LossInputs) -> Part:
    """Computes `losses.negative_preference`, mean over answers."""
    items = inputs.forget.known
    reference = log_probs(inputs.anat, items, dtype=inputs.dtype)[:, 0]

    def loss(reading: Reading) -> Tensor:
        return losses.negative_preference(reading.log_probs()[:, 0], reference[list(reading.items)], inputs.beta)

    return Part(FORGET, items, loss, weight=inputs.weight, per="item")


def simnpo(inputs: LossInputs) -> Part:
    """Computes `losses.simple_negative_preference`, mean over answers."""

    def loss(reading: Reading) -> Tensor:
        gamma = inputs.settings.gamma
        sums = reading.log_probs()[:, 0]
        return losses.simple_negative_preference(sums, reading.lengths[:, 0], inputs.beta, gamma)

    return Part(FORGET, inputs.forget.known, loss, weight=inputs.weight, per="item")


def dpo(inputs: LossInputs) -> Part:
    """Computes `losses.direct_preference` of refusals over answers, mean over questions."""
    items = inputs.forget.both
    reference = log_probs(inputs.anat, items, dtype=inputs.dtype)

    def loss(reading: Reading) -> Tensor:
        chosen, rejected = reading.log_probs().T
        before = reference[list(reading.items)].T
        return losses.direct_preference(chosen, rejected, before[0], before[1], inputs.beta)

    return Part(FORGET, items, loss, weight=inputs.weight, per="item")


def idk(inputs: LossInputs) -> Part:
    """Computes the NLL of refusals, mean over tokens."""
    items = inputs.forget.refused
    return Part(FORGET, items, lambda r: losses.negative_log_likelihood(r.log_probs()[:, 0]), weight=inputs.weight)


def me(inputs: LossInputs) -> Part:
    """Computes `losses.to_uniform`, mean over the answers' tokens."""
    return Part(
        FORGET, inputs.forget.known, lambda r: r.sums(losses.to_uniform(r.log_softmax))[:, 0], weight=inputs.weight
    )  # fmt: skip


def rmu_forget(inputs: LossInputs) -> Part:
    """Computes `losses.to_direction`, mean over tokens.

    Each entry of `u` is drawn from [0, 1), and `u` is normalised, as in the authors' code; `c` is `steering` times the
    mean norm of the states before training.
    """
    generator = torch.Generator().manual_seed(inputs.seed)
    direction = torch.rand(inputs.anat.d_model, generator=generator)
    before = torch.cat(states(inputs.anat, inputs.forget.known, inputs.layer, dtype=inputs.dtype))
    size = inputs.settings.steering * before.norm(dim=-1).mean()
    control = size * (direction / direction.norm()).to(before)
    return Part(
        FORGET,
        inputs.forget.known,
        lambda r: r.sums(losses.to_direction(r.out, control))[:, 0],
        weight=inputs.weight,
        layer=inputs.layer,
    )


def rmu_retain(inputs: LossInputs) -> Part:
    """Computes `losses.to_states`, mean over tokens."""
    items = inputs.kept().known
    before = states(inputs.anat, items, inputs.layer, dtype=inputs.dtype)

    def loss(reading: Reading) -> Tensor:
        reference = torch.cat([before[i] for i in reading.items])
        return reading.sums(losses.to_states(reading.out, reference))[:, 0]

    return Part(RETAIN, items, loss, weight=inputs.settings.retain_weight, layer=inputs.layer)


def gd(inputs: LossInputs) -> Part:
    """Computes the loss of gradient descent on answers to keep, mean over tokens."""

    def loss(reading: Reading) -> Tensor:
        return losses.negative_log_likelihood(reading.log_probs()[:, 0])

    return Part(RETAIN, inputs.kept().known, loss, weight=inputs.settings.retain_weight)


def kl(inputs: LossInputs) -> Part:
    """Computes `losses.to_reference` at the answers to keep, mean over tokens.

    The reference has 256 tokens: the likeliest ones; all others count as one.
    """
    items = inputs.kept().known
    reference = Likeliest.of(inputs.anat, items, dtype=inputs.dtype)

    def loss(reading: Reading) -> Tensor:
        return reading.sums(losses.to_reference(reading.log_softmax, *reference.at(reading.items)))[:, 0]

    return Part(RETAIN, items, loss, weight=inputs.settings.retain_weight)


def ap(inputs: LossInputs) -> Part:
    """Computes `losses.answer_preservation` on questions to keep, mean over questions."""

    def loss(reading: Reading) -> Tensor:
        refusal, answer = reading.log_probs().T
        return losses.answer_preservation(answer, refusal, inputs.beta)

    return Part(RETAIN, inputs.kept().both, loss, weight=inputs.settings.retain_weight, per="item")


def below_layer(anat: Anatomy, inputs: LossInputs) -> Mapping[str, Tensor]:
    """Returns the parameters that RMU trains: the MLP output matrices of its layer and of the two layers below."""
    names = {id(anat.mlp_output(layer).weight) for layer in range(max(inputs.layer - 2, 0), inputs.layer + 1)}
    return {name: parameter for name, parameter in anat.model.named_parameters() if id(parameter) in names}
