"""Causal tracing against hooks on plain transformers."""

import pytest
import torch

from editlib import data
from editlib.algorithms.causal_trace import CausalTrace, _effects, _Known, causal_trace
from editlib.models.anatomy import anatomy
from editlib.models.prompts import PromptFormat

PAIRS = [("France", "Rotterdam", 7), ("Peru", "Basel", 40), ("Bonn", "Chad", 11)]


def by_hooks(model, source, target, token):
    """The probability of `token` behind `target`, by the layer behind which it is given the state of `source`."""
    with torch.no_grad():
        states = model(torch.tensor([source.ids]), output_hidden_states=True).hidden_states
        chances = []
        for number, layer in enumerate(model.model.layers[:-1]):

            def put(_, __, out, state=states[number + 1][0, source.lookup]):
                hidden = out[0] if isinstance(out, tuple) else out
                hidden[0, target.lookup] = state
                return out

            handle = layer.register_forward_hook(put)
            chances.append(float(model(torch.tensor([target.ids])).logits[0, -1].softmax(-1)[token]))
            handle.remove()
    return chances


def test_effects_are_those_of_states_put_in_by_hooks(tiny_llama, tok):
    form = PromptFormat(tok, chat=False)
    rows = [[form.encode(f"The capital of {place} is", place) for place in pair[:2]] for pair in PAIRS]
    known = [[_Known(row, pair[2]) for row in both] for both, pair in zip(rows, PAIRS, strict=True)]
    with torch.no_grad():
        found = _effects(anatomy(tiny_llama), *zip(*known, strict=True))
    each = [by_hooks(tiny_llama, *both, pair[2]) for both, pair in zip(rows, PAIRS, strict=True)]
    assert len(found) == 5 and found[-1] == 0
    assert found[:-1] == pytest.approx(torch.tensor(each).mean(0).tolist(), abs=1e-5)


def test_a_model_that_knows_nothing_is_not_traced(tiny_llama, tok):
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    assert causal_trace(anatomy(tiny_llama), tok, data.facts()) is None
    assert causal_trace(anatomy(tiny_llama), tok, []) is None
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


@pytest.mark.parametrize(
    ("effects", "layer"),
    [((0.1, 0.4, 0.5, 0.45, 0.1, 0.0), 3), ((0.5, 0.0, 0.0), 0), ((0.0, 0.2, 0.5, 0.26, 0.0), 3)],
)
def test_reading_ends_where_half_of_the_effect_is_gone(effects, layer):
    assert CausalTrace(effects, 10).read_at == layer
