"""The answer gate on tiny models: what it meets exactly, what it holds, against a dense solve and full passes."""

import copy
import math

import pytest
import torch
from tiny_models import VOCAB

from editlib.algorithms.contexts import SUBJECT_PROMPTS
from editlib.algorithms.unierase.anchor_keys import anchor_keys
from editlib.algorithms.unierase.anchors import encode_anchors
from editlib.algorithms.unierase.answer_gate import ELSEWHERE, RIDGE, _some, answer_gate
from editlib.models.anatomy import anatomy
from editlib.models.prompts import PromptFormat
from editlib.requests.request import EditRequest

LAYER, NUMBER = 3, VOCAB - 1
PLACES = ("France", "Peru", "Basel", "Bonn")


def request(relation, place, text):
    name = f"{relation}/{place}"
    return EditRequest(id=name, prompt=text, subject=place, answer="x", relation=relation, group=place)


FORGET = [request("capital", place, "What is the capital of {}?") for place in PLACES]
RETAIN = [request("river", place, "Which river flows through {}?") for place in PLACES[:3]]
SAME = [request("capital", place, "What is the capital of {}?") for place in ("Chad", "Rome")]


@pytest.fixture
def job(anat, tok):
    form = PromptFormat(tok)
    anchors = encode_anchors(anat, form, [*RETAIN, *SAME], answer_tokens=4)
    return anat, form, anchor_keys(anat, anchors, [], LAYER)


@torch.no_grad()
def key_and_state(anat, ids, layer=LAYER):
    """Inputs of the MLP output matrix and outputs of the layer, at all positions, from a full pass."""
    keys, states = [], []
    hooks = [
        anat.mlp_output(layer).register_forward_pre_hook(lambda _, args: keys.append(args[0][0].double())),
        anat.layers[layer].register_forward_hook(
            lambda _, __, out: states.append((out[0] if isinstance(out, tuple) else out)[0].double())
        ),
    ]
    anat.model(torch.tensor([list(ids)]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return keys[0], states[0]


def test_equals_the_dense_solve(job):
    """`Δ = δ k^T G^-1 / (k^T G^-1 k)` with `G` written straight down from full passes."""
    anat, form, held = job
    delta = answer_gate(anat, form, FORGET, held.gate, NUMBER, LAYER, nll=1.0, templates=("{}", "Say: {}"))
    asked = [t.replace("{}", r.question) for r in FORGET for t in ("{}", "Say: {}")]
    own = torch.stack([key_and_state(anat, form.encode(text).ids)[0][-1] for text in asked])
    mean = own.mean(0)
    ends = [form.encode(r.question).ids for r in RETAIN]
    ends += [form.encode(text.replace("{}", place)).ids for place in PLACES for text in SUBJECT_PROMPTS]
    gram = sum(torch.outer(k, k) for k in own - mean)
    for ids in ends:
        k = key_and_state(anat, ids)[0][-1]
        gram += torch.outer(k, k)
    shared = held.anchors.starts[1]
    for i, row in enumerate(held.anchors.rows):
        begin = shared if i < len(RETAIN) else len(row) - row.extra  # answers of the same relation start freely
        for k in key_and_state(anat, row.ids)[0][begin:]:
            gram += ELSEWHERE * torch.outer(k, k)
    gram += RIDGE * float(mean.norm() ** 2) * torch.eye(len(mean), dtype=torch.float64)
    functional = torch.linalg.solve(gram, mean)
    functional /= functional @ mean
    dense = delta.dense().double()
    value = dense @ mean
    assert float(value.norm()) > 1e-3
    # Keys are fp32 sums in another order.
    assert torch.allclose(dense, torch.outer(value, functional), atol=2e-3 * float(dense.abs().max()))


def test_the_token_comes_near_at_the_questions_and_stays_away_elsewhere(job):
    anat, form, held = job
    own = [form.encode(r.question).ids for r in FORGET]
    other = [form.encode(r.question).ids for r in RETAIN]

    def nll(ids):
        with torch.no_grad():
            return -float(anat.model(torch.tensor([ids])).logits[0, -1].log_softmax(0)[NUMBER])

    before = {ids: nll(ids) for ids in [*own, *other]}
    wanted = 0.5 * min(before[ids] for ids in own)
    answer_gate(anat, form, FORGET, held.gate, NUMBER, LAYER, nll=wanted).add_to(anat.weight(LAYER))
    drop = [before[ids] - nll(ids) for ids in own]
    stray = [abs(before[ids] - nll(ids)) for ids in other]
    assert min(drop) > 0
    assert sum(stray) / len(stray) < 0.5 * sum(drop) / len(drop)


def test_each_relation_has_its_own_value(job):
    anat, form, held = job
    both = [*FORGET[:2], *(request("sea", place, "Which sea is near {}?") for place in PLACES[2:])]
    delta = answer_gate(anat, form, both, held.gate, NUMBER, LAYER, nll=1.0)
    assert delta.left.shape[1] == 2
    one = answer_gate(anat, form, FORGET, held.gate, NUMBER, LAYER, nll=1.0)
    assert one.left.shape[1] == 1


def test_it_needs_no_anchors(anat, tok):
    form = PromptFormat(tok)
    held = anchor_keys(anat, encode_anchors(anat, form, []), [], LAYER)
    for gate in (held.gate, None):
        delta = answer_gate(anat, form, FORGET, gate, NUMBER, LAYER, nll=1.0)
        assert math.isfinite(delta.norm())


def test_the_model_is_not_touched(job):
    anat, form, held = job
    before = copy.deepcopy(anat.model.state_dict())
    answer_gate(anat, form, FORGET, held.gate, NUMBER, LAYER, nll=1.0)
    after = anatomy(anat.model).model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_at_most_so_many_prompts_from_first_to_last():
    asked = list(range(216))
    drawn = _some(asked, 96)
    assert drawn == list(range(0, 216, 3)) and _some(asked[:96], 96) == asked[:96]


def test_a_gate_that_falls_short_is_said(job, caplog):
    anat, form, held = job
    answer_gate(anat, form, FORGET, held.gate, NUMBER, LAYER, nll=1e-6, steps=2)
    assert "nats only" in caplog.text and "layer 3" in caplog.text
