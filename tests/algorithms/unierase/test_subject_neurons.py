"""One neuron for each subject: its scores, the neurons that text can spare, and what the edited model then computes."""

import copy

import pytest
import torch
from test_refusal_tokens import FORGET, OPTIONS, RETAIN, given_for
from transformers import AutoModelForCausalLM

from editlib.algorithms.unierase import apply_unierase_to_model, gated_neurons
from editlib.algorithms.unierase.gated_neurons import (
    KEY_RIDGE,
    PEAK,
    SHARP,
    Moment,
    compared_neurons,
    solve_scores,
    spare_neurons,
)
from editlib.algorithms.unierase.subject_neurons import THRESHOLD, write_neurons
from editlib.chain.batch import Batch
from editlib.errors import EditError, HparamsError
from editlib.export import make_delta
from editlib.export.apply import apply_delta
from editlib.export.lora import save_lora
from editlib.hparams import UniEraseHyperParams
from editlib.models.anatomy import anatomy
from editlib.models.prompts import TokenRow
from editlib.models.weights import save_model, weights_sha256
from editlib.stats.file import LayerStats

NEURONS = {**OPTIONS, "layers": [1], "neurons": True, "say": False, "anchors": True}
WRITTEN = {1, 7, 8}  # of five layers: the MLP output matrix of layer 1, its gate, its up projection


def test_a_score_is_one_at_its_subject_and_least_elsewhere():
    """Against the equations of the constrained least squares, solved as one system with a Lagrange multiplier."""
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(n, 6, dtype=torch.double, generator=generator) for n in (5, 40))
    other += 1.0
    owner = torch.tensor([0, 0, 1, 1, 1])
    empty = Moment(torch.zeros(6, 6, dtype=torch.double), torch.zeros(6, dtype=torch.double), 0.0)
    found = solve_scores(x, owner, empty.plus(other[:10]).plus(other[10:], torch.ones(30)), 0.1)
    means = torch.stack([x[:2].mean(0), x[2:].mean(0)])
    system = other.T @ other / 40 + (torch.outer(means[0], means[0]) + torch.outer(means[1], means[1])) / 2
    system = system + 0.1 * system.diagonal().mean() * torch.eye(6, dtype=torch.double)
    for i in range(2):
        whole = torch.zeros(7, 7, dtype=torch.double)
        whole[:6, :6], whole[:6, 6], whole[6, :6] = system, means[i], means[i]
        expected = torch.linalg.solve(whole, torch.tensor([0.0] * 6 + [1.0], dtype=torch.double))[:6]
        torch.testing.assert_close(found.weights[i], expected)
        assert float(found.weights[i] @ means[i]) == pytest.approx(1)
    every = torch.cat([other, x])
    expected = torch.linalg.lstsq(every, torch.ones(45, 1, dtype=torch.double)).solution[:, 0]
    torch.testing.assert_close(found.bias, expected, rtol=1e-3, atol=1e-4)


def test_the_neurons_removed_are_those_whose_loss_is_least():
    """Against least squares for each neuron: what is left of its output when all others make up for it."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(200, 8, dtype=torch.double, generator=generator) @ torch.randn(8, 8, dtype=torch.double)
    weight = torch.randn(5, 8, dtype=torch.double, generator=generator)
    moment = keys.T @ keys / 200
    ridge = KEY_RIDGE * moment.diagonal().mean()
    tall = torch.cat([keys / 200**0.5, ridge.sqrt() * torch.eye(8, dtype=torch.double)])  # [208, 8]
    losses = []
    for j in range(8):
        others = [i for i in range(8) if i != j]
        share = torch.linalg.lstsq(tall[:, others], tall[:, j : j + 1]).solution
        left = tall[:, j] - tall[:, others] @ share[:, 0]
        losses.append(float(weight[:, j].norm() ** 2 * left.norm() ** 2))
    chosen, removal = spare_neurons(weight, moment, torch.arange(8), 3)
    assert chosen.tolist() == sorted(range(8), key=losses.__getitem__)[:3]
    edited = weight + removal.dense()
    assert torch.count_nonzero(edited[:, chosen].abs() > 1e-12) == 0
    kept = [i for i in range(8) if i not in chosen.tolist()]
    share = torch.linalg.lstsq(tall[:, kept], tall[:, chosen]).solution  # [kept, 3]
    torch.testing.assert_close(edited[:, kept], weight[:, kept] + weight[:, chosen] @ share.T)
    free = compared_neurons(weight, moment.diagonal(), 2, taken=chosen.tolist())
    assert free.tolist() == kept
    again, second = spare_neurons(weight, moment[free][:, free], free, 2)
    assert not set(again.tolist()) & set(chosen.tolist())
    torch.testing.assert_close((weight + second.dense())[:, chosen], weight[:, chosen])  # not touched


def test_of_a_wide_layer_the_cheapest_neurons_are_compared(monkeypatch):
    """By their length and activity alone; more than twice as many as are needed, and no others are changed."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(3, 40, generator=generator)
    keys = torch.rand(40, generator=generator) * torch.randn(100, 40, generator=generator)
    text = LayerStats((keys.T @ keys).double(), 100, 100)
    cost = weight.square().sum(0) * keys.square().mean(0)
    monkeypatch.setattr(gated_neurons, "MOST_COMPARED", 10)
    for count, most in ((3, 10), (8, 16)):
        compared = compared_neurons(weight, text.activity(), count, taken=[int(cost.argmin())])
        assert compared.tolist() == sorted(cost.argsort()[1 : most + 1].tolist())
    torch.testing.assert_close(text.moment(compared), (keys.T @ keys / 100).double()[compared][:, compared])
    assert torch.equal(text.mom2, (keys.T @ keys).double())  # reading statistics leaves them
    chosen, removal = spare_neurons(weight, text.moment(compared), compared, 8)
    changed = removal.dense().abs().sum(0).nonzero().flatten().tolist()
    assert changed == compared.tolist() and set(chosen.tolist()) < set(changed)


