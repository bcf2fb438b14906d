"""Steps of the token's rows, against PyTorch's Adam and a minimum found by hand."""

import pytest
import torch

from editlib.algorithms.unierase.token_guard import LogitGapGuard
from editlib.algorithms.unierase.token_steps import GuardedAdam, rate

GENERATOR = torch.Generator().manual_seed(0)
GUARD = LogitGapGuard(
    torch.randn(40, 6, generator=GENERATOR), torch.rand(40, generator=GENERATOR), torch.arange(40) % 4 == 0
)
GRADIENTS = torch.randn(5, 2, 6, generator=GENERATOR)


def moved(weight, rows, gradients):
    steps = GuardedAdam(rows, GUARD, weight=weight, answer_gap=14.0, min_gap=12.0, memory=0.99)
    for each in gradients:
        steps.step(list(each)[-len(rows) :], 0.1)
    return rows


def test_without_a_guard_they_are_those_of_adam():
    wanted = [torch.ones(6, requires_grad=True), torch.zeros(6, requires_grad=True)]
    adam = torch.optim.Adam(wanted, lr=0.1, betas=(0.9, 0.99))
    for each in GRADIENTS:
        for row, gradient in zip(wanted, each, strict=True):
            row.grad = gradient
        adam.step()
    for row, same in zip(moved(0.0, [torch.ones(6), torch.zeros(6)], GRADIENTS), wanted, strict=True):
        torch.testing.assert_close(row, same.detach())


def test_an_input_row_of_its_own_has_no_guard():
    free, guarded = (
        moved(0.0, [torch.ones(6), torch.zeros(6)], GRADIENTS),
        moved(1.0, [torch.ones(6), torch.zeros(6)], GRADIENTS),
    )
    assert torch.equal(free[0], guarded[0])
    assert not torch.allclose(free[1], guarded[1], atol=0.01)


def test_a_step_goes_to_the_minimum_of_both_models():
    """Adam's first step has the scale |gradient| / lr; its sum with the bound is minimised by plain descent."""
    gradient, weight, lr = GRADIENTS[0, 1], 3.0, 0.1
    slope, bend = GUARD.bound(torch.zeros(6), 14.0, 12.0)
    step = torch.zeros(6, requires_grad=True)
    descent = torch.optim.LBFGS([step], max_iter=500, tolerance_grad=1e-9, tolerance_change=0.0)

    def both():
        descent.zero_grad()
        adam = gradient @ step + (gradient.abs() / lr * step.square()).sum() / 2
        total = adam + weight * (slope @ step + step @ bend @ step / 2)
        total.backward()
        return total

    descent.step(both)
    (row,) = moved(weight, [torch.zeros(6)], GRADIENTS[:1])
    torch.testing.assert_close(row, step.detach(), atol=1e-4, rtol=1e-3)


def test_repeated_steps_without_a_loss_meet_the_guard():
    row = torch.full((6,), 2.0)
    before = float(GUARD.penalty(row, 2.0, 3.0))
    steps = GuardedAdam([row], GUARD, weight=1.0, answer_gap=2.0, min_gap=3.0, memory=0.99)
    for _ in range(200):
        steps.step([torch.zeros(6)], 0.1)
    leaf = row.clone().requires_grad_()
    penalty = GUARD.penalty(leaf, 2.0, 3.0)
    assert float(penalty.detach()) < before
    assert float(torch.autograd.grad(penalty, leaf)[0].norm()) < 1e-4


def test_the_rate_falls_from_the_first_step_to_the_last():
    rates = [rate(0.2, step, 10) for step in range(10)]
    assert rates[0] == pytest.approx(0.2)
    assert rates == sorted(rates, reverse=True)
    assert rate(0.2, 10, 10) == pytest.approx(0.01)
