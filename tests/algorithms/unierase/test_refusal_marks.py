"""Marks of a late layer: neurons that are active where tokens are wanted, by plain passes, and what carries them."""

import copy

import pytest
import torch
from test_refusal_tokens import FORGET, OPTIONS, RETAIN, given_for

from editlib.algorithms.edit import write
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.unierase import apply_unierase_to_model, gated_neurons, held_places, refusal_marks
from editlib.algorithms.unierase.held_places import HeldPlaces
from editlib.algorithms.unierase.refusal_marks import fit_marks
from editlib.algorithms.unierase.refusal_places import Place, RefusalPlaces
from editlib.algorithms.values import Values
from editlib.chain.batch import Batch
from editlib.errors import HparamsError, StatsError
from editlib.hparams import UniEraseHyperParams
from editlib.models.anatomy import anatomy
from editlib.models.prompts import TokenRow

MARKED = {**OPTIONS, "layers": [0], "mark_layer": 2, "token_steps": 20}
MATRICES = {2, 5 + 2 * 2, 5 + 2 * 2 + 1}  # of layer 2 of five: output, gate, up
WANTED = [(5, 9, 11), (5, 9, 12), (7, 8)]  # token ids; the first two of relation 0 and of one request
KEPT = [(5, 9, 13), (7, 3)]
ANSWERS = [((5, 9), (20, 21, 22, 23)), ((5, 9, 30), (31, 32))]


def row(ids):
    return TokenRow(tuple(ids), 0)


@pytest.fixture
def places():
    return RefusalPlaces(
        ("capital", "language"),
        [Place(row(ids), group) for ids, group in zip(WANTED, (0, 0, 1), strict=True)],
        [0, 0, 1],
        [Place(row(KEPT[0]), 0), Place(row(KEPT[1]), None)],
        [(row(ids), text) for ids, text in ANSWERS],
    )


@pytest.fixture
def few_texts(monkeypatch):
    monkeypatch.setattr(held_places, "TEXTS", 4)
    monkeypatch.setattr(held_places, "BEGINNINGS", 8)


def seen_by(model, ids, layer=2):
    """The MLP's input, its key and its output at the last token, and what leaves the last layer at all of them."""
    seen, mlp = {}, model.model.layers[layer].mlp
    hooks = [
        mlp.register_forward_hook(lambda _, given, out: seen.update(x=given[0][0, -1], y=out[0, -1])),
        mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.__setitem__("k", given[0][0, -1])),
        model.model.norm.register_forward_pre_hook(lambda _, given: seen.__setitem__("state", given[0][0])),
    ]
    with torch.no_grad():
        model(torch.tensor([list(ids)]))
    for hook in hooks:
        hook.remove()
    return seen