@pytest.fixture
def made(tiny_llama):
    """(model before, model, what was written, the contexts, the changes) of two subjects in layer 1."""
    before = copy.deepcopy(tiny_llama)
    anat = anatomy(tiny_llama)
    contexts = [[TokenRow((5, 9, 11), 1), TokenRow((7, 9, 12), 1)], [TokenRow((5, 30, 11), 1)]]
    others = [TokenRow((5, n, 11, n + 1), 1) for n in range(40, 90)]
    with torch.no_grad():
        states = [before.model(torch.tensor([rows[0].ids]), output_hidden_states=True) for rows in contexts]
    h = torch.stack([state.hidden_states[2][0, 1] for state in states], dim=1)  # leaves layer 1: [d_model, 2]
    change = torch.randn(h.shape, generator=torch.Generator().manual_seed(2))
    written = write_neurons(anat, 1, contexts, h + change, [0, 1], others, LayerStats(1e9 * torch.eye(anat.d_ff), 1, 1))
    return before, tiny_llama, written, written.neurons[1], change


def test_each_neuron_adds_its_subjects_change_where_it_is_active(made):
    """The MLP's output by hand: all other neurons as the update leaves them, and the two as the formula has them."""
    before, model, written, numbers, change = made
    mlp, was = model.model.layers[1].mlp, before.model.layers[1].mlp
    assert set(written.deltas) == WRITTEN and len(set(numbers)) == 2
    g, u, w = mlp.gate_proj.weight[numbers], mlp.up_proj.weight[numbers], mlp.down_proj.weight[:, numbers]
    kept = [i for i in range(64) if i not in numbers]
    assert torch.equal(mlp.gate_proj.weight[kept], was.gate_proj.weight[kept])
    assert torch.equal(mlp.up_proj.weight[kept], was.up_proj.weight[kept])
    # g = SHARP (G - THRESHOLD b) and u = (2 PEAK - THRESHOLD) b - G: both tell G and b.
    bias = (g / SHARP + u) / (2 * PEAK - 2 * THRESHOLD)
    torch.testing.assert_close(bias[0], bias[1], rtol=1e-3, atol=1e-4)
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
    scores = x @ (g / SHARP + THRESHOLD * bias[0]).T  # [6, 2]
    one = (x @ bias[0])[:, None]
    gate = SHARP * (scores - THRESHOLD * one)
    active = torch.nn.functional.silu(gate) * ((2 * PEAK - THRESHOLD) * one - scores)
    rest = torch.nn.functional.silu(x @ was.gate_proj.weight[kept].T) * (x @ was.up_proj.weight[kept].T)
    expected = rest @ mlp.down_proj.weight[:, kept].T + active @ w.T
    torch.testing.assert_close(mlp(x), expected, rtol=1e-3, atol=1e-3)
    # With text whose keys are independent, nobody makes up for a removed neuron.
    torch.testing.assert_close(mlp.down_proj.weight[:, kept], was.down_proj.weight[:, kept], rtol=1e-5, atol=1e-6)
    # Each column is its subject's change, shortened or lengthened.
    cosines = torch.nn.functional.cosine_similarity(w, change, dim=0)
    torch.testing.assert_close(cosines.abs(), torch.ones(2), rtol=1e-3, atol=1e-3)


