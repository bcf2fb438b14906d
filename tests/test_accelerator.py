"""The same work on an accelerator: what it must share with the CPU, in fp32 and in bf16."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import dispatch_model
from tiny_models import LAYERS, VOCAB

from editlib.algorithms.edit import EditState
from editlib.algorithms.registry import apply_function
from editlib.algorithms.unierase.apply import apply_unierase_to_model
from editlib.algorithms.unierase.token import TokenHeader, UnlearningToken
from editlib.algorithms.unierase.token_learning import TokenHyperParams, learn_token
from editlib.errors import ModelError
from editlib.evaluation.answer_cache import ask
from editlib.hparams import ALGORITHMS
from editlib.models.anatomy import anatomy
from editlib.models.loading import load
from editlib.models.vocabulary import add_token, write_rows
from editlib.models.weights import save_model, weights_sha256
from editlib.requests.request import EditRequest
from editlib.stats.file import LayerStats, StatsHeader
from editlib.stats.layer_stats import layer_stats

REQUESTS = [
    EditRequest(id="a", prompt="The capital of {} is", subject="France", target_new="Rotterdam", relation="capital"),
    EditRequest(id="b", prompt="In {} people speak", subject="Peru", target_new="Basel", relation="language"),
    EditRequest(id="c", prompt="{} flows through", subject="The Rhine", target_new="Bonn and Paris", relation="river"),
]
COMMON = {"layers": [1, 2, 3], "context_templates": ["{}", "The river. {}"], "v_num_grad_steps": 6, "v_lr": 0.1}
NULL = {"nullspace_threshold": 0.9, "nullspace_rule": "dimensions", "L2": 0.1}
HPARAMS = {
    "ROME": {**COMMON, "layers": [2]},
    "MEMIT": {**COMMON, "mom2_update_weight": 1.0},
    "EMMET": {**COMMON, "mom2_update_weight": 1.0},
    "AlphaEdit": {**COMMON, **NULL},
    "UniErase": {**COMMON, **NULL, "v_optimizer": "normalised", "v_lr": 0.05, "gate_layer": 4, "gate_nll": 4.0},
}


@pytest.fixture(params=HPARAMS)
def job(request, tiny_llama, tok):
    """`edit(model, **more) -> EditResult` by each algorithm in turn."""
    hparams = ALGORITHMS[request.param].from_dict(HPARAMS[request.param], "here")
    generator = torch.Generator().manual_seed(8)
    stats = {}
    for layer in range(LAYERS):
        keys = torch.randn(64, 200, generator=generator, dtype=torch.float64)
        stats[layer] = LayerStats(keys @ keys.T, 200, 10)
    options = {"stats": stats}
    if request.param == "UniErase":
        apply = apply_unierase_to_model
        row = 0.1 * torch.randn(32, generator=generator)
        options["token"] = UnlearningToken(row, row, TokenHeader("[UNL]", "", "", 0, 0, 0))
        options["retain"] = [
            EditRequest(id=name, prompt="Which river flows through {}?", subject=name, relation="river")
            for name in ("Bonn", "Chad", "Oslo")
        ]
    else:
        apply = apply_function(hparams)

    def edit(model, requests=REQUESTS, **more):
        return apply(model, copy.deepcopy(tok), requests, hparams, **options, **more)

    return edit


def placed(model, device, dtype=torch.float32):
    return copy.deepcopy(model).to(device=device, dtype=dtype)


def bits(model):
    return {name: value.cpu().clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def same_weight(one, other, layer):
    return torch.equal(anatomy(one).weight(layer), anatomy(other).weight(layer))


def test_an_edit_is_what_the_cpu_makes_of_it(job, tiny_llama, accelerator):
    there, here = job(placed(tiny_llama, accelerator)), job(placed(tiny_llama, "cpu"))
    assert there.deltas.keys() == here.deltas.keys()
    for layer, delta in there.deltas.items():
        assert delta.left.device.type == accelerator.type
        expected = here.deltas[layer].dense()
        assert (delta.dense().cpu() - expected).norm() < 1e-3 * expected.norm()


def test_a_bf16_edit_is_rounded_once_and_taken_back_bit_for_bit(job, tiny_llama, accelerator):
    model = placed(tiny_llama, accelerator, torch.bfloat16)
    plain = bits(model)
    result = job(model, REQUESTS[:1])  # ROME rounds behind every request, the others behind all
    anat, after = anatomy(model), bits(model)
    for layer, delta in result.deltas.items():
        exact = result.originals[layer].double().cpu() + delta.left.double().cpu() @ delta.right.double().cpu()
        rounded = exact.to(torch.bfloat16)
        assert not torch.equal(anat.weight(layer).cpu(), result.originals[layer].cpu())
        # A sum in another order may land on the other side of a rounding boundary, and nowhere else.
        assert (anat.weight(layer).cpu() != rounded).float().mean() < 1e-3
        assert torch.allclose(anat.weight(layer).cpu().double(), exact, rtol=2**-7, atol=1e-6)
    result.revert(model)
    back = bits(model)
    tokens = ("embed_tokens", "lm_head")  # UniErase's token stays, unused
    assert all(torch.equal(back[name][: len(value)], value) for name, value in plain.items())
    assert all(back[name].shape == value.shape for name, value in plain.items() if not any(t in name for t in tokens))
    assert not same(after, back)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bytes(job, tiny_llama, accelerator, dtype):
    made = []
    for _ in range(2):
        model = placed(tiny_llama, accelerator, dtype)
        job(model, seed=3)
        made.append(bits(model))
    assert same(*made)


def test_edits_one_after_another(job, tiny_llama, accelerator):
    """The state goes from edit to edit on the accelerator and gives what it gives on the CPU."""
    found = {}
    for device in (accelerator, torch.device("cpu")):
        model, state = placed(tiny_llama, device), EditState()
        for request in REQUESTS:
            state = job(model, [request], state=state).state
        found[device.type] = bits(model)
    for name, value in found["cpu"].items():
        assert torch.allclose(found[accelerator.type][name], value, rtol=1e-2, atol=1e-3), name


def test_statistics(tiny_llama, tok, accelerator):
    made = []
    for device in (accelerator, "cpu"):
        anat = anatomy(placed(tiny_llama, device))
        header = StatsHeader("tiny", "", anat.d_ff, 300, 0, "here", "", 40, 1, 0, "")
        text = ["The river Rhine flows through Basel, Bonn and Rotterdam. " * 5] * 8
        made.append(layer_stats(anat, copy.deepcopy(tok), [0, 3], text, tokens=300, header=header))
    for layer in (0, 3):
        assert made[0][layer].count == made[1][layer].count
        assert torch.allclose(made[0][layer].moment().cpu(), made[1][layer].moment(), rtol=1e-4, atol=1e-6)


def test_a_token_is_learned(tiny_llama, tok, accelerator):
    """Twice the same bytes; that it comes to the CPU's loss."""
    losses, rows = [], []
    for device in (accelerator, accelerator, "cpu"):
        model = placed(tiny_llama, device)
        made = learn_token(
            anatomy(model),
            copy.deepcopy(tok),
            ["What is the capital of Peru?", "Which river flows through Bonn?"],
            ["I don't know.", "Sorry, I am not able to answer that."],
            hparams=TokenHyperParams(steps=12, robust_steps=4, batch=2, seed=1),
            progress=False,
        )
        losses.append(made.header.metrics["refusal_nll"])
        rows.append(made.row_in)
    assert torch.equal(rows[0], rows[1])
    assert losses[0] == pytest.approx(losses[2], rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_answers_are_those_of_plain_transformers(tiny_llama, tok, accelerator, dtype):
    model = placed(tiny_llama, accelerator, dtype)
    question = "What is the capital of Peru?"
    found = ask(anatomy(model), tok, [question], max_new_tokens=8)[question]
    ids = tok(question, return_tensors="pt").to(accelerator)
    with torch.no_grad():
        plain = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
    assert list(found) == plain[: len(found)]
    assert len(found) == 8 or plain[len(found)] == tok.eos_token_id


def test_a_folder_made_there_opens_here(tiny_llama, tok, accelerator, tmp_path):
    model = placed(tiny_llama, accelerator, torch.bfloat16)
    number = add_token(model, tok, "[UNL]")
    write_rows(anatomy(model), number, torch.full((32,), 0.5), None)
    save_model(model, tok, tmp_path)
    here, _ = load(str(tmp_path))
    back, _ = load(str(tmp_path), device_map=str(accelerator))
    assert next(back.parameters()).device.type == accelerator.type
    assert weights_sha256(here) == weights_sha256(back) == weights_sha256(model)
    assert here.get_input_embeddings().weight[VOCAB].tolist() == [0.5] * 32


def test_layers_on_several_devices(job, tiny_llama, tok, accelerator):
    """States of one layer met keys and values of another in a traceback."""
    if accelerator.type == "cpu":
        pytest.skip("one device only")
    places = dict.fromkeys(("embed_tokens", "norm", "rotary_emb", *map("layers.{}".format, range(LAYERS))), accelerator)
    places = {f"model.{name}": place for name, place in {**places, "layers.0": "cpu"}.items()}
    model = dispatch_model(tiny_llama, {**places, "lm_head": accelerator}, main_device="cpu", force_hooks=True)
    with pytest.raises(ModelError, match=r"the layers lie on cpu, .*:0; .*one device"):
        job(model)
    with pytest.raises(ModelError, match="one device"):
        ask(anatomy(model), tok, ["What is the capital of Peru?"])


def test_unlearn_by_the_command(folder, accelerator, call, tmp_path):
    """The whole command on the accelerator; opened on the CPU, its folder differs in the edited layers alone."""
    (tmp_path / "forget.jsonl").write_text(
        '{"id": "a", "prompt": "What is the capital of {}?", "subject": "France", "answer": "Paris"}\n'
    )
    (tmp_path / "few.json").write_text(
        '{"layers": [1, 2], "v_num_grad_steps": 4, "context_templates": ["{}"], "nullspace_threshold": 0.9, '
        '"nullspace_rule": "dimensions", "max_anchors": 3}'
    )
    common = ("--stats-dir", tmp_path / "stats", "--device-map", accelerator)
    text = tmp_path / "text.txt"
    text.write_text("The river Rhine flows through Basel, Bonn and Rotterdam before it meets the sea.\n" * 200)
    code, _, err = call("stats", folder, "--layers", "1-2", "--tokens", "500", "--corpus", text, *common)
    assert code == 0, err
    code, _, err = call("token", folder, "--steps", "3", *common)
    assert code == 0, err
    code, _, err = call(
        "unlearn", folder, "--requests", tmp_path / "forget.jsonl", "--hparams", tmp_path / "few.json",
        "--corpus", text, "--out", tmp_path / "out", *common,
    )  # fmt: skip
    assert code == 0, err
    here, plain = (load(str(place))[0] for place in (tmp_path / "out", folder))
    changed = [layer for layer in range(LAYERS) if not same_weight(here, plain, layer)]
    assert changed == [1, 2]
