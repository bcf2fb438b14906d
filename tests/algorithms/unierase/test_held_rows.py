"""Rows that are read at chosen positions, as plain passes of one row after the other read them."""

import pytest
import torch

from editlib.algorithms.unierase import held_rows
from editlib.algorithms.unierase.held_rows import HeldRows
from editlib.models.anatomy import anatomy
from editlib.models.neurons import find_neurons
from editlib.models.prompts import TokenRow

COMMON = tuple(range(60, 85))  # so many tokens that all rows share are run once
LENGTHS, FIRSTS = (9, 3, 7, 1, 6), [2, 2, 6, 0, 1]
BATCHES = {"one position a batch": {"BATCH_LOGITS": 1}, "few tokens": {"BATCH_TOKENS": 8}, "together": {}}


@pytest.fixture(params=[(), COMMON], ids=["apart", "with a common start"])
def rows(request):
    front = request.param
    rows = [TokenRow((*front, *range(5 + i, 5 + i + length)), 0) for i, length in enumerate(LENGTHS)]
    return rows, [first + len(front) for first in FIRSTS]


@pytest.fixture(params=BATCHES.values(), ids=BATCHES, autouse=True)
def batches(request, monkeypatch):
    for name, value in request.param.items():
        monkeypatch.setattr(held_rows, name, value)


def plain_logits(model, rows, firsts):
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row.ids])).logits[0, at:] for row, at in zip(rows, firsts, strict=True)])


def test_final_states_follow_changes_of_the_model(tiny_llama, rows):
    anat = anatomy(tiny_llama)
    held = HeldRows(anat, *rows)
    for _ in range(2):
        read, logits = held.final_states(), plain_logits(tiny_llama, *rows)
        torch.testing.assert_close(read.log_sums, logits.logsumexp(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(read.states @ anat.head.weight.T, logits, rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            tiny_llama.model.layers[0].mlp.down_proj.weight.mul_(3)
            tiny_llama.model.layers[3].self_attn.v_proj.weight.mul_(-2)


@torch.no_grad()
def test_what_neurons_see_is_what_hooks_see(tiny_llama, rows):
    anat, seen = anatomy(tiny_llama), {"x": [], "keys": []}
    mlp = tiny_llama.model.layers[1].mlp
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: seen[name].append(given[0][0]))
        for name, module in (("x", mlp.gate_proj), ("keys", mlp.down_proj))
    ]
    plain_logits(tiny_llama, *rows)
    for hook in hooks:
        hook.remove()
    expected = {name: torch.cat([x[at:] for x, at in zip(some, rows[1], strict=True)]) for name, some in seen.items()}
    found = {name: torch.zeros_like(x) for name, x in expected.items()}
    for part in HeldRows(anat, *rows).inputs_of(find_neurons(anat, 1)):
        for name, x in found.items():
            x[part.positions] = getattr(part, name)
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-3, atol=1e-4)


def test_no_rows_have_no_states(tiny_llama):
    held = HeldRows(anatomy(tiny_llama), [], [])
    assert held.count == 0 and held.final_states().states.shape == (0, 32)
