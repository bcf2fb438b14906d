"""The anchors' keys in one pass, against full passes of one row at a time."""

import pytest
import torch

from editlib.algorithms.unierase.anchor_keys import AnchorStream, anchor_keys
from editlib.algorithms.unierase.anchors import Anchors
from editlib.models.prompts import TokenRow

LAYERS, GATE = [1, 2], 3
RELATIONS = ("capital", None, "capital", "river", None)


@torch.no_grad()
def plain(anat, row, layer):
    """The inputs of the MLP output matrix at every position, `[T, d_ff]`."""
    seen = []
    hook = anat.mlp_output(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    anat.model(torch.tensor([row.ids]), use_cache=False)
    hook.remove()
    return seen[0].reshape(len(row), -1).double()


def gram(blocks):
    keys = torch.cat(blocks)
    return keys.T @ keys


def both(block):
    """The Gram matrix of a block, however it is kept."""
    return block.columns @ block.columns.T if block.moment is None else block.moment


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=["few", "many"])
def anchors(request, draw):
    """Rows with three shared tokens in front, a question and an answer of two tokens; `many` have more than `d_ff`
    positions."""
    front, lengths = (5, 6, 7), (9, 4, 7, 5, 6) if request.param == "few" else (26, 18, 31, 24, 28)
    rows = []
    for i, row in enumerate(draw(*lengths)):
        ids = (*front, 10 + i, *row.ids)
        rows.append(TokenRow(ids, 4 + i % 2, 2))
    return Anchors(tuple(rows), (0, 3, 3, 3, 3), tuple("abcde"), RELATIONS, (True,) * 5)


def test_lookups_and_every_position_of_the_edited_layers(anat, anchors):
    found = anchor_keys(anat, anchors, LAYERS, GATE)
    assert found.anchors is anchors and sorted(found.layers) == LAYERS
    for layer in LAYERS:
        keys = [plain(anat, row, layer) for row in anchors.rows]
        wanted = torch.stack([k[row.lookup] for k, row in zip(keys, anchors.rows, strict=True)], 1)
        close(found.layers[layer].lookups, wanted)
        held = [k[start:] for k, start in zip(keys, anchors.starts, strict=True)]
        close(both(found.layers[layer].every), gram(held))
        assert (found.layers[layer].every.moment is None) == (sum(map(len, held)) <= anat.d_ff)


def test_ends_questions_and_answers_of_the_gates_layer(anat, anchors):
    gate = anchor_keys(anat, anchors, LAYERS, GATE).gate
    keys = [plain(anat, row, GATE) for row in anchors.rows]
    ends = [len(row) - 3 for row in anchors.rows]
    close(gate.ends, torch.stack([k[end] for k, end in zip(keys, ends, strict=True)], 1))
    assert tuple(gate.relations) == RELATIONS and list(gate.questions) == ["capital", None, "river"]
    for relation, block in gate.questions.items():
        own = [k[3 : end + 1] for k, end, r in zip(keys, ends, RELATIONS, strict=True) if r == relation]
        close(both(block), gram(own))
    close(both(gate.answers), gram([k[end + 1 :] for k, end in zip(keys, ends, strict=True)]))


def test_lookup_positions_only(anat, anchors):
    found = anchor_keys(anat, Anchors(anchors.rows, None, anchors.ids, RELATIONS, (True,) * 5), LAYERS, GATE)
    for layer in LAYERS:
        wanted = torch.stack([plain(anat, row, layer)[row.lookup] for row in anchors.rows], 1)
        close(found.layers[layer].lookups, wanted)
        assert torch.equal(found.layers[layer].every.columns, found.layers[layer].lookups)
    assert not any(block.columns.numel() for block in (*found.gate.questions.values(), found.gate.answers))


@pytest.mark.parametrize("rows", [(), (TokenRow((5, 6, 7, 8), 1, 1),)])
def test_one_anchor_or_none(anat, rows):
    found = anchor_keys(
        anat,
        Anchors(rows, (0,) * len(rows), ("a",) * len(rows), (None,) * len(rows), (True,) * len(rows)),
        LAYERS,
        GATE,
    )
    for layer in LAYERS:
        assert found.layers[layer].lookups.shape == (anat.d_ff, len(rows))
        assert found.layers[layer].every.columns.shape == (anat.d_ff, 4 * len(rows))
        if rows:
            close(found.layers[layer].every.columns, plain(anat, rows[0], layer).T)
    assert found.gate.answers.columns.shape == (anat.d_ff, len(rows))


def test_no_gate(anat, anchors):
    assert anchor_keys(anat, anchors, LAYERS).gate is None


def test_layer_after_layer_while_the_weights_below_change(anat, anchors):
    stream = AnchorStream(anat, anchors)
    for layer in (1, 2, 4):
        found = stream.read(layer).layers[layer]
        keys = [plain(anat, row, layer) for row in anchors.rows]
        close(found.lookups, torch.stack([k[row.lookup] for k, row in zip(keys, anchors.rows, strict=True)], 1))
        close(both(found.every), gram([k[start:] for k, start in zip(keys, anchors.starts, strict=True)]))
        weight = anat.weight(layer)
        weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(layer)))


def test_no_anchors_layer_after_layer(anat):
    stream = AnchorStream(anat, Anchors((), None, (), (), ()))
    assert stream.read(1).layers[1].lookups.shape == stream.read(2).layers[2].every.columns.shape == (anat.d_ff, 0)
