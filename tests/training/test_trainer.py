"""The trainer against plain torch, its determinism, and going on after a crash."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from editlib.errors import EditError, HparamsError, OutputError
from editlib.models.anatomy import anatomy
from editlib.models.prompts import TokenRow
from editlib.models.weights import weights_sha256
from editlib.training import Checkpoint, Part, TrainSettings, answer_nll, answered, mean_loss, read, text_rows, train
from editlib.training.reading import passes
from editlib.training.weights import trainable

PLAIN = TrainSettings(learning_rate=1e-3, steps=6, batch_size=3, warmup_steps=0, precision="float32")


def items(draw, *lengths, learned=3, same=4):
    return [(TokenRow(row.ids, 0, learned),) for row in draw(*lengths, same=same)]


def reference_nll(model, rows):
    """Mean NLL of the learned tokens of all rows, by plain transformers, a row at a time."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row.ids])
        logits = model(ids).logits[0, -row.extra - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, -row.extra :], reduction="sum")
        count += row.extra
    return total / count


def test_a_reading_and_its_gradient_are_those_of_plain_transformers(anat, draw):
    """A shared beginning that is run once passes its gradient on."""
    some = items(draw, 12, 9, 15)
    model, rows = anat.model, [row for item in some for row in item]
    model.requires_grad_(True)
    wanted = reference_nll(model, rows)
    wanted.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    got = answer_nll(read(anat, some, range(3))).sum() / 9
    got.backward()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-5, msg=name)


def test_rows_that_share_part_of_their_answers_are_read_whole(anat):
    rows = [TokenRow((5, 6, 7, 8, 9), 1, 3), TokenRow((5, 6, 7, 8, 11), 1, 3)]
    reading = read(anat, [(row,) for row in rows], [0, 1])
    assert reading.wanted.tolist() == [7, 8, 9, 7, 8, 11] and reading.lengths.tolist() == [[3], [3]]
    with torch.no_grad():
        for row, got in zip(rows, reading.log_probs()[:, 0], strict=True):
            assert float(got) == pytest.approx(-3 * float(reference_nll(anat.model, [row])), rel=1e-4)


def test_states_are_those_where_the_answers_are_predicted(tiny_llama):
    anat, row = anatomy(tiny_llama), TokenRow((5, 6, 7, 8, 9), 1, 2)
    with torch.no_grad():
        wanted = tiny_llama(torch.tensor([row.ids]), output_hidden_states=True).hidden_states[3][0, 2:4]
        other = TokenRow((5, 6, 7, 30, 31, 32), 1, 2)
        got = read(anat, [(row,), (other,)], [0, 1], layer=2).out[:2]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_steps_are_those_of_plain_adamw(tiny_llama, draw):
    """The same batches through transformers and torch's own AdamW end at the same weights, however they are cut."""
    import copy

    some = items(draw, 12, 9, 15, 8, 11)
    settings = replace(PLAIN, warmup_steps=2, weight_decay=0.1, max_grad_norm=0.5)
    part = Part("pairs", some, answer_nll)
    model = copy.deepcopy(tiny_llama).requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.1)
    losses = []
    for step in range(6):
        loss = reference_nll(model, [some[i][0] for i in part.batch(step, 3, 0)])
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.param_groups[0]["lr"] = 1e-3 * min((step + 1) / 3, 1.0)
        optimiser.step()
    anat = anatomy(tiny_llama)
    result = train(anat, [part], dict(tiny_llama.named_parameters()), settings)
    assert result.losses == pytest.approx(losses, rel=1e-3)
    for (name, got), wanted in zip(tiny_llama.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, wanted.detach(), rtol=1e-2, atol=2e-4, msg=name)
    assert result.parameters == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        assert mean_loss(anat, part) == pytest.approx(
            float(reference_nll(tiny_llama, [item[0] for item in some])), rel=0.02
        )


