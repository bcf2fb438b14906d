"""`editlib edit` and `editlib algorithms`, judged by plain transformers on the folder."""

import json

import pytest
import torch
from test_cli import refused
from transformers import AutoModelForCausalLM, AutoTokenizer

from editlib.hparams import ALGORITHMS
from editlib.requests.reading import read_requests, requests_hash

FACTS = [
    {"id": "a", "prompt": "The capital of {} is", "subject": "France", "target_new": "Rome", "answer": "Paris"},
    {"case_id": 7, "requested_rewrite": {
        "prompt": "In {} people speak", "subject": "Peru", "relation_id": "P1",
        "target_new": {"str": "Basel", "id": "Q1"}, "target_true": {"str": "Bonn", "id": "Q2"}},
     "paraphrase_prompts": [], "neighborhood_prompts": []},
]  # fmt: skip
OPTIONS = {"context_templates": ["{}", "So. {}"], "v_num_grad_steps": 20, "v_lr": 0.3, "mom2_update_weight": 0.01}


@pytest.fixture
def facts(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(FACTS))
    return path


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(
        "\n\n".join(f"The river {i} flows through Basel and Bonn before it meets the sea." for i in range(60))
    )
    return path


def settings(tmp_path, algorithm, **values):
    path = tmp_path / algorithm / "tiny.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values))
    return path


def nll(folder, prompt, answer):
    model, tok = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids, new = tok(prompt)["input_ids"], tok(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids + new])).logits[0].log_softmax(-1)
    return -sum(float(logits[len(ids) - 1 + j, token]) for j, token in enumerate(new)) / len(new)


@pytest.mark.parametrize("name", ["FT", "ROME", "MEMIT", "MEMIT_seq", "EMMET", "NAS", "RECT", "PRUNE", "AlphaEdit"])
def test_edits_with_every_algorithm(call, folder, facts, corpus, tmp_path, name):
    if name == "FT":
        given = {"layers": [2], "lr": 0.02, "norm_constraint": 0.2, "num_steps": 20}
    elif name == "AlphaEdit":
        given = {k: v for k, v in OPTIONS.items() if k != "mom2_update_weight"}
        given |= {"layers": [1, 2], "nullspace_threshold": 0.9, "nullspace_rule": "dimensions", "L2": 1e-3}
    else:
        given = {"layers": [2] if name == "ROME" else [1, 2], **OPTIONS}
    path, out = settings(tmp_path, name, **given), tmp_path / "out"
    args = ["--requests", facts, "--hparams", path, "--out", out, "--corpus", corpus, "--stats-dir", tmp_path / "stats"]
    code, said, err = call("edit", folder, *args)
    assert code == 0, err
    assert f"{name}: 2 requests" in said
    receipt = json.loads((out / "editlib.json").read_text())
    assert receipt["algorithm"] == name and receipt["token"] is None and len(receipt["requests"]) == 2
    assert "facts of" in (out / "README.md").read_text() and "token" not in (out / "README.md").read_text()
    assert (tmp_path / "stats").exists() == (name != "FT")
    before, after = (AutoModelForCausalLM.from_pretrained(some).state_dict() for some in (folder, out))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in given["layers"]}
    asked = (("The capital of France is", " Rome"), ("In Peru people speak", " Basel"))
    old, new = (sum(nll(some, *fact) for fact in asked) for some in (folder, out))
    assert new < old - 0.1
    again, delta, applied = tmp_path / "again", tmp_path / "edit.safetensors", tmp_path / "applied"
    assert call("edit", folder, *[again if arg is out else arg for arg in args], "--delta", delta)[0] == 0
    assert json.loads((again / "editlib.json").read_text())["result_sha256"] == receipt["result_sha256"]
    code, said, err = call("apply", folder, delta, "--out", applied)
    assert code == 0 and receipt["result_sha256"][:12] in said, err
    for path in again.iterdir():
        assert (applied / path.name).read_bytes() == path.read_bytes(), path.name
    code, said, err = call("lora", delta, "--base", folder, "--out", tmp_path / "lora", "--rank", 4)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert code == 0 and config["r"] <= 4 and len(config["target_modules"]) == len(given["layers"]), err
    assert ("exact" in said) == (config["r"] < 4 and name not in ("FT", "RECT"))


def test_rows_that_were_left_out_are_in_the_receipt(call, folder, tmp_path):
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps([FACTS[0], {"prompt": "No subject {} here"}, {"prompt": 7}]))
    path = settings(tmp_path, "FT", layers=[2], lr=0.02, norm_constraint=0.2, num_steps=1)
    out = tmp_path / "out"
    args = ["--requests", facts, "--hparams", path, "--out", out, "--skip-bad"]
    code, _, err = call("edit", folder, *args)
    assert code == 0, err
    receipt = json.loads((out / "editlib.json").read_text())
    assert receipt["left_out"] == {"facts.json": ["row 2", "row 3"]} and len(receipt["requests"]) == 1


