"""Keep a model's parameters out of a gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def no_param_grad(model: nn.Module) -> Iterator[None]:
    """Keeps the parameters of `model` without gradients and the model in eval mode inside the block, then restores
    both."""
    modules = list(model.modules())  # walked once: this runs around every short pass
    parameters = [p for module in modules for p in module._parameters.values()]
    wanted = [p for p in parameters if p is not None and p.requires_grad]  # tied ones appear twice, which is harmless
    training = [module for module in modules if module.training]  # each by itself: a user may mix modes
    for parameter in wanted:
        parameter.requires_grad_(False)
    if training:
        model.eval()
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
