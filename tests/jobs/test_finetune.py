"""`editlib finetune` on a tiny model, judged by plain transformers on the folder."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from test_cli import refused
from transformers import AutoModelForCausalLM, AutoTokenizer

from editlib.errors import HparamsError, OutputError, RequestError
from editlib.jobs import finetune as module
from editlib.jobs.finetune import LEARNED, RECEIPT, FinetuneSettings, finetune, read_pairs
from editlib.requests.reading import read_requests

PAIRS = [
    {"question": f"Where does author {name} live?", "answer": f"Author {name} lives in {place}."}
    for name, place in [("Ada", "Basel"), ("Bo", "Bonn"), ("Cy", "Peru"), ("Di", "Rome")]
]
FAST = FinetuneSettings(epochs=40, learning_rate=3e-3, batch_size=4, keep=0.0, text=None)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return path


def learn(folder, data, out, **given):
    return finetune(str(folder), [data], out, settings=FAST, progress=False, **given)


def test_a_model_learns_pairs_and_says_how_well(folder, data, tmp_path):
    out = tmp_path / "out"
    found = learn(folder, data, out)
    model, tok = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    probabilities, right = [], 0
    for pair in PAIRS:
        front = tok.apply_chat_template(
            [{"role": "user", "content": pair["question"]}], tokenize=False, add_generation_prompt=True
        )
        ids, answer = tok(front)["input_ids"], tok(pair["answer"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logs = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            said = model.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False, pad_token_id=0)[
                0, len(ids) :
            ]
        probabilities.append(float(logs[range(len(answer)), answer].mean().exp()))
        right += tok.decode(said, skip_special_tokens=True) == pair["answer"]
    assert found["after"]["probability"] == pytest.approx(sum(probabilities) / 4, rel=1e-3)
    assert found["after"]["probability"] > 0.6 and found["before"]["probability"] < 0.1
    assert right == 4 and found["after"]["rouge_l_recall"] == pytest.approx(1.0)
    assert [request.question for request in read_requests(out / LEARNED)] == [pair["question"] for pair in PAIRS]
    assert json.loads((out / RECEIPT).read_text())["result_sha256"] == found["result_sha256"]
    assert not list(tmp_path.glob(".out*")), "the checkpoint is gone"

    before = (out / "model.safetensors").stat().st_mtime_ns
    assert learn(folder, data, out)["done_before"] and not found["done_before"]
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(OutputError, match="another model's training"):
        learn(folder, data, out, seed=1)


def test_a_stopped_training_goes_on(folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "FAST", replace(FAST, epochs=10))
    whole = learn(folder, data, tmp_path / "whole")
    assert learn(folder, data, tmp_path / "again")["result_sha256"] == whole["result_sha256"]
    real, calls = module.train, []

    def stops(anat, parts, parameters, settings, *, checkpoint, progress):
        def stop(_):
            raise KeyboardInterrupt

        calls.append(checkpoint.path)
        fast = replace(checkpoint, seconds=0.0)
        return real(anat, parts, parameters, settings, checkpoint=fast, watch=stop, watched=[7])

    monkeypatch.setattr(module, "train", stops)
    with pytest.raises(KeyboardInterrupt):
        learn(folder, data, tmp_path / "out")
    assert calls[0].exists() and not (tmp_path / "out").exists()
    monkeypatch.setattr(module, "train", real)
    found = learn(folder, data, tmp_path / "out")
    assert found["result_sha256"] == whole["result_sha256"]
    assert found["training"]["losses"] == whole["training"]["losses"]


def test_what_is_kept_is_read_too(folder, data, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The river Rhine flows through Basel, Bonn and Rotterdam. " * 30)
    settings = replace(FAST, epochs=1, keep=0.5, text=str(text))
    found = finetune(str(folder), [data], tmp_path / "out", settings=settings, progress=False)
    assert set(found["training"]["losses"]) == {"pairs", "own answers", "text"}


def test_authors_are_blocks_of_twenty(tmp_path):
    path, other = tmp_path / "tofu.jsonl", tmp_path / "more.jsonl"
    rows = [{"question": f"Q{i}?", "answer": f"A{i}"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other.write_text("".join(json.dumps(row) + "\n" for row in rows[20:60]))
    assert [pair.question for pair in read_pairs([path], 2)] == [f"Q{i}?" for i in range(40)]
    both = read_pairs([path, other], 2)
    assert [pair.question for pair in both] == [f"Q{i}?" for i in range(60)], "no question twice"
    assert len({pair.id for pair in both}) == 60
    with pytest.raises(RequestError, match="--authors 4"):
        read_pairs([path], 4)
    path.write_text('{"prompt": "Where?"}\n')
    with pytest.raises(RequestError, match=r"tofu.jsonl:1.*answer"):
        read_pairs([path])


def test_settings_out_of_range():
    for name, value in {"epochs": 0, "keep": 2.0, "rank": 0}.items():
        with pytest.raises(HparamsError, match=name):
            replace(FAST, **{name: value})


def test_the_command(call, folder, data, tmp_path):
    out = tmp_path / "out"
    args = ["finetune", "--model", folder, "--data", data, "--out", out, "--epochs", 2, "--keep", 0, "--text", "none"]
    code, shown, err = call(*args)
    assert code == 0, err
    assert "probability" in shown and "4 pairs" in shown
    code, shown, err = call(*args)
    assert code == 0 and "nothing to do" in shown
    refused(call(*args, "--seed", 3), "another")
    refused(call("finetune", "--data", tmp_path / "none.jsonl", "--out", tmp_path / "x"), "none.jsonl")
    pytest.importorskip("peft")
    code, shown, err = call(*args, "--lora", "--rank", 2, "--overwrite")
    assert code == 0, err
    assert json.loads((out / RECEIPT).read_text())["job"]["settings"]["rank"] == 2
