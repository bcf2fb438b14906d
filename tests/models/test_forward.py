"""Parts of a forward pass, put together, against the model's own forward of every row alone."""

import functools

import pytest
import torch
from families import FAMILIES, OPT_350M, SLOW, make

from editlib.models.anatomy import anatomy
from editlib.models.capabilities import can_skip
from editlib.models.forward import encode_prefix, forward, shared_length, shared_prefix, split
from editlib.models.prompts import TokenRow, pad
from editlib.models.tracing import record_inputs, stop_after


@torch.no_grad()
def alone(model, rows):
    """Logits of every row by itself through the model as it is."""
    return [model(torch.tensor([row.ids]), use_cache=False).logits[0].float() for row in rows]


def check(logits, batch, wanted, bound=1e-5):
    """`logits [n, T, vocab]` at the real tokens equal the ends of `wanted`."""
    for i, want in enumerate(wanted):
        real = batch.attention_mask[i].bool()
        got = logits[i][real].float()
        torch.testing.assert_close(
            got, want[len(want) - len(got) :], rtol=bound, atol=bound, msg=lambda m, i=i: f"row {i}: {m}"
        )


def state_of(model):
    """Everything a patch could leave behind in the modules."""
    return {
        name: (
            set(vars(module)),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            module.training,
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_stopping_and_resuming_at_every_layer(tiny_model, draw, side):
    stop_and_resume(tiny_model, draw(9, 4, 1, 12), side, 1e-5)


@torch.no_grad()
def test_stopping_and_resuming_in_bf16(tiny_llama, draw):
    stop_and_resume(tiny_llama.to(torch.bfloat16), draw(6, 4), "right", 0.06)


def stop_and_resume(model, rows, side, bound):
    anat = anatomy(model)
    batch = pad(rows, side=side)
    wanted = alone(model, rows)
    clean = state_of(model)
    check(forward(anat, batch), batch, wanted, bound)
    hidden = None
    for layer in range(anat.n_layers):  # one layer at a time, each from the states of the one before
        hidden = forward(anat, batch, start=layer, stop=layer + 1, hidden=hidden)
        if layer + 1 < anat.n_layers:
            check(forward(anat, batch, start=layer + 1, hidden=hidden), batch, wanted, bound)
        torch.testing.assert_close(hidden, forward(anat, batch, stop=layer + 1), rtol=bound, atol=bound)
    assert state_of(model) == clean


@torch.no_grad()
def test_resuming_over_a_prefix_at_every_layer(tiny_model, draw):
    resume_over_prefix(tiny_model, draw(9, 4, 12, 7), [3, 1, 5, 6], 1e-5)


@torch.no_grad()
def test_resuming_over_a_prefix_in_bf16(tiny_gpt2, draw):
    resume_over_prefix(tiny_gpt2.to(torch.bfloat16), draw(6, 4), [3, 1], 0.06)


def resume_over_prefix(model, rows, at, bound):
    anat = anatomy(model)
    wanted = alone(model, rows)
    fronts, rests = split(rows, at)
    prefix = encode_prefix(anat, fronts)
    batch = pad(rests)
    before = [(k.clone(), v.clone()) for k, v in prefix.layers]
    check(forward(anat, batch, prefix=prefix), batch, wanted, bound)
    for layer in range(1, anat.n_layers):
        hidden = forward(anat, batch, stop=layer, prefix=prefix)
        check(forward(anat, batch, start=layer, hidden=hidden, prefix=prefix), batch, wanted, bound)
    for (k, v), (k0, v0) in zip(prefix.layers, before, strict=True):
        assert torch.equal(k, k0)  # a prefix may be used again
        assert torch.equal(v, v0)


def through_the_parts(model, rows, at, side, bound):
    """The whole, each half from every layer, alone and behind a prefix, against every row by itself."""
    anat = anatomy(model)
    wanted = alone(model, rows)
    fronts, rests = split(rows, at)
    prefix = encode_prefix(anat, fronts)
    for batch, front in ((pad(rows, side=side), None), (pad(rests, side=side), prefix)):
        check(forward(anat, batch, prefix=front), batch, wanted, bound)
        for layer in range(1, anat.n_layers):
            hidden = forward(anat, batch, stop=layer, prefix=front)
            check(forward(anat, batch, start=layer, hidden=hidden, prefix=front), batch, wanted, bound)
    place = torch.tensor([0, 2]), batch.last[[0, 2]] - torch.tensor([1, 0])
    scored = forward(anat, batch, start=layer, hidden=hidden, prefix=prefix, score=place)
    torch.testing.assert_close(scored.float(), torch.stack([wanted[0][-2], wanted[2][-1]]), rtol=bound, atol=bound)
    return anat


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", [*FAMILIES, *SLOW])
@torch.no_grad()
def test_families(family, side, draw):
    """Tuples, sliding windows (4 tokens of up to 12), logit scaling and capping, ALiBi, fused attention, and models
    that are not continued from keys and values."""
    anat = through_the_parts(make(family), draw(9, 5, 12), [3, 2, 4], side, 1e-5)
    skips = list(anat.probe_cache.resumes.values())
    assert skips[:3] == [True] * 3  # they are run in parts, not as a whole with the right result
    assert anat.probe_cache.caches == (family in FAMILIES)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["gemma3_text", "opt", "granite", "mpt", "lfm2", "gpt_neo", "falcon", "olmo2"])
@torch.no_grad()
def test_families_in_bf16(family, side, draw):
    anat = through_the_parts(make(family).to(torch.bfloat16), draw(9, 5, 12), [3, 2, 4], side, 0.12)
    assert all(anat.probe_cache.resumes[layer] for layer in (1, 2, 3))
    assert anat.probe_cache.caches == (family in FAMILIES)


@torch.no_grad()
def test_embeddings_narrower_than_the_residual_stream(draw):
    through_the_parts(make("opt", **OPT_350M), draw(9, 5, 12), [3, 2, 4], "left", 1e-5)


def test_gradients_reach_what_enters_the_layer(tiny_model, draw):
    anat = anatomy(tiny_model)
    batch = pad(draw(6, 4))
    with torch.no_grad():
        hidden = forward(anat, batch, stop=3)
    entered = hidden.clone().requires_grad_()
    forward(anat, batch, start=3, hidden=entered).square().sum().backward()
    step = torch.zeros_like(hidden)
    step[0, 2, 7] = 1e-2
    with torch.no_grad():
        up, down = (forward(anat, batch, start=3, hidden=hidden + s).double().square().sum() for s in (step, -step))
    assert float(entered.grad[0, 2, 7]) == pytest.approx(float((up - down) / 2e-2), rel=2e-2)


@torch.no_grad()
def test_scores_are_the_logits_at_their_places(anat, draw):
    batch = pad(draw(6, 4))
    everywhere = forward(anat, batch)
    rows, columns = torch.tensor([1, 0, 0]), torch.tensor([3, 5, 0])
    torch.testing.assert_close(forward(anat, batch, score=(rows, columns)), everywhere[rows, columns])
    none = torch.zeros(0, dtype=torch.long)
    assert forward(anat, batch, score=(none, none)).shape == (0, everywhere.shape[-1])


@torch.no_grad()
def test_keys_are_the_inputs_of_the_output_matrix(anat, draw):
    batch = pad(draw(6, 4))
    seen, wanted = {}, {}
    forward(anat, batch, stop=4, keys=seen.__setitem__, key_layers=(0, 3))
    hooks = [
        anat.mlp_output(layer).register_forward_hook(
            lambda _, args, __, layer=layer: wanted.__setitem__(layer, args[0])
        )
        for layer in (0, 3)
    ]
    anat.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    for hook in hooks:
        hook.remove()
    assert seen.keys() == {0, 3}
    for layer in (0, 3):
        real = batch.attention_mask.bool()
        torch.testing.assert_close(seen[layer][real], wanted[layer][real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["opt", "gemma2", "lfm2"])
@torch.no_grad()
def test_keys_of_families(family, draw):
    """OPT's layers fold rows and columns into one dimension; behind a prefix, rows padded on the left."""
    model = make(family)
    anat = anatomy(model)
    rows, seen = draw(9, 5), {}
    fronts, rests = split(rows, [3, 2])
    batch = pad(rests, side="left")
    forward(anat, batch, stop=4, prefix=encode_prefix(anat, fronts), keys=seen.__setitem__, key_layers=(0, 3))
    for i, row in enumerate(rows):
        wanted = {}
        with record_inputs({layer: anat.mlp_output(layer) for layer in (0, 3)}, wanted.__setitem__):
            model(torch.tensor([row.ids]), use_cache=False)
        for layer, keys in wanted.items():
            got = seen[layer][i][batch.attention_mask[i].bool()]
            torch.testing.assert_close(got, keys.reshape(-1, anat.d_ff)[-len(got) :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@torch.no_grad()
def test_an_exception_inside_leaves_the_model_as_it_was(anat, draw, error):
    rows = draw(6, 4)
    batch, wanted = pad(rows), alone(anat.model, rows)
    hidden = forward(anat, batch, stop=2)
    clean = state_of(anat.model)

    def raises(*_):
        raise error("inside")

    place = torch.tensor([0]), torch.tensor([0])
    with pytest.raises(error, match="inside"):
        forward(anat, batch, start=2, stop=4, hidden=hidden, keys=raises, key_layers=(3,), score=place)
    assert state_of(anat.model) == clean
    check(forward(anat, batch), batch, wanted)


@torch.no_grad()
def test_a_forward_of_the_instance_survives(anat, draw):
    """accelerate (device_map) puts its wrapper on the module; skipping the layer must not remove it."""
    rows = draw(6, 4)
    batch = pad(rows)
    calls = []
    own = anat.layers[0].forward

    @functools.wraps(own)
    def wrapped(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    assert can_skip(anat, 2)  # tried before anything is counted
    anat.layers[0].forward = wrapped
    hidden = forward(anat, batch, stop=2)
    forward(anat, batch, start=2, hidden=hidden)
    assert len(calls) == 1
    forward(anat, batch)
    assert len(calls) == 2


def test_other_errors_pass_through_the_early_stop(tiny_llama):
    with pytest.raises(ZeroDivisionError), stop_after(tiny_llama.model.layers[0], lambda _: 1 / 0):
        tiny_llama(torch.tensor([[5, 6]]))
    assert not tiny_llama.model.layers[0]._forward_hooks
    with pytest.raises(ZeroDivisionError), record_inputs({0: tiny_llama.lm_head}, lambda *_: 1 / 0):
        tiny_llama(torch.tensor([[5, 6]]))
    assert not tiny_llama.lm_head._forward_pre_hooks


def test_shared_length_leaves_a_token_of_each():
    rows = [TokenRow((5, 6, 7, 8), 3), TokenRow((5, 6, 7), 2), TokenRow((5, 6, 7, 9, 9), 1)]
    assert shared_length(rows) == 2
    assert shared_length(rows[:1]) == 3
    assert shared_length([TokenRow((5,), 0), TokenRow((5, 6), 0)]) == 0
    assert shared_length([TokenRow((4, 6), 0), TokenRow((5, 6), 0)]) == 0


@torch.no_grad()
def test_a_shared_prefix_runs_once_and_serves_all(anat, draw):
    rows = draw(9, 6, 11, same=5)
    wanted = alone(anat.model, rows)
    tokens = []
    with record_inputs({0: anat.mlp_output(0)}, lambda _, k: tokens.append(k.shape[0] * k.shape[1])):
        prefix, rests = shared_prefix(anat, rows)
    assert tokens == [5]
    assert [row.lookup for row in rests] == [row.lookup - 5 for row in rows]
    batch = pad(rests, side="left")
    check(forward(anat, batch, prefix=prefix), batch, wanted)
    some = torch.tensor([2, 0])
    batch = pad([rests[2], rests[0]])
    check(forward(anat, batch, prefix=prefix.select(some)), batch, [wanted[2], wanted[0]])
    rows = draw(3, 3)
    assert shared_prefix(anat, rows) == (None, rows)


@torch.no_grad()
def test_a_prefix_of_repeated_shared_and_empty_rows(tiny_model, draw, monkeypatch):
    """Whatever is run once only: each row goes on as if it had been run alone."""
    monkeypatch.setattr("editlib.models.forward.WORTH_A_PASS", 1)
    first, second, third = draw(9, 6, 11, same=3)
    rows, at = [first, second, first, third, *draw(4), second], [5, 4, 5, 6, 0, 4]
    wanted = alone(tiny_model, rows)
    anat = anatomy(tiny_model)
    fronts, rests = split(rows, at)
    batch, prefix = pad(rests), encode_prefix(anat, fronts)
    check(forward(anat, batch, prefix=prefix), batch, wanted)
    assert prefix.lengths.tolist() == at


@torch.no_grad()
def test_equal_rows_of_a_prefix_run_once(anat, draw):
    rows = draw(9, 6, same=2)
    tokens = []
    with record_inputs({0: anat.mlp_output(0)}, lambda _, k: tokens.append(k.shape[0] * k.shape[1])):
        encode_prefix(anat, [rows[0], rows[1], rows[0], rows[0]])
    assert tokens == [2 * 9]


def test_split_moves_the_lookup_along():
    fronts, rests = split([TokenRow((5, 6, 7, 8), 2, extra=1)], [2])
    assert fronts == [TokenRow((5, 6), 1)]
    assert rests == [TokenRow((7, 8), 0, 1)]
