"""What single neurons compute, in every family: against plain passes with hooks, and by a neuron written by hand."""

import copy

import pytest
import torch
from families import FAMILIES, make
from test_residual_path import observe

from editlib.algorithms.unierase.subject_neurons import write_neurons
from editlib.errors import ModelError
from editlib.models.anatomy import anatomy
from editlib.models.neurons import find_neurons
from editlib.models.prompts import TokenRow
from editlib.models.tracing import hidden_of
from editlib.stats.file import LayerStats

LAYER = 1
IDS = torch.tensor([[5, 9, 200, 17, 33, 8]])
GATED = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "granite", "olmo2", "stablelm", "smollm3"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_key_is_computed_from_the_rows_that_were_found(family):
    anat = anatomy(make(family))
    found = find_neurons(anat, LAYER)
    assert (found.up is not None) == (family in {*GATED, "phi3"})
    reader, output = anat.matrix(found.gate.number), anat.mlp_output(LAYER)
    seen = observe(anat.model, {"x": reader, "k": output}, IDS)
    x, key = seen["x"][0], seen["k"][0]  # [T, d_model], [T, d_ff]
    for neuron in (0, 7, anat.d_ff - 1):
        parts = []
        for rows in (found.gate, found.up):
            if rows is None:
                continue
            row = anat.weight(rows.number)[rows.first + neuron]
            parts.append(x @ row + found.bias(anat, rows)[neuron])
        torch.testing.assert_close(found.keys(parts[0], parts[-1]), key[:, neuron], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_a_row_of_zeros_and_no_bias_silences_its_neuron_alone(family):
    model = make(family)
    anat, before = anatomy(model), anatomy(copy.deepcopy(model))
    found = find_neurons(anat, LAYER)
    with torch.no_grad():
        anat.weight(found.gate.number)[found.gate.first + 3] = 0
        bias = getattr(anat.matrix(found.gate.number), "bias", None)
        if bias is not None:
            bias[found.gate.first + 3] = 0
    keys = [observe(one.model, {"k": one.mlp_output(LAYER)}, IDS)["k"][0] for one in (before, anat)]
    assert torch.count_nonzero(keys[1][:, 3]) == 0 and torch.count_nonzero(keys[0][:, 3]) > 0
    others = [i for i in range(anat.d_ff) if i != 3]
    torch.testing.assert_close(keys[0][:, others], keys[1][:, others])


def test_matrices_are_numbered_outputs_first():
    anat = anatomy(make("llama"))
    assert anat.matrix_names[LAYER] == "model.layers.1.mlp.down_proj"
    names = [anat.matrix_names[number] for number in anat.input_numbers(LAYER)]
    assert names == ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]
    assert len(set(anat.matrix_names)) == len(anat.matrix_names) == 3 * anat.n_layers
    gpt2 = anatomy(make("gpt2"))
    (number,) = gpt2.input_numbers(2)
    assert gpt2.matrix_names[number] == "transformer.h.2.mlp.c_fc"
    assert tuple(gpt2.weight(number).shape) == (gpt2.d_ff, gpt2.d_model)  # Conv1D stores the transpose


def test_an_mlp_of_another_kind_is_refused():
    anat = anatomy(make("llama"))
    mlp = anat.layers[LAYER].mlp
    mlp.forward = lambda x: mlp.down_proj(torch.sin(mlp.gate_proj(x)) * mlp.up_proj(x) ** 2)
    with pytest.raises(ModelError, match='leave "neurons" out') as error:
        find_neurons(anat, LAYER)
    assert "down_proj" in str(error.value)


@pytest.mark.parametrize("family", ["phi3", "gpt2", "opt", "olmo2", "gemma3_text", "granite", "falcon", "gpt_neox"])
def test_the_change_arrives_in_every_kind_of_layer(family):
    """Gates and biases, one matrix for gate and up, norms and factors after the MLP: by plain passes."""
    model = make(family)
    before, anat = copy.deepcopy(model), anatomy(model)
    contexts, others = [[TokenRow((5, 30, 11), 1)]], [TokenRow((5, n, 11, n + 1), 1) for n in range(40, 90)]
    ids = torch.tensor([contexts[0][0].ids])

    def state(one):
        seen = {}
        hook = anatomy(one).layers[1].register_forward_hook(lambda *given: seen.__setitem__("h", hidden_of(given[2])))
        with torch.no_grad():
            one(ids, use_cache=False)
        hook.remove()
        return seen["h"].reshape(-1, anat.d_model)[1]

    was = state(before)
    change = torch.randn(anat.d_model, generator=torch.Generator().manual_seed(4)) * was.norm() / 8
    write_neurons(anat, 1, contexts, (was + change)[:, None], [0], others, LayerStats(1e9 * torch.eye(anat.d_ff), 1, 1))
    moved = state(model) - was
    assert torch.nn.functional.cosine_similarity(moved, change, dim=0) > 0.85
    # A norm after the MLP fixes the length of what it adds.
    assert moved.norm() / change.norm() == pytest.approx(1, abs=0.5 if family in {"olmo2", "gemma3_text"} else 0.35)