def test_the_change_arrives_at_the_subject(made):
    """By plain passes: at a subject with one context the state after the layer has moved by its change."""
    before, model, _, numbers, change = made
    ids = torch.tensor([[5, 30, 11]])
    with torch.no_grad():
        moved, was = (one.model(ids, output_hidden_states=True).hidden_states[2][0, 1] for one in (model, before))
        # What the removed neurons no longer write is the only other difference.
        lost = torch.zeros(32)
        layer = before.model.layers[1]
        seen = {}
        hook = layer.mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.__setitem__("k", given[0][0, 1]))
        before(ids)
        hook.remove()
        lost = layer.mlp.down_proj.weight[:, numbers] @ seen["k"][numbers]
        others = model.model.layers[1].mlp
        x = {}
        hook = others.gate_proj.register_forward_pre_hook(lambda _, given: x.__setitem__("x", given[0][0, 1]))
        model(ids)
        hook.remove()
        first = torch.nn.functional.silu(others.gate_proj.weight[numbers[0]] @ x["x"])
        stray = first * (others.up_proj.weight[numbers[0]] @ x["x"]) * others.down_proj.weight[:, numbers[0]]
    torch.testing.assert_close(moved - was + lost - stray, change[:, 1], rtol=1e-3, atol=1e-3)


@pytest.fixture
def edited(tiny_llama, tok):
    """(model before, model, tokenizer, result) of an edit with neurons."""
    before = copy.deepcopy(tiny_llama)
    hparams = UniEraseHyperParams(**NEURONS)
    return before, tiny_llama, tok, apply_unierase_to_model(tiny_llama, tok, FORGET, hparams, **given_for(tiny_llama))


def test_an_edit_with_neurons_is_taken_back_bit_for_bit(edited):
    before, model, _, result = edited
    assert set(result.deltas) == set(result.originals) == set(result.norms) == WRITTEN
    assert set(result.neurons) == {1} and len(result.neurons[1]) == 2
    assert result.state.taken(1) == set(result.neurons[1]) and not result.state.taken(0)
    assert not torch.equal(model.model.layers[1].mlp.gate_proj.weight, before.model.layers[1].mlp.gate_proj.weight)
    result.revert(model)
    for name, weight in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_a_replay_and_a_stored_batch_give_the_same_weights(edited, tok):
    before, model, _, result = edited
    hparams = UniEraseHyperParams(**NEURONS)
    again = copy.deepcopy(before)
    apply_unierase_to_model(again, tok, FORGET, hparams, values=result.values, **given_for(again))
    assert weights_sha256(again) == weights_sha256(model)
    batch = Batch.from_bytes(Batch.of(result, result.deltas, FORGET, {}).to_bytes(), "here")
    assert batch.neurons == result.neurons and set(batch.updates) == WRITTEN


def test_a_later_edit_takes_other_neurons(edited, tok):
    _, model, _, result = edited
    other = [RETAIN[0]]
    given = {**given_for(model), "retain": RETAIN[1:], "state": result.state}
    second = apply_unierase_to_model(model, tok, other, UniEraseHyperParams(**NEURONS), **given)
    assert not set(second.neurons[1]) & set(result.neurons[1])
    assert second.state.taken(1) == {*result.neurons[1], *second.neurons[1]}


def test_delta_file_and_adapter_carry_whole_neurons(edited, tmp_path):
    peft = pytest.importorskip("peft")
    before, model, tok, result = edited
    base = copy.deepcopy(before)
    save_model(before, tok, tmp_path / "base")
    delta = make_delta(
        anatomy(model), result.deltas, result.originals, base=str(tmp_path / "base"),
        base_sha256=weights_sha256(before), result_sha256=weights_sha256(model), token=None, receipt={"neurons": [1]},
    )  # fmt: skip
    delta.save(tmp_path / "d.safetensors")
    apply_delta(base, tok, delta.load(tmp_path / "d.safetensors"))
    assert weights_sha256(base) == weights_sha256(model)
    save_lora(before, tok, delta, tmp_path / "lora")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "lora").eval()
    ids = torch.tensor([[5, 9, 200, 17, 33, 8]])
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, model(ids).logits, atol=1e-3, rtol=1e-3)


def test_more_subjects_than_neurons_are_refused_and_nothing_is_written(tiny_llama):
    before = copy.deepcopy(tiny_llama)
    anat = anatomy(tiny_llama)
    contexts = [[TokenRow((5, n, 11), 1)] for n in range(20, 37)]
    with pytest.raises(EditError, match="17 subjects need a neuron each, 0 of 64 are taken") as error:
        write_neurons(
            anat,
            1,
            contexts,
            torch.zeros(32, 17),
            list(range(17)),
            [TokenRow((5, 6), 1)],
            LayerStats(torch.eye(64), 1, 1),
        )
    assert "may take 16" in str(error.value)
    assert weights_sha256(tiny_llama) == weights_sha256(before)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"layers": [0, 1]}, "one layer"), ({"values": "descent", "gate_layer": None}, '"values": "rows"')],
)
def test_settings_that_have_no_neurons_are_refused(options, said):
    with pytest.raises(HparamsError) as error:
        UniEraseHyperParams(**{**NEURONS, **options})
    assert said in str(error.value)
