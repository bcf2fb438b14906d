"""What every algorithm of the family shares: writing updates layer by layer, and the result that can be taken back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from editlib.algorithms.keys import KeyStream
from editlib.algorithms.low_rank import LowRank
from editlib.errors import EditError
from editlib.models.anatomy import Anatomy, anatomy
from editlib.models.prompts import TokenRow


@dataclass
class EditResult:
    """What an edit did to a model.

    `deltas` maps a layer to its update; `originals` keeps the weights as they were, `[d_model, d_ff]` each;
    `diagnostics` holds one dict a request; `norms` one dict a layer.
    """

    deltas: dict[int, LowRank]
    originals: dict[int, Tensor]
    diagnostics: list[dict] = field(default_factory=list)
    norms: dict[int, dict] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    anchors: tuple[str, ...] = ()  # ids of the retain prompts that were held in place

    def revert(self, model: PreTrainedModel) -> None:
        """Restores the edited matrices of `model` bit for bit. A token that was added stays, unused."""
        restore(anatomy(model), self.originals)


def restore(anat: Anatomy, originals: Mapping[int, Tensor]) -> None:
    """Puts weights back as they were."""
    for layer, original in originals.items():
        anat.weight(layer).copy_(original)


class Timer:
    """Seconds per named part of a job, for receipts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str):
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun


Solve = Callable[[int, Tensor, Tensor, Tensor], LowRank]
"""`(layer, keys [d_ff, n], residual [d_model, n], anchor keys [d_ff, m]) -> update`."""


def solve_dtype(device: torch.device) -> torch.dtype:
    """fp64 where the device has it, fp32 otherwise."""
    return torch.float32 if device.type == "mps" else torch.float64


def write_layers(
    anat: Anatomy,
    layers: Sequence[int],
    contexts: Sequence[Sequence[TokenRow]],
    targets: Tensor,
    solve: Solve,
    *,
    anchors: Sequence[TokenRow] = (),
    anchor_starts: Sequence[int] | None = None,
) -> tuple[dict[int, LowRank], dict[int, Tensor]]:
    """Spreads the way to `targets [d_model, n]` over `layers` and writes each update (MEMIT, 2210.07229, alg. 1).

    At layer `i` of `L` the residual is `(Z - H) / (L - i)`, with `H` the states at the last of `layers` through the
    weights as they are then; keys too are those after the layers below were written. The updates are summed in the
    solve's dtype and rounded to the weight's once. On any error the weights are put back.

    Args:
        contexts: per request its prompts, the plain one first, which gives `H`; a request's key is the mean over all.
        anchors: rows whose keys are passed to `solve`, at their positions from `anchor_starts` on (`None`: at their
            lookup positions only).
    """
    originals = {layer: anat.weight(layer).clone() for layer in layers}
    deltas: dict[int, LowRank] = {}
    try:
        stream = KeyStream(anat, [row for rows in contexts for row in rows], layers[0])
        plain = torch.tensor([0, *[len(rows) for rows in contexts[:-1]]]).cumsum(0)
        mean = _mean_over([len(rows) for rows in contexts])
        anchor_stream = KeyStream(anat, anchors, layers[0]) if anchors else None
        for i, layer in enumerate(layers):
            weight = anat.weight(layer)
            dtype = solve_dtype(weight.device)
            stream.advance(layer)
            keys = stream.keys().to(weight.device, dtype) @ mean.to(weight.device, dtype)
            states = stream.states(layers[-1])[:, plain].to(weight.device)
            residual = (targets.to(weight.device) - states) / (len(layers) - i)
            held = keys[:, :0]
            if anchor_stream is not None:
                anchor_stream.advance(layer)
                held = anchor_stream.keys(starts=anchor_starts).to(weight.device, dtype)
            delta = solve(layer, keys, residual.to(dtype), held)
            write(anat, layer, delta)
            deltas[layer] = delta
    except BaseException:
        restore(anat, originals)
        raise
    return deltas, originals


def write(anat: Anatomy, layer: int, delta: LowRank) -> None:
    """Adds an update to its layer's weight.

    Raises:
        EditError: the sum is not finite in the weight's dtype; the caller puts the weight back.
    """
    weight = anat.weight(layer)
    delta.add_to(weight)
    if not torch.isfinite(weight).all():
        raise EditError(
            f"the update of layer {layer} is not finite in {weight.dtype}; the model is unchanged: "
            "lower `v_lr` or raise `L2`"
        )


def _mean_over(sizes: Sequence[int]) -> Tensor:
    """`[sum(sizes), len(sizes)]`: multiplied from the right it averages consecutive groups of columns."""
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    chosen = torch.nn.functional.one_hot(owner, len(sizes)).to(torch.float64)
    return chosen / chosen.sum(0)


def layer_norms(deltas: Mapping[int, LowRank], originals: Mapping[int, Tensor]) -> dict[int, dict]:
    """Per layer the norm of the update, of the weight before, and their ratio."""
    found = {}
    for layer, delta in deltas.items():
        before = float(originals[layer].float().norm())
        found[layer] = {"update": delta.norm(), "weight": before, "ratio": delta.norm() / before}
    return found
