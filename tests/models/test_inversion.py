"""What a norm must read, against a dense solution of the same least squares, and against random search."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from editlib.models.inversion import nearest

WIDTH = 24


def norm(kind, seed, spread=1.0):
    """A norm whose weights differ by factors of e^spread and more."""
    module = kind(WIDTH, eps=1e-6).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        module.weight.copy_((spread * torch.randn(WIDTH, generator=generator)).exp())
        if getattr(module, "bias", None) is not None:
            module.bias.copy_(torch.randn(WIDTH, generator=generator))
    return module


def rows(seed, n=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, WIDTH, generator=generator).double() * 3, torch.randn(n, WIDTH, generator=generator).double()


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm, torch.nn.LayerNorm])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.floats(0.0, 2.0), size=st.sampled_from([0.1, 1.0, 10.0]))
@torch.no_grad()
def test_what_can_be_had_is_had(kind, seed, spread, size):
    post, (base, other) = norm(kind, seed, spread), rows(seed)
    target = post(base + size * other)
    y = nearest(post, base, target)
    wanted = (target - post(base)).norm(dim=1)
    assert bool(((post(base + y) - target).norm(dim=1) < 1e-4 * wanted + 1e-6).all())
    # Many states give the same; among them it is no further away than the one that made the target.
    assert bool((y.norm(dim=1) < (size * other).norm(dim=1) * (1 + 1e-3) + base.norm(dim=1) * 0.15).all())


@pytest.mark.parametrize("kind", [LlamaRMSNorm, torch.nn.LayerNorm])
def test_what_cannot_be_had_is_come_near(kind):
    """Against gradient descent with restarts, which may reach no lower."""
    post, (base, wish) = norm(kind, 3), rows(5)
    target = (post(base) + 2 * wish).detach()
    with torch.no_grad():
        got = (post(base + nearest(post, base, target)) - target).norm(dim=1)
    best = torch.full_like(got, torch.inf)
    for seed in range(6):
        tried = (base + 3 * rows(100 + seed)[1]).requires_grad_()
        descent = torch.optim.LBFGS([tried], max_iter=400, line_search_fn="strong_wolfe", tolerance_change=1e-12)

        def loss(descent=descent, tried=tried):
            descent.zero_grad()
            value = (post(tried) - target).square().sum()
            value.backward()
            return value

        descent.step(loss)
        best = torch.minimum(best, (post(tried) - target).norm(dim=1).detach())
    assert bool((got > 0.1 * wish.norm(dim=1)).all())  # it could not be had
    assert bool((got <= best * (1 + 1e-4)).all())


def test_a_weight_of_one_is_a_rescaling():
    """By hand: the nearest point of a sphere lies in the target's direction, the nearest state there by projection."""
    post, (base, wish) = norm(LlamaRMSNorm, 0, 0.0), rows(7)
    target = base + 0.5 * wish
    y = nearest(post, base, target)
    way = target / target.norm(dim=1, keepdim=True)
    torch.testing.assert_close(base + y, (base * way).sum(1, keepdim=True) * way, rtol=1e-4, atol=1e-4)


class Stretch(torch.nn.Module):
    """A gain for each direction, then a gentle bend: no norm."""

    def __init__(self):
        super().__init__()
        self.gains = torch.linspace(0.1, 5, WIDTH).double()

    def forward(self, x):
        return self.gains * (x + 0.3 * torch.sin(x))


@torch.no_grad()
def test_other_modules_are_solved_by_steps():
    post, (base, wish) = Stretch(), rows(9)
    target = post(base + wish)
    y = nearest(post, base, target)
    torch.testing.assert_close(post(base + y), target, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y, wish, rtol=1e-2, atol=1e-2)  # it is one to one


@torch.no_grad()
def test_nothing_wanted_is_nothing_changed():
    post, (base, _) = norm(LlamaRMSNorm, 2), rows(3)
    y = nearest(post, base, post(base))
    assert float(y.norm()) < 1e-4 * float(base.norm())
    assert torch.equal(y, nearest(post, base, post(base)))
