"""Keys against those that a plain hook sees in a full forward pass of every row by itself."""

import pytest
import torch

from editlib.algorithms.keys import KeyStream, batches, compute_ks
from editlib.models.anatomy import anatomy
from editlib.models.prompts import TokenRow
from editlib.models.tracing import record_inputs


@torch.no_grad()
def plain(anat, row, layer):
    """Keys `[T, d_ff]` and the states that leave the layer, `[T, d_model]`."""
    seen = []
    hooks = [
        anat.mlp_output(layer).register_forward_hook(lambda _, args, __: seen.append(args[0][0].clone())),
        anat.layers[layer].register_forward_hook(
            lambda _, __, out: seen.append((out[0] if isinstance(out, tuple) else out)[0].clone())
        ),
    ]
    anat.model(torch.tensor([row.ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("batch_tokens", [1, 20, 4096])
def test_keys_and_states_before_and_after_a_weight_below_changes(anat, draw, batch_tokens):
    rows = draw(9, 4, 12, 1, 7, 12)
    stream = KeyStream(anat, rows, 1, batch_tokens=batch_tokens)

    def check(layer):
        close(stream.keys(), torch.stack([plain(anat, row, layer)[0][row.lookup] for row in rows], 1))
        for top in {layer, 4}:
            close(stream.states(top), torch.stack([plain(anat, row, top)[1][row.lookup] for row in rows], 1))

    check(1)
    for layer in (1, 2):  # as in an edit: the weight of the layer before which the stream stands changes
        before = stream.keys()
        anat.weight(layer).add_(torch.randn(32, 64, generator=torch.Generator().manual_seed(layer)))
        assert torch.equal(stream.keys(), before)
        check(layer)
        stream.advance(layer + 1)
        check(layer + 1)


def test_from_layer_zero(anat, draw):
    rows = draw(9, 4)
    stream = KeyStream(anat, rows, 0)
    for layer in range(5):
        stream.advance(layer)
        stream.advance(layer)  # nothing happens twice
        close(stream.keys(), torch.stack([plain(anat, row, layer)[0][row.lookup] for row in rows], 1))


def test_tokens_before_every_row_are_as_if_each_row_had_them(anat, draw):
    """Also after a weight below has changed, which the tokens in front run through, too."""
    front, rows = draw(5)[0], draw(9, 4, 12)
    whole = [TokenRow(front.ids + row.ids, len(front) + row.lookup) for row in rows]
    stream = KeyStream(anat, rows, 1, batch_tokens=20, front=front)
    for layer in (1, 2, 3):
        stream.advance(layer)
        close(stream.keys(), torch.stack([plain(anat, row, layer)[0][row.lookup] for row in whole], 1))
        close(stream.states(4), torch.stack([plain(anat, row, 4)[1][row.lookup] for row in whole], 1))
        for numbers, _, keys in stream.every():
            for number, own in zip(numbers, keys, strict=True):
                close(own[: len(rows[number])], plain(anat, whole[number], layer)[0][len(front) :])
        anat.weight(layer).add_(torch.randn(32, 64, generator=torch.Generator().manual_seed(layer)))


@pytest.mark.parametrize(("start", "layer"), [(0, 3), (1, 4)])
def test_several_layers_in_one_step(tiny_llama, draw, start, layer):
    anat, rows = anatomy(tiny_llama), draw(9, 4)
    stream = KeyStream(anat, rows, start)
    stream.advance(layer)
    close(stream.keys(), torch.stack([plain(anat, row, layer)[0][row.lookup] for row in rows], 1))


def test_the_way_up_runs_each_layer_once_a_step(tiny_llama, draw):
    """The states are carried: a stream at layer 3 does not run the layers below again."""
    anat, calls = anatomy(tiny_llama), []
    stream = KeyStream(anat, draw(9, 4), 0)
    with record_inputs({layer: anat.mlp_output(layer) for layer in range(5)}, lambda layer, _: calls.append(layer)):
        for layer in range(4):
            stream.advance(layer)
        assert calls == [0, 1, 2]
        calls.clear()
        stream.keys()
        assert calls == [3]


def test_compute_ks(anat, draw):
    rows = draw(9, 4, 7)
    found = compute_ks(anat, rows, [1, 2, 4])
    assert list(found) == [1, 2, 4]
    for layer, keys in found.items():
        close(keys, torch.stack([plain(anat, row, layer)[0][row.lookup] for row in rows], 1))


def test_compute_ks_of_layers_in_any_order(tiny_llama, draw):
    anat, rows = anatomy(tiny_llama), draw(9, 4)
    found = compute_ks(anat, rows, [3, 1])
    for layer in (3, 1):
        close(found[layer], torch.stack([plain(anat, row, layer)[0][row.lookup] for row in rows], 1))


def test_keys_of_half_precision_are_fp32(tiny_llama, draw):
    stream = KeyStream(anatomy(tiny_llama.to(torch.bfloat16)), draw(4), 1)
    assert stream.keys().dtype == stream.states(1).dtype == torch.float32


def test_training_mode_does_not_matter(tiny_gpt2, draw):
    rows = draw(9, 4)
    wanted = compute_ks(anatomy(tiny_gpt2), rows, [3])[3]
    close(compute_ks(anatomy(tiny_gpt2.train()), rows, [3])[3], wanted)


def test_batches_hold_every_row_once_within_the_budget():
    rows = [TokenRow(tuple(range(1, n + 1)), 0) for n in (5, 3, 9, 3, 30, 1, 4)]
    groups = batches(rows, 12)
    assert sorted(i for group in groups for i in group) == list(range(7))
    for group in groups:
        assert len(group) == 1 or len(group) * max(len(rows[i]) for i in group) <= 12
    assert len(groups) == 4  # 1+3+3 tokens wide 3, 4+5 wide 5, 9 alone, 30 alone
    assert batches([], 12) == []