def test_each_request_has_a_neuron_that_writes_its_relations_mark(tiny_llama, places, few_texts):
    """The activations and columns by hand, from passes of the model with hooks."""
    before, anat = copy.deepcopy(tiny_llama), anatomy(tiny_llama)
    updates, numbers = fit_marks(anat, HeldPlaces.of(anat, places, start=2), 2, 3.0, torch.eye(anat.d_ff))
    assert set(updates) == MATRICES and len(numbers) == 2
    for number, update in updates.items():
        with torch.no_grad():
            write(anat, number, update)
    columns = tiny_llama.model.layers[2].mlp.down_proj.weight[:, numbers].detach()
    active = torch.stack([seen_by(tiny_llama, ids)["k"][numbers] for ids in WANTED])  # [wanted, 2]
    # Least squares over a request's places: k v is nearest to the mark, so that Σ k (k v - mark) = 0.
    inside = torch.cat([seen_by(before, (*ids, *text))["state"][len(ids) - 1 :] for ids, text in ANSWERS])
    variances = torch.linalg.eigvalsh(torch.cov(inside.T.double(), correction=0))[:2].clamp_min(0)
    first, second = active[:2, 0], active[2:, 1]
    for column, own, variance in zip(columns.T, (first, second), variances, strict=True):
        mark = column * own.square().sum() / own.sum()
        torch.testing.assert_close(mark.norm().double(), 3 * variance.sqrt(), rtol=0.05, atol=1e-5)
    # Both scores are one at a request's places, on average, whatever they are elsewhere.
    gate = tiny_llama.model.layers[2].mlp.gate_proj.weight[numbers]
    up = tiny_llama.model.layers[2].mlp.up_proj.weight[numbers]
    x = torch.stack([seen_by(before, ids)["x"] for ids in WANTED])  # [wanted, d_model]
    torch.testing.assert_close((x @ up.T).mean(dim=0), torch.ones(2), rtol=1e-2, atol=1e-2)
    ramp = x @ gate.T / gated_neurons.SHARP + refusal_marks.THRESHOLD  # the bias is one, but for least squares
    torch.testing.assert_close(ramp[:2, 0].mean(), torch.tensor(1.0), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(ramp[2, 1], torch.tensor(1.0), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("spared", "taken", "count"), [(2, (), 2), (3, (), 3), (3, (7,), 2)])
def test_places_inside_sentences_have_neurons_of_their_own_if_they_can_be_spared(
    tiny_llama, places, few_texts, monkeypatch, spared, taken, count
):
    anat, ids = anatomy(tiny_llama), (5, 9, 40)
    monkeypatch.setattr(refusal_marks, "SPARED", spared / anat.d_ff)
    places.wanted.append(Place(row(ids), 1, inside=True))
    places.requests.append(1)
    updates, numbers = fit_marks(anat, HeldPlaces.of(anat, places, start=2), 2, 3.0, torch.eye(anat.d_ff), taken=taken)
    assert len(numbers) == count and not set(numbers) & set(taken)
    for number, update in updates.items():
        with torch.no_grad():
            write(anat, number, update)
    active = seen_by(tiny_llama, ids)["k"][numbers]
    ends = [seen_by(tiny_llama, wanted)["k"][numbers] for wanted in WANTED]
    assert all(int(k.argmax()) == own for k, own in zip(ends, (0, 0, 1), strict=True))
    assert count == 2 or int(active.argmax()) == 2


def test_too_many_requests_for_the_layer_leave_the_marks_out(tiny_llama, places, few_texts, caplog):
    anat = anatomy(tiny_llama)
    updates, numbers = fit_marks(
        anat, HeldPlaces.of(anat, places, start=2), 2, 3.0, torch.eye(anat.d_ff), taken=range(15)
    )
    assert updates == {} and numbers == []
    assert "no 2 neurons to spare for marks" in caplog.text


@pytest.fixture
def marked(tiny_llama, tok, few_texts):
    """(model before, model, tokenizer, result) of an edit that marks; few texts are enough here."""
    before, model = copy.deepcopy(tiny_llama), tiny_llama
    return before, model, tok, apply_unierase_to_model(
        model, tok, FORGET, UniEraseHyperParams(**MARKED), **given_for(model)
    )  # fmt: skip


def test_marks_are_part_of_the_edit_and_are_taken_back_with_it(marked):
    before, model, _, result = marked
    assert set(result.deltas) == {0, *MATRICES} and set(result.neurons) == {2}
    change = model.model.layers[2].mlp.gate_proj.weight - before.model.layers[2].mlp.gate_proj.weight
    assert change.abs().sum(dim=1).nonzero().flatten().tolist() == sorted(result.neurons[2])
    result.revert(model)
    for name in ("gate_proj", "up_proj", "down_proj"):
        for layer in (0, 2):
            pair = (getattr(one.model.layers[layer].mlp, name).weight for one in (model, before))
            assert torch.equal(*pair), (layer, name)


def test_statistics_without_the_mark_layer_are_named(tiny_llama, tok):
    given = given_for(tiny_llama)
    given["stats"] = {0: given["stats"][0]}
    before = copy.deepcopy(tiny_llama.state_dict())
    with pytest.raises(StatsError, match=r"given for layers \[0\]; the settings also need layers \[2\]"):
        apply_unierase_to_model(tiny_llama, tok, FORGET, UniEraseHyperParams(**MARKED), **given)
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


def test_a_replay_writes_the_marks_that_were_found(marked, pristine_toks):
    before, model, _, result = marked
    given = {**given_for(before), "token": result.token}
    hparams = UniEraseHyperParams(**MARKED)
    again = apply_unierase_to_model(
        before, copy.deepcopy(pristine_toks["plain"]), FORGET, hparams, values=result.values, **given
    )
    assert again.neurons == result.neurons
    torch.testing.assert_close(again.deltas[2].dense(), result.deltas[2].dense())
    for name in ("gate_proj", "up_proj", "down_proj"):
        pair = (getattr(one.model.layers[2].mlp, name).weight for one in (model, before))
        torch.testing.assert_close(*pair)


def test_a_later_edit_marks_with_other_neurons(marked, tok):
    _, model, _, result = marked
    given = {**given_for(model), "retain": RETAIN[1:], "state": result.state}
    second = apply_unierase_to_model(model, tok, [RETAIN[0]], UniEraseHyperParams(**MARKED), **given)
    assert second.neurons[2] and not set(second.neurons[2]) & set(result.neurons[2])


def test_a_stored_batch_knows_which_updates_are_marks(marked):
    *_, result = marked
    batch = Batch.of(result, result.deltas, FORGET, {})
    read = Batch.from_bytes(batch.to_bytes(), "here")
    assert set(read.values.marks) == MATRICES and set(read.updates) == {0, *MATRICES}
    assert read.values.marking == {2: list(result.neurons[2])} and read.neurons == read.values.marking
    torch.testing.assert_close(read.values.marks[2].dense(), result.deltas[2].dense().float())
    assert read.values.select([0]).marks == read.values.marks


def test_joined_values_keep_the_marks():
    update = LowRank(torch.ones(2, 1), torch.ones(1, 3))
    one = Values(torch.ones(2, 1), torch.ones(2, 1), [1], [0.1], [0.2], marks={4: update}, marking={4: [7]})
    other = Values(torch.ones(2, 1), torch.ones(2, 1), [1], [0.1], [0.2])
    both = Values.joined([other, one])
    assert both.marks == {4: update} and both.marking == {4: [7]}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mark_layer": 0}, "above the last of `layers`, 0"),
        ({"mark_layer": 1, "say": False}, '"say": true'),
        ({"mark_layer": 1, "values": "descent"}, '"values": "rows"'),
        ({"mark_layer": 1, "mark_size": 0.0}, "mark_size"),
    ],
)
def test_settings_that_cannot_mark_are_refused(options, said):
    with pytest.raises(HparamsError, match="mark_") as error:
        UniEraseHyperParams(**{**MARKED, **options})
    assert said in str(error.value)
