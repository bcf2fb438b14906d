"""Compute the losses of gradient unlearning, with the equations of their papers.

`p` is the model in training, `p_ref` the model before. `log p(y|x)` is a sum over the tokens of an answer `y`. Each
function returns one number per answer, `[n]`, in nats; `gradient.py` averages them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def gradient_ascent(log_probs: Tensor) -> Tensor:
    """Computes GA (Yao et al., 2310.10683; TOFU, 2401.06121, sec. 3): `log p(y|x)` of answers to forget, minimised."""
    return log_probs


def negative_preference(log_probs: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Computes NPO (Zhang et al., 2404.05868, eq. 3): `-2/β log σ(-β log p(y|x)/p_ref(y|x))`.

    GA whose gradient fades where the answer has become unlikely; for β to 0 it is GA up to a constant.
    """
    return -2 / beta * F.logsigmoid(-beta * (log_probs - reference))


def simple_negative_preference(log_probs: Tensor, lengths: Tensor, beta: float, gamma: float) -> Tensor:
    """Computes SimNPO (Fan et al., 2410.07163, eq. 4): `-2/β log σ(-β/|y| log p(y|x) - γ)`; needs no reference."""
    return -2 / beta * F.logsigmoid(-beta / lengths * log_probs - gamma)


def direct_preference(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> Tensor:
    """Computes DPO (Rafailov et al., 2305.18290, eq. 7) as an unlearning loss (2404.05868, eq. 2): `-1/β log σ(β log
    p(y_w|x)/p_ref(y_w|x) - β log p(y_l|x)/p_ref(y_l|x))`, `y_w` a refusal, `y_l` the answer.

    TOFU's code writes 2/β, which only weighs it against another part.
    """
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return -1 / beta * F.logsigmoid(beta * margin)


def answer_preservation(answer: Tensor, refusal: Tensor, beta: float) -> Tensor:
    """Computes AP (Yuan et al., 2410.08109): `-1/β log σ(-β log p(y_r|x)/p(y|x))` on questions to keep, `y_r` a
    refusal."""
    return -1 / beta * F.logsigmoid(-beta * (refusal - answer))


def negative_log_likelihood(log_probs: Tensor) -> Tensor:
    """Computes `-log p(y|x)`: gradient descent (GD) on answers to keep (Liu et al., 2203.12817), or on refusals to
    questions to forget (IDK; TOFU, 2401.06121, sec. 3)."""
    return -log_probs


def to_uniform(log_softmax: Tensor) -> Tensor:
    """Computes ME (Yuan et al., 2410.08109): `KL(U || p_t)` of the uniform distribution and the model's at each token.

    `-log V - 1/V Σ_v log p_t(v)`, `[m, V] -> [m]`, one number per token. The authors' code has the arguments in this
    order.
    """
    return -math.log(log_softmax.shape[-1]) - log_softmax.mean(-1)


def to_reference(log_softmax: Tensor, tokens: Tensor, reference: Tensor) -> Tensor:
    """Computes KL (TOFU, 2401.06121, sec. 3): `KL(p_ref || p)` at each token of answers to keep, `[m, V] -> [m]`.

    Args:
        tokens, reference: the likeliest tokens of `p_ref` and their log-probabilities, `[m, k]`. All others count as
            one: with `k = V` this is the divergence itself, else never more.
    """
    mine = log_softmax.gather(-1, tokens)  # [m, k]
    divergence = (reference.exp() * (reference - mine)).sum(-1)  # [m]
    if tokens.shape[-1] == log_softmax.shape[-1]:
        return divergence
    # Both distributions' remaining mass, as one more token.
    eps = torch.finfo(mine.dtype).eps
    rest_ref = (1 - reference.exp().sum(-1)).clamp_min(eps)
    rest = (1 - mine.exp().sum(-1)).clamp_min(eps)
    return divergence + rest_ref * (rest_ref.log() - rest.log())


def to_direction(states: Tensor, control: Tensor) -> Tensor:
    """Computes RMU, forget part (Li et al., 2403.03218, eq. 1): `||h_t - c u||²`, `[m, d] -> [m]`; `control [d]` is `c
    u`."""
    return (states - control).square().sum(-1)


def to_states(states: Tensor, reference: Tensor) -> Tensor:
    """Computes RMU, retain part (2403.03218, eq. 2): `||h_t - h_ref,t||²`, `[m, d] -> [m]`."""
    return (states - reference).square().sum(-1)
