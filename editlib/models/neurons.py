"""Find the neurons of an MLP: what a single row of its input matrices computes.

Neuron `j` of a layer reads the MLP's input `x [d_model]`, computes the entry `j` of the layer's key,

    k_j = act(g_j · x + a_j) (u_j · x + c_j),

and adds `k_j w_j` to the MLP's output, with `w_j` column `j` of the MLP output matrix. An MLP without a gate has no
second factor. Which matrix is the gate, and what `act` is, is found by trying: names differ between families.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from editlib.errors import ModelError
from editlib.models.anatomy import Anatomy, inputs_of
from editlib.models.freezing import no_param_grad
from editlib.models.passes import run
from editlib.models.tracing import record_inputs, unwatched

TOKENS = 4  # of a probe


@dataclass(frozen=True)
class NeuronRows:
    """Names the rows of one matrix that belong to a layer's neurons: `d_ff` of them, from row `first` on."""

    number: int  # of the matrix, see `Anatomy.matrix_names`
    first: int = 0


@dataclass(frozen=True)
class Neurons:
    """Holds what the neurons of one layer compute with: the rows `g_j` and `u_j`, and `act`."""

    layer: int
    gate: NeuronRows
    up: NeuronRows | None
    act: nn.Module

    def keys(self, gate: Tensor, up: Tensor) -> Tensor:
        """Returns the entries of the key for `gate` and `up`, the outputs of both matrices, of one shape."""
        activated: Tensor = self.act(gate)
        return activated if self.up is None else activated * up

    def bias(self, anat: Anatomy, rows: NeuronRows | None) -> Tensor:
        """Returns the biases `[d_ff]` of the neurons' rows in a matrix; zeros where it has none."""
        found = None if rows is None else getattr(anat.matrix(rows.number), "bias", None)
        if rows is None or found is None:
            return torch.zeros(anat.d_ff, device=anat.device)
        biases: Tensor = found.detach()[rows.first : rows.first + anat.d_ff].float()
        return biases


def find_neurons(anat: Anatomy, layer: int) -> Neurons:
    """Finds how the neurons of `layer` compute the layer's key, from one pass over random states.

    Raises:
        ModelError: an MLP of another kind.
    """
    names = anat.mlp_input_names[layer]
    seen: dict[str, Tensor] = {}
    if names:
        modules = {"x": anat.model.get_submodule(names[0]), "k": anat.mlp_output(layer)}
        states = torch.randn(1, TOKENS, anat.d_model, generator=torch.Generator().manual_seed(0))
        ids = torch.arange(1, TOKENS + 1, device=anat.device)[None]
        hidden = states.to(anat.device, anat.embedding.weight.dtype)
        watched = record_inputs(modules, seen.__setitem__)
        with unwatched(anat.model), no_param_grad(anat.model), torch.no_grad(), watched:
            run(anat, ids, torch.ones_like(ids), start=layer, stop=layer + 1, hidden=hidden, skip=False)
        for found in _kinds(anat, layer):
            if _computes(anat, found, seen["x"], seen["k"]):
                return found
    raise ModelError(
        f"{anat.mlp_output_names[layer]}: what its input is computed from was not found (a linear map and an "
        'activation, with a gate or without), so no neuron can be written; leave "neurons" out of the settings'
    )


def _kinds(anat: Anatomy, layer: int) -> Iterator[Neurons]:
    """Yields all ways in which the neurons of `layer` may compute: each order of gate and up, each activation."""
    numbers = anat.input_numbers(layer)
    ways: list[tuple[NeuronRows, NeuronRows | None]]
    if len(numbers) == 2:
        first, second = NeuronRows(numbers[0]), NeuronRows(numbers[1])
        ways = [(first, second), (second, first)]
    elif len(anat.weight(numbers[0])) == 2 * anat.d_ff:  # both in one matrix
        first, second = NeuronRows(numbers[0]), NeuronRows(numbers[0], anat.d_ff)
        ways = [(first, second), (second, first)]
    else:
        ways = [(NeuronRows(numbers[0]), None)]
    inside = [module for module in anat.layers[layer].modules() if not any(True for _ in module.parameters())]
    # Some models call a function in place of a module.
    common: list[nn.Module] = [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.ReLU()]
    acts = [module for module in inside if inputs_of(module) is None and not list(module.children())]
    for act in (*acts, *common):
        yield from (Neurons(layer, gate, up, act) for gate, up in ways)


@torch.no_grad()
def _computes(anat: Anatomy, neurons: Neurons, x: Tensor, key: Tensor) -> bool:
    """Returns whether `neurons` compute the layer's `key [..., d_ff]` from `x [..., d_model]`."""

    def out(rows: NeuronRows) -> Tensor:
        whole: Tensor = anat.matrix(rows.number)(x)
        return whole[..., rows.first : rows.first + anat.d_ff]

    gate = out(neurons.gate)
    up = gate if neurons.up is None else out(neurons.up)
    try:
        again = neurons.keys(gate, up)
    except (TypeError, ValueError, RuntimeError):  # a module that takes no single tensor
        return False
    if not isinstance(again, Tensor) or again.shape != key.shape:
        return False
    error = (again - key).float().norm()
    return bool(error <= 8 * torch.finfo(key.dtype).eps ** 0.75 * key.float().norm())