def test_settings_without_a_name_need_one(call, folder, facts, tmp_path):
    path = tmp_path / "h.json"
    path.write_text(json.dumps({"layers": [1]}))
    args = ["--requests", facts, "--hparams", path, "--out", tmp_path / "out"]
    refused(call("edit", folder, *args), "h.json", "--algorithm")
    refused(call("edit", folder, *args, "--algorithm", "MEMITT"), "MEMITT", '"MEMIT"')
    assert not (tmp_path / "out").exists()


def test_bad_input_writes_nothing(call, folder, facts, tmp_path):
    out = tmp_path / "out"

    def run(*args):
        return call("edit", folder, "--out", out, "--stats-dir", tmp_path / "stats", *args)

    refused(run("--requests", facts, "--hparams", "MEMIT/llama-3-8b"), "layer 5", "0-4")
    other = settings(tmp_path, "ROME", layers=[1], v_loss_layer=31)
    refused(run("--requests", facts, "--hparams", other), "v_loss_layer", "layer 31", "another depth")
    refused(run("--requests", facts, "--hparams", "MEMIT/lama"), "no bundled hparams for MEMIT")
    deep = settings(tmp_path, "AlphaEdit", layers=[1, 40])
    refused(run("--requests", facts, "--hparams", deep), "layer 40", "0-4")
    ask = tmp_path / "ask.jsonl"
    ask.write_text(json.dumps({"id": "q", "prompt": "What is the capital of {}?", "subject": "France"}) + "\n")
    fine = settings(tmp_path, "MEMIT", layers=[1])
    refused(run("--requests", ask, "--hparams", fine), "ask.jsonl:1", '"target_new"', "UniErase")
    refused(run("--requests", facts, "--hparams", fine, "--delta", facts), "facts.json", "--overwrite")
    refused(run("--requests", facts, "--hparams", fine, "--delta", tmp_path), "is a folder")
    refused(call("apply", folder, facts, "--out", out), "facts.json", "not a delta file")
    refused(call("lora", facts, "--base", folder, "--out", out), "facts.json", "not a delta file")
    refused(call("lora", facts, "--base", folder, "--out", out, "--rank", 0), "--rank 0")
    assert not out.exists() and not (tmp_path / "stats").exists()


def test_a_subject_is_guessed_as_unlearn_guesses_it(call, folder, tmp_path):
    asked, out = tmp_path / "ask.jsonl", tmp_path / "out"
    rows = [
        {"id": "a", "prompt": "The capital of France is", "target_new": "Rome"},
        {"id": "b", "prompt": "Who rules the United States of America?", "target_new": "Bonn"},
        {"id": "c", "prompt": "The river of {} is", "subject": "Peru", "target_new": "Rhine"},
    ]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = settings(tmp_path, "MEMIT", layers=[1])
    common = ["--requests", asked, "--out", out, "--stats-dir", tmp_path / "stats"]
    refused(call("edit", folder, *common, "--hparams", path, "--last-token"), "--last-token is for UniErase", "MEMIT")
    place = settings(tmp_path, "FT", layers=[2], lr=0.02, norm_constraint=0.2, num_steps=1)
    code, _, err = call("edit", folder, *common, "--hparams", place)
    receipt = json.loads((out / "editlib.json").read_text())
    assert code == 0 and "guessed_subjects" not in receipt, err  # it edits at every prompt's last token
    rome = settings(tmp_path, "ROME", **{**OPTIONS, "layers": [2], "v_num_grad_steps": 1, "mom2_adjustment": False})
    code, _, err = call("edit", folder, *common, "--hparams", rome, "--overwrite")
    assert code == 0, err
    receipt = json.loads((out / "editlib.json").read_text())
    assert receipt["guessed_subjects"] == {"a": "France", "b": "United States of America"}
    assert receipt["requests_sha256"] == requests_hash(read_requests(asked))
    asked.write_text(json.dumps({**rows[0], "prompt": "Who wrote Romeo and Juliet?"}) + "\n")
    told = call("edit", folder, *common, "--hparams", path, "--overwrite")
    refused(told, "ask.jsonl:1", "'Romeo', 'Juliet'", 'add "subject"')
    assert "--last-token" not in told[2]


def test_the_list_of_algorithms(call):
    code, said, _ = call("algorithms")
    assert code == 0
    for name, kind in ALGORITHMS.items():
        assert name in said and kind.paper.split(",")[0] in said


def test_statistics_are_made_and_shown(call, folder, corpus, tmp_path):
    place, plot = tmp_path / "stats", tmp_path / "spectrum.svg"
    args = ["--stats-dir", place, "--corpus", corpus]
    code, _, err = call("stats", folder, "--layers", "1-2", "--tokens", "200", *args)
    assert code == 0, err
    assert len(list(place.rglob("*.npz"))) == 2
    code, shown, err = call("stats", "show", folder, "--stats-dir", place, "--plot", plot)
    assert code == 0, err
    assert shown.count("200") >= 2 and "64" in shown and plot.exists()
