"""Models that cannot be run in parts are found out by trying, and still give the results of their own forward."""

import logging

import pytest
import torch
from families import SLOW, make
from test_forward import alone, check, state_of, through_the_parts
from test_generation import generated
from tiny_models import make_llama
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from editlib.models.anatomy import ProbeCache, anatomy
from editlib.models.capabilities import can_cache, can_skip
from editlib.models.forward import encode_prefix, forward, new_cache, split
from editlib.models.generation import greedy
from editlib.models.passes import run
from editlib.models.prefix import Prefix, TokenReplay
from editlib.models.prompts import TokenBatch, pad
from editlib.models.tracing import record_inputs


class Leaky(LlamaDecoderLayer):
    """Layer 3 reads what layer 1 left on a board, beside the residual stream."""

    def forward(self, hidden_states, **kwargs):
        out = super().forward(hidden_states, **kwargs)
        if self.number == 1:
            self.board["states"] = out
        if self.number == 3:
            out = out + 0.3 * (self.board["states"] if self.keeps else self.board.pop("states"))
        return out


@pytest.fixture(params=["keeps", "takes away"])
def leaky(request):
    """What stands on the board stays there, to be read (and be wrong) in a later pass, or is gone."""
    model, board = make_llama(), {}
    for number, layer in enumerate(model.model.layers):
        layer.__class__, layer.number, layer.board, layer.keeps = Leaky, number, board, request.param == "keeps"
    return model


def test_what_reads_more_than_the_residual_stream_is_not_resumed(leaky, caplog):
    anat = anatomy(leaky)
    clean = state_of(leaky)
    with caplog.at_level(logging.WARNING):
        found = {layer: can_skip(anat, layer) for layer in range(1, 5)}
    # Where layer 1 still runs, or layer 3 does not run any more, nothing is missing.
    assert found == {1: True, 2: False, 3: False, 4: True}
    assert can_cache(anat)
    assert state_of(leaky) == clean
    assert [record.name for record in caplog.records] == ["editlib.models.capabilities"]  # said once, not per layer
    assert "cannot be resumed at layer 2" in caplog.text
    assert found[2] == can_skip(anat, 2)
    assert set(anat.probe_cache.resumes) == set(found)
    assert anatomy(leaky).probe_cache == ProbeCache()  # kept with the anatomy, never on the model


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_it_falls_back_to_the_whole(leaky, draw, side):
    through_the_parts(leaky, draw(9, 5, 12), [3, 2, 4], side, 1e-5)


def test_gradients_are_the_same_the_slow_way(tiny_llama, draw):
    anat = anatomy(tiny_llama)
    batch = pad(draw(6, 4))
    with torch.no_grad():
        hidden = forward(anat, batch, stop=3)
    found = []
    for skip in (True, False):
        entered = hidden.clone().requires_grad_()
        logits = run(anat, batch.input_ids, batch.attention_mask, start=3, hidden=entered, skip=skip)
        found.append(torch.autograd.grad(logits.square().sum(), entered)[0])
    torch.testing.assert_close(*found)
    assert float(found[0].abs().max()) > 0


def test_a_trial_does_not_reach_those_who_watch(leaky, draw):
    """A hook around `forward` sees the batch that it asked for, no tokens of ours."""
    anat = anatomy(leaky.train())
    batch = pad(draw(6, 4))
    seen = []
    with torch.no_grad():
        hidden = forward(anat, batch, stop=3)
        with record_inputs({0: anat.mlp_output(4)}, lambda _, k: seen.append(k.shape[:2])):
            forward(anat, batch, start=3, hidden=hidden)
    assert seen == [batch.input_ids.shape]
    assert leaky.training


@pytest.mark.parametrize("family", SLOW)
@torch.no_grad()
def test_earlier_tokens_are_remembered_where_keys_and_values_do_not_do(family, draw, caplog):
    model = make(family)
    anat = anatomy(model)
    rows = draw(9, 5, 12)
    fronts, rests = split(rows, [3, 2, 4])
    prefix = encode_prefix(anat, fronts)
    encode_prefix(anat, fronts)
    said = [record.getMessage() for record in caplog.records if record.name == "editlib.models.capabilities"]
    assert len(said) == 1
    assert "earlier tokens are run every time" in said[0]
    assert prefix.layers == ()
    assert prefix.lengths.tolist() == [3, 2, 4]
    cache = new_cache(anat, 3)
    assert isinstance(cache, TokenReplay)
    batch = pad(fronts, side="left")
    check(forward(anat, batch, cache=cache), batch, alone(model, fronts))
    # The next tokens behind what the cache has seen, the first two rows only.
    cache.batch_select_indices(torch.tensor([0, 1]))
    after = pad(rests[:2], side="left")
    mask = torch.cat([batch.attention_mask[:2], after.attention_mask], dim=1)
    whole = TokenBatch(after.input_ids, mask, after.lookup, after.last)
    check(forward(anat, whole, cache=cache), after, alone(model, rows[:2]))
    assert cache.input_ids.shape[1] == mask.shape[1]


@pytest.mark.parametrize("family", [*SLOW, "mistral", "gemma3_text", "gpt_neo", "mpt"])
def test_answers_behind_a_shared_prefix(family, draw):
    """Rows of several lengths: the gap that padding leaves between what they share and the rest must not count in a
    window of 4 tokens, nor in a position bias. Against `generate` for each row alone."""
    model = make(family)
    model.generation_config.eos_token_id = None
    rows = draw(9, 6, 12, same=4)
    got = greedy(anatomy(model), rows, max_new_tokens=5)
    wanted = [generated(model, row, 5) for row in rows]
    assert [answer[:5] for answer in got] == wanted


@torch.no_grad()
def test_a_cache_keeps_the_columns_of_its_callers_mask(draw):
    """A pass moves padding out of the way and puts what it has appended back in place."""
    model = make("mistral")
    anat = anatomy(model)
    rows = draw(9, 5, 12)
    fronts, rests = split(rows, [3, 2, 4])
    prefix, batch = encode_prefix(anat, fronts), pad(rests, side="left")
    cache = prefix.cache()
    mask = torch.cat([prefix.attention_mask, batch.attention_mask], dim=1)
    forward(anat, TokenBatch(batch.input_ids, mask, batch.lookup, batch.last), cache=cache)
    whole = encode_prefix(anat, rows)
    for held, wanted in zip(Prefix.of(cache, mask).layers, whole.layers, strict=True):
        for i, row in enumerate(rows):  # padding differs, and what it holds
            for x, y in zip(held, wanted, strict=True):
                torch.testing.assert_close(x[i, :, -len(row) :], y[i, :, -len(row) :], rtol=1e-5, atol=1e-5)