def test_batches_go_through_every_item_before_any_comes_again(draw):
    part = Part("pairs", items(draw, *[6] * 10), answer_nll)
    seen = [i for step in range(5) for i in part.batch(step, 4, 3)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert seen == [i for step in range(5) for i in part.batch(step, 4, 3)]
    assert part.batch(0, 4, 4) != part.batch(0, 4, 3)
    assert len(replace(part, share=0.5).batch(0, 4, 0)) == 2 and len(part.batch(0, 99, 0)) == 10


def test_passes_keep_to_their_limits(draw):
    some = items(draw, *range(5, 30))
    cut = passes(some, range(25), tokens=100, learned=12)
    assert sorted(i for numbers in cut for i in numbers) == list(range(25)) and len(cut) > 5
    for numbers in cut:
        assert len(numbers) * max(len(some[i][0]) for i in numbers) <= 100 and 3 * len(numbers) <= 12
    assert passes(some, [24], tokens=1, learned=1) == [[24]]


def test_rates():
    settings = TrainSettings(learning_rate=1.0, steps=10, warmup_steps=4)
    assert [settings.rate(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    falling = replace(settings, decay="cosine")
    assert falling.rate(4) == pytest.approx(1.0) and falling.rate(9) == pytest.approx(0.1)
    assert replace(settings, decay="linear").rate(9) == pytest.approx(0.1)
    for name, value in {
        "learning_rate": -1.0,
        "max_grad_norm": 0,
        "steps": -1,
        "decay": "fast",
        "precision": "half",
    }.items():
        with pytest.raises(HparamsError, match=name):
            replace(settings, **{name: value})


def test_the_model_is_otherwise_as_it_was(tiny_gpt2, draw):
    """GPT-2 has dropout: in training mode the two runs would differ."""
    tiny_gpt2.train()
    next(tiny_gpt2.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in tiny_gpt2.parameters()]
    anat, some = anatomy(tiny_gpt2), items(draw, 8, 9, 10)
    weight = {"one": anat.mlp_output(1).weight}
    others = {name: p.clone() for name, p in tiny_gpt2.named_parameters() if p is not weight["one"]}
    before = weight["one"].detach().clone()
    losses = train(anat, [Part("p", some, answer_nll)], weight, PLAIN).losses
    assert [p.requires_grad for p in tiny_gpt2.parameters()] == flags and tiny_gpt2.training
    assert all(torch.equal(p, others[name]) for name, p in tiny_gpt2.named_parameters() if name in others)
    assert all(p.grad is None for p in tiny_gpt2.parameters())
    with torch.no_grad():
        weight["one"].copy_(before)
    assert train(anat, [Part("p", some, answer_nll)], weight, PLAIN).losses == losses


def test_a_loss_that_is_not_finite_stops(tiny_llama, draw):
    part = Part("pairs", items(draw, 8, 9), lambda reading: reading.log_probs()[:, 0] * float("nan"))
    with pytest.raises(EditError, match="not finite in step 1"):
        train(anatomy(tiny_llama), [part], dict(tiny_llama.named_parameters()), PLAIN)


def test_half_precision_weights_are_trained_in_fp32(tiny_llama, draw):
    """Steps below bf16's resolution add up, and are rounded once at the end."""
    import copy

    wide = copy.deepcopy(tiny_llama.bfloat16()).float()
    part = Part("pairs", items(draw, 8, 9, 10), answer_nll)
    small = replace(PLAIN, learning_rate=2e-5, steps=30)
    for model in (tiny_llama, wide):
        with trainable(anatomy(model)) as parameters:
            assert {p.dtype for p in parameters.values()} == {torch.float32}
            train(anatomy(model), [part], parameters, small)
    for got, wanted in zip(tiny_llama.parameters(), wide.parameters(), strict=True):
        assert got.dtype == torch.bfloat16 and torch.equal(got, wanted.bfloat16())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_is_merged(pristine, kind, draw):
    pytest.importorskip("peft")
    import copy

    model = copy.deepcopy(pristine[kind])
    anat, ids = anatomy(model), torch.tensor([[5, 6, 7, 8]])
    names, before = [name for name, _ in model.named_modules()], model(ids).logits.detach()
    part = Part("pairs", items(draw, 8, 9, 10), answer_nll)
    with trainable(anat, rank=2, seed=1) as parameters:
        assert parameters and all("lora" in name for name in parameters)
        train(anat, [part], parameters, replace(PLAIN, learning_rate=1e-2))
        with torch.no_grad():
            inside = model(ids).logits
    assert [name for name, _ in model.named_modules()] == names
    torch.testing.assert_close(model(ids).logits, inside, rtol=1e-3, atol=1e-4)
    assert (inside - before).abs().max() > 0.1
    sha = weights_sha256(model)
    with pytest.raises(KeyError), trainable(anat, rank=2, seed=1) as parameters:
        train(anat, [part], parameters, PLAIN)
        raise KeyError
    assert weights_sha256(model) == sha


def test_rows_of_questions_and_text(tok_chat):
    row = answered(tok_chat, "Where?", "In Bonn.")
    text = tok_chat.decode(row.ids)
    assert text.endswith("<|im_start|>assistant\nIn Bonn.<|im_end|>")
    assert tok_chat.decode(row.ids[-row.extra :]) == "In Bonn.<|im_end|>"
    rows = list(text_rows(tok_chat, ["The river Rhine flows through Basel. " * 5], 8))
    assert rows and all(len(row) == 8 and row.extra == 7 for row in rows)


# --- going on


def job(path, steps=12):
    """The run that the crash test kills; also called by it."""
    from tiny_models import make_llama, row_maker

    model = make_llama()
    rows = [TokenRow(row.ids, 0, 3) for row in row_maker()(12, 9, 15, 8, 11, same=4)]
    part = Part("pairs", [(row,) for row in rows], answer_nll)
    settings = TrainSettings(learning_rate=1e-3, steps=steps, batch_size=2, precision="float32")
    checkpoint = Checkpoint(path, {"job": "a"}, seconds=0.0)

    def slow(_):
        time.sleep(float(os.environ.get("SLOW", "0")))

    parameters = dict(model.named_parameters())
    result = train(
        anatomy(model), [part], parameters, settings, checkpoint=checkpoint, watch=slow, watched=range(steps + 1)
    )
    return weights_sha256(model), result.losses


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    whole = job(tmp_path / "whole.safetensors")
    path = tmp_path / "killed.safetensors"
    code = f"from test_trainer import job; from pathlib import Path; job(Path({str(path)!r}))"
    places = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")]), "SLOW": "0.3"}
    child = subprocess.Popen([sys.executable, "-c", code], env=env)
    until = time.monotonic() + 60
    while not path.exists() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.5)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert child.returncode == -signal.SIGKILL and path.exists()
    assert any(name.startswith("mean.") for name in load_file(path))
    assert job(path) == whole
    assert job(path)[0] == whole[0]  # nothing left to do


def test_another_jobs_checkpoint_is_refused(tmp_path, tiny_llama):
    job(tmp_path / "one.safetensors", steps=2)
    optimiser = torch.optim.AdamW(tiny_llama.parameters())
    parameters = dict(tiny_llama.named_parameters())
    with pytest.raises(OutputError, match="another job"):
        Checkpoint(tmp_path / "one.safetensors", {"job": "b"}).load(parameters, optimiser)
    (tmp_path / "one.safetensors").write_bytes(b"torn")
    with pytest.raises(OutputError, match="damaged"):
        Checkpoint(tmp_path / "one.safetensors", {"job": "a"}).load(parameters, optimiser)
