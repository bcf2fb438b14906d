"""Write updates layer by layer, and keep the data to undo them; shared by all algorithms of the ROME family.

An edit changes the MLP output matrices `W [d_model, d_ff]` of a few layers. `write_layers` is the loop of MEMIT
(2210.07229, alg. 1): at each layer it reads the keys of the requests, takes a share of the residual (the values minus
the current states), lets the algorithm solve for the update `Δ`, and adds it to `W`. The caller gets an `EditResult`
with the updates as factors and the weights as they were, so that `revert` restores every bit. An `EditState` passes
information on to the next edit of the same model, such as keys to preserve.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from editlib.algorithms.keys import KeyStream
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.past_keys import PastKeys
from editlib.algorithms.values import Values
from editlib.errors import EditError
from editlib.models.anatomy import Anatomy, anatomy
from editlib.models.precision import wide_dtype
from editlib.models.prompts import TokenRow
from editlib.models.residual_path import output_path
from editlib.models.vocabulary import silence

log = logging.getLogger(__name__)

if TYPE_CHECKING:  # the token's package imports this module
    from editlib.algorithms.unierase.token import UnlearningToken
    from editlib.hparams import HyperParams


@dataclass(frozen=True)
class EditState:
    """Holds the information that a later edit of the same model needs about earlier ones; a new object after each
    edit."""

    past: dict[int, PastKeys] = field(default_factory=dict)  # keys of earlier requests by layer
    templates: tuple[str, ...] = ()  # context templates that the model generated for the first edit
    totals: dict[int, LowRank] = field(default_factory=dict)  # PRUNE: the updates so far, not pruned, by layer
    bases: dict[int, Tensor] = field(default_factory=dict)  # PRUNE: the weights before all of them, [d_model, d_ff]
    opened: frozenset[str] = frozenset()  # UniErase: relations that the answer gate is open for
    neurons: Mapping[int, frozenset[int]] = field(default_factory=dict)  # written whole by earlier edits, by layer

    def past_block(self, layer: int, like: Tensor) -> Tensor:
        """Returns the past keys of `layer`, `[d_ff, m]`, in the dtype and on the device of `like [d_ff, ...]`."""
        return self.past[layer].block.to(like) if layer in self.past else like[:, :0]

    def taken(self, layer: int) -> frozenset[int]:
        """Returns the neurons of `layer` that earlier edits have written."""
        return self.neurons.get(layer, frozenset())

    def with_neurons(self, neurons: Mapping[int, Sequence[int]]) -> EditState:
        """Returns the state after an edit that wrote these `neurons`, by layer."""
        return replace(self, neurons={**self.neurons, **{k: self.taken(k).union(some) for k, some in neurons.items()}})

    def with_keys(self, keys: Mapping[int, Tensor]) -> EditState:
        """Returns the state after an edit whose requests have `keys`, `{layer: [d_ff, n]}`."""
        past = dict(self.past)
        for layer, new in keys.items():
            past[layer] = past.get(layer, PastKeys.none(len(new), dtype=new.dtype, device=new.device)).with_keys(new)
        return replace(self, past=past)


@dataclass
class EditResult:
    """Holds the result of an edit, with the data to undo it, to replay it and to continue after it."""

    deltas: dict[int, LowRank]  # the update of each matrix, by its number (`Anatomy.matrix_names`)
    originals: dict[int, Tensor]  # these matrices before, [outputs, inputs] each
    diagnostics: list[dict[str, Any]] = field(default_factory=list)  # one dict per request
    norms: dict[int, dict[str, float]] = field(default_factory=dict)  # `layer_norms`, one dict per layer
    timings: dict[str, float] = field(default_factory=dict)  # seconds by name of the step
    anchors: tuple[str, ...] = ()  # ids of the retain prompts whose keys were constraints
    state: EditState = field(default_factory=EditState)  # the argument of the next edit
    values: Values | None = None  # to replay the edit without finding them again
    keys: dict[int, Tensor] = field(default_factory=dict)  # of the requests, `[d_ff, n]` by layer
    token: UnlearningToken | None = None  # the unlearning token, generated in the answers' place
    token_ids: list[int] = field(default_factory=list)  # the tokens that were fitted to the edited model
    neurons: Mapping[int, Sequence[int]] = field(default_factory=dict)  # written whole, by layer

    def revert(self, model: PreTrainedModel) -> None:
        """Restores the edited matrices of `model` bit for bit. Added tokens stay in the vocabulary, but are never
        generated."""
        anat = anatomy(model)
        restore(anat, self.originals)
        silence(anat, self.token_ids)


def edited_matrices(anat: Anatomy, hparams: HyperParams) -> list[int]:
    """Returns the numbers of all matrices that an edit with these settings may change (`Anatomy.matrix_names`)."""
    inputs = [number for layer in hparams.neuron_layers for number in anat.input_numbers(layer)]
    return [*hparams.edited_layers, *inputs]


def restore(anat: Anatomy, originals: Mapping[int, Tensor]) -> None:
    """Puts the weights `{layer: [d_model, d_ff]}` back, bit for bit."""
    for layer, original in originals.items():
        anat.weight(layer).copy_(original)


@contextmanager
def restored_on_error(anat: Anatomy, originals: Mapping[int, Tensor]) -> Iterator[None]:
    """Puts the weights `{layer: [d_model, d_ff]}` back when the block fails, or is interrupted."""
    try:
        yield
    except BaseException:
        restore(anat, originals)
        raise


class Timer:
    """Adds up the seconds of each named part of a job, for receipts, and logs "step k of n" as each of `steps`
    begins."""

    def __init__(self, steps: Sequence[str] = ()) -> None:
        self.seconds: dict[str, float] = {}
        self._steps = steps

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        if name in self._steps and name not in self.seconds:
            log.info("edit, step %d of %d: %s", self._steps.index(name) + 1, len(self._steps), name)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun


@dataclass(frozen=True)
class LayerKeys:
    """Holds the keys of one layer's solve, `[d_ff, n]` each: the `mean` over a request's contexts, and that of its
    `plain` prompt."""

    mean: Tensor
    plain: Tensor


Solve = Callable[[int, LayerKeys, Tensor], LowRank]
"""`(layer, keys, residual [d_model, n]) -> update`."""


@dataclass(frozen=True)
class Written:
    """Holds the updates that were written and the matrices before, by number; by layer, the requests' keys `[d_ff, n]`
    and the neurons that were written whole."""

    deltas: dict[int, LowRank]
    originals: dict[int, Tensor]
    keys: dict[int, Tensor] = field(default_factory=dict)
    neurons: dict[int, Sequence[int]] = field(default_factory=dict)


def write_layers(
    anat: Anatomy,
    layers: Sequence[int],
    contexts: Sequence[Sequence[TokenRow]],
    targets: Tensor,
    solve: Solve,
    *,
    weights: Sequence[Sequence[float]] | None = None,
) -> Written:
    """Spreads the change to `targets [d_model, n]` over `layers` and writes each update (MEMIT, 2210.07229, alg. 1).

    At layer `i` of `L` the residual is `(Z - H) / (L - i)`, with `H` the states at the last of `layers` through the
    current weights, mapped back through what follows the matrix (`models.residual_path`). The keys too are read after
    the layers below were written, so they are still right at the end. Each update is summed in the solve's dtype and
    rounded to the weight's once. On any error the weights are restored.

    Args:
        contexts: the prompts of each request, the plain one first, which gives `H`.
        weights: of each request's contexts in its key, sum 1; `None`: the mean over all.
    """
    written = Written({}, {layer: anat.weight(layer).clone() for layer in layers}, {})
    with restored_on_error(anat, written.originals):
        stream = KeyStream(anat, [row for rows in contexts for row in rows], layers[0])
        # A request's first context is its plain prompt.
        plain = torch.tensor([0, *[len(rows) for rows in contexts[:-1]]]).cumsum(0)  # [n]
        mean = _averaging([len(rows) for rows in contexts], weights)  # [rows, n]
        for i, layer in enumerate(layers):
            weight = anat.weight(layer)
            dtype = wide_dtype(weight.device)
            stream.advance(layer)  # through the weights that the layers below have now
            every = stream.keys().to(weight.device, dtype)  # [d_ff, rows]
            keys = every @ mean.to(weight.device, dtype)  # [d_ff, n]
            states = stream.states(layers[-1])[:, plain].to(weight.device)  # H [d_model, n]
            # The remaining layers share the remaining difference evenly (MEMIT, alg. 1).
            residual = ((targets.to(weight.device) - states) / (len(layers) - i)).to(dtype)
            path = output_path(anat, layer)
            # The change of the matrix's output that changes the residual stream by the residual.
            if not path.plain:
                read = states if path.post is None else stream.inputs(path.post)[:, plain]
                residual = path.invert(read, residual)
            delta = solve(layer, LayerKeys(keys, every[:, plain]), residual)
            write(anat, layer, delta)
            written.deltas[layer], written.keys[layer] = delta, keys
    return written


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


def write_all(anat: Anatomy, deltas: Mapping[int, LowRank]) -> None:
    """Adds updates to their matrices, by number; see `write`."""
    for number, delta in deltas.items():
        write(anat, number, delta)


def _averaging(counts: Sequence[int], weights: Sequence[Sequence[float]] | None) -> Tensor:
    """Returns the matrix `[sum(counts), n]` that maps the keys of all contexts to one key per request.

    The key is the mean over the request's `counts[i]` contexts, or their sum with its `weights`.
    """
    mean = torch.zeros(sum(counts), len(counts), dtype=torch.float64)
    start = 0
    for i, count in enumerate(counts):
        column = [1 / count] * count if weights is None else weights[i]
        mean[start : start + count, i] = torch.tensor(column, dtype=torch.float64)
        start += count
    return mean


def layer_norms(deltas: Mapping[int, LowRank], originals: Mapping[int, Tensor]) -> dict[int, dict[str, float]]:
    """Returns, per layer, the norm of the update, of the weight before, and their ratio."""
    norms = {}
    for layer, delta in deltas.items():
        before = float(originals[layer].float().norm())
        norms[layer] = {"update": delta.norm(), "weight": before, "ratio": delta.norm() / before}
    return norms
