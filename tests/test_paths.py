"""The main commands on a folder whose names have blanks, quotes and letters of several scripts; rows left out are on
record."""

import json
import shutil

import pytest
from tiny_models import SENTENCES, make_llama, train_tokenizer

from editlib.models.weights import save_model

PLACES = ("France", "Peru", "Chad")
GOOD = [
    {
        "id": f"{place}é", "prompt": "What is the capital of {}?", "subject": place, "answer": "Paris",
        "relation": "capital", "paraphrases": ["Which city is the capital of {}?"], "target_new": "Bonn",
    }
    for place in PLACES
]  # fmt: skip
HELD = [{"id": f"r{x}", "prompt": "Which river is in {}?", "subject": x, "answer": "Rhine"} for x in ("Bonn", "Mali")]
BAD = {"id": "b", "prompt": "No subject here", "subject": "Rome"}
NAME = "Mödel 模型 über'all & (1)"


def rows(path, values):
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, its edited copy, request files and settings under such names; not to be changed."""
    path = tmp_path_factory.mktemp("some") / "Ordner mit Leerzeichen – données"
    path.mkdir()
    model = path / NAME
    model.mkdir()
    save_model(make_llama(), train_tokenizer(chat=True), model)
    rows(path / "Fragen é 1.jsonl", [*GOOD, BAD])
    rows(path / "behalten ü.jsonl", [BAD, *HELD])
    (path / "Text ñ.txt").write_text("\n\n".join([" ".join(SENTENCES)] * 12))
    settings = {"layers": [1], "gate_layer": 2, "v_num_grad_steps": 2, "context_templates": ["{}"]}
    (path / "UniErase ß.json").write_text(json.dumps(settings))
    closed = {"layers": [1], "v_num_grad_steps": 2, "mom2_update_weight": 10, "context_templates": ["{}"]}
    (path / "MEMIT ß.json").write_text(json.dumps(closed))
    (path / "FT ß.json").write_text(json.dumps({"layers": [1], "num_steps": 1, "lr": 1e-2}))
    return path


@pytest.fixture
def run(home, call):
    """Runs a command that must succeed; gives what it said."""

    def ran(*arguments):
        code, told, said = call(*arguments)
        assert code == 0, said
        return told

    return ran


FILES = {"Fragen é 1.jsonl": ["line 4"], "behalten ü.jsonl": ["line 1"]}


def asked(home):
    return ["--requests", home / "Fragen é 1.jsonl", "--retain", home / "behalten ü.jsonl", "--skip-bad"]


def edited(home, run, out, *more):
    hparams = ["--algorithm", "FT", "--hparams", home / "FT ß.json"]
    run("edit", home / NAME, "--requests", home / "Fragen é 1.jsonl", *hparams, "--skip-bad", "--out", out, *more)
    return out


def test_asking_and_planning(home, run):
    assert "Wo ist Köln?" in run("ask", home / NAME, "Wo ist Köln?")
    assert run("plan", home / NAME)
    shown = run("subjects", rows(home / "à poser.jsonl", [{"question": "Where is Köln?", "answer": "here"}]))
    assert "Köln" in shown


def test_editing_measuring_attacking_and_handing_on(home, run, tmp_path):
    out, delta = tmp_path / "Aus gabe ö", tmp_path / "delta à.safetensors"
    edited(home, run, out, "--delta", delta)
    receipt = json.loads((out / "editlib.json").read_text())
    assert receipt["left_out"] == {"Fragen é 1.jsonl": ["line 4"]} and len(receipt["requests"]) == 3

    text = ["--text", home / "Text ñ.txt", "--before", tmp_path / "vorher ä.json"]
    run("eval", home / NAME, out, *asked(home), *text, "--out", tmp_path / "gemessen é")
    metrics = json.loads((tmp_path / "gemessen é" / "metrics.json").read_text())
    assert metrics["left_out"] == FILES

    fewer = ["--requests", home / "Fragen é 1.jsonl", "--control", home / "behalten ü.jsonl", "--skip-bad"]
    run("attack", home / NAME, out, *fewer, "--attacks", "paraphrase", "--out", tmp_path / "Angriff è")
    report = json.loads((tmp_path / "Angriff è" / "attacks.json").read_text())
    assert report["rows_left_out"] == FILES

    run("apply", home / NAME, delta, "--out", tmp_path / "noch mal ö")
    assert (tmp_path / "noch mal ö" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    run("lora", delta, "--base", home / NAME, "--out", tmp_path / "lora ö")
    run("receipt", out, "--out", tmp_path / "Beleg ö")


def test_unlearning_and_statistics(home, run, tmp_path):
    stats = ["--stats-dir", tmp_path / "Stat ö", "--corpus", home / "Text ñ.txt"]
    run("stats", home / NAME, "--layers", 1, "--tokens", 500, *stats)
    run(
        "unlearn", home / NAME, *asked(home), "--hparams", home / "UniErase ß.json", *stats,
        "--out", tmp_path / "ver gessen ö",
    )  # fmt: skip
    assert json.loads((tmp_path / "ver gessen ö" / "editlib.json").read_text())["left_out"] == FILES


def test_finetuning(home, run, tmp_path):
    run(
        "finetune", "--data", home / "Fragen é 1.jsonl", "--model", home / NAME, "--out", tmp_path / "ge lernt ö",
        "--epochs", 1, "--keep", 0, "--text", "none", "--skip-bad",
    )  # fmt: skip
    receipt = json.loads((tmp_path / "ge lernt ö" / "finetune.json").read_text())
    assert receipt["left_out"] == {"Fragen é 1.jsonl": ["line 4"]} and receipt["pairs"] == 3


def test_comparing(home, run, tmp_path):
    files = {"requests": str(home / "Fragen é 1.jsonl"), "retain": str(home / "behalten ü.jsonl"), "skip_bad": True}
    config = tmp_path / "Vergleich ö.json"
    plan = {
        "model": str(home / NAME), "stats_dir": str(tmp_path / "Stat ö"), "corpus": str(home / "Text ñ.txt"),
        "perplexity": str(home / "Text ñ.txt"), "sets": [{"protocol": "facts", **files}],
        "methods": ["none", {"method": "FT-refusal", "hparams": str(home / "FT ß.json")}],
    }  # fmt: skip
    config.write_text(json.dumps(plan), encoding="utf-8")
    run("compare", "--config", config, "--out", tmp_path / "Er gebnis ö")
    results = json.loads((tmp_path / "Er gebnis ö" / "results.json").read_text())
    assert results["sets"]["facts"]["left_out"] == FILES


def test_chaining(home, run, tmp_path):
    chain, stats = tmp_path / "Kette ö", ["--stats-dir", tmp_path / "Stat ö", "--corpus", home / "Text ñ.txt"]
    hparams = ["--algorithm", "MEMIT", "--hparams", home / "MEMIT ß.json"]
    run("chain", "init", chain, "--model", home / NAME, *hparams, *stats)
    run("chain", "add", chain, "--requests", home / "Fragen é 1.jsonl", "--skip-bad")
    run("chain", "verify", chain)
    run("chain", "export", chain, "--out", tmp_path / "Aus fuhr ö")
    run("ask", tmp_path / "Aus fuhr ö", "Who?")
    shutil.move(chain, tmp_path / "ander swo é")
    run("chain", "log", tmp_path / "ander swo é")
