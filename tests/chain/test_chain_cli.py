"""`editlib chain ...` from the first day to the audit."""

import json

import pytest
import torch
from chain_cases import HPARAMS, RETAIN, A, B, C, files
from test_cli import refused
from transformers import AutoModelForCausalLM

from editlib.chain import Chain
from editlib.models.loading import load
from editlib.requests.reading import write_requests


@pytest.fixture
def job(base, tmp_path):
    """Files for the command line, and the arguments of `init`."""
    for name, requests in (("a", A), ("b", B), ("c", C), ("retain", RETAIN)):
        write_requests(tmp_path / f"{name}.jsonl", requests)
    (tmp_path / "UniErase").mkdir()
    settings = tmp_path / "UniErase" / "tiny.json"
    settings.write_text(json.dumps(HPARAMS["UniErase"]))
    options = ["--hparams", settings, "--retain", tmp_path / "retain.jsonl", "--token", base / "token.safetensors"]
    return tmp_path, ["--model", base / "tiny", "--stats-dir", base / "stats", *options]


def test_the_whole_life_of_a_chain(call, job, base):
    home, options = job
    folder = home / "chain"

    def chain(*args):
        code, said, err = call("chain", *args)
        assert code == 0, err
        return said

    assert "UniErase" in chain("init", folder, *options)
    for name in "abc":
        said = chain("add", folder, "--requests", home / f"{name}.jsonl")
        assert f"{name}1" in said
    assert "3 batches with 5 requests" in chain("verify", folder)
    found = json.loads(chain("status", folder, "--json"))
    assert (found["algorithm"], found["requests"], found["layers"]) == ("UniErase", 5, [1, 2])
    assert [batch["ids"] for batch in found["batches"]] == [["a1", "a2"], ["b1"], ["c1", "c2"]]
    assert "5 requests, 0 revoked" in chain("status", folder)
    assert "batch 3 is undone: c1, c2; 2 left" in chain("undo", folder)
    assert "revoked: a2; 2 requests left" in chain("revoke", folder, "a2")
    lines = chain("log", folder).splitlines()
    assert len(lines) == 3
    assert "batch 1" in lines[0] and lines[0].endswith("  a1") and "UniErase" in lines[0]
    assert "revoked from batch 1" in lines[2] and lines[2].endswith("a2")
    assert all(line.startswith("20") for line in lines)
    chain("verify", folder)
    chain("revoke", folder, "a1", "b1")
    model, tok = load(str(base / "tiny"))
    Chain.open(folder).apply_to(model, tok)
    plain = AutoModelForCausalLM.from_pretrained(base / "tiny").state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())


def test_bad_input_is_one_line(call, job, base, tmp_path):
    home, options = job
    folder = home / "chain"
    refused(call("chain", "status", folder), "is not a chain", "chain init")
    refused(call("chain", "init", folder, *options, "--token", home / "none"), "none", "editlib token")
    assert not folder.exists()
    call("chain", "init", folder, *options)
    refused(call("chain", "init", folder, *options), "holds a chain already", "chain add")
    refused(call("chain", "undo", folder), "nothing to undo")
    refused(call("chain", "add", folder, "--requests", home / "none.jsonl"), "none.jsonl")
    call("chain", "add", folder, "--requests", home / "a.jsonl")
    before = files(folder)
    refused(call("chain", "add", folder, "--requests", home / "a.jsonl"), "a.jsonl:1", "'a1' is in the chain already")
    refused(call("chain", "revoke", folder, "zz"), "'zz' is not in", "chain log")
    refused(call("chain", "verify", folder, "--model", tmp_path / "gone"), "gone: no such folder")
    assert files(folder) == before
    place = next((folder / "batches").iterdir())
    place.write_bytes(place.read_bytes()[:-1] + b"x")
    for command in ("verify", "status", "log", "undo"):
        refused(call("chain", command, folder), place.name, "damaged")


def test_ids_that_look_like_markup_are_shown(call, start):
    from dataclasses import replace

    chain = start("MEMIT")
    chain.add([replace(B[0], id="[red]b1")])
    for command in ("status", "log"):
        assert "[red]b1" in call("chain", command, chain.path)[1]
    assert "[red]b1" in call("chain", "undo", chain.path)[1]


def test_rows_that_were_left_out_stay_on_record(call, job, base):
    """In the chain, after a replay too, and in its receipt; a chain without any is written as it always was."""
    home, options = job
    folder = home / "chain"
    for name in ("a", "b", "retain"):
        with (home / f"{name}.jsonl").open("a") as file:
            file.write('{"prompt": 7}\n')
    rows = {name: [f"line {len((home / name).read_text().splitlines())}"] for name in ("a.jsonl", "retain.jsonl")}
    refused(call("chain", "init", folder, *options), "retain.jsonl:", "--skip-bad")
    assert call("chain", "init", folder, *options, "--skip-bad")[0] == 0
    refused(call("chain", "add", folder, "--requests", home / "a.jsonl"), "a.jsonl:3", "--skip-bad")
    for name in "abc":
        assert call("chain", "add", folder, "--requests", home / f"{name}.jsonl", "--skip-bad")[0] == 0
    assert call("chain", "revoke", folder, "a2")[0] == 0
    assert call("chain", "verify", folder)[0] == 0
    record = json.loads((folder / "chain.json").read_text())
    assert record["left_out"] == {"retain.jsonl": rows["retain.jsonl"]}
    assert [batch.get("left_out") for batch in record["batches"]] == [
        {"a.jsonl": rows["a.jsonl"]}, {"b.jsonl": ["line 2"]}, None,
    ]  # fmt: skip
    assert call("chain", "export", folder, "--out", home / "edited")[0] == 0
    receipt = json.loads((home / "edited" / "editlib.json").read_text())
    assert receipt["left_out"] == {**rows, "b.jsonl": ["line 2"]}
    found = json.loads(call("chain", "status", folder, "--json")[1])
    assert [batch["left_out"] for batch in found["batches"]][1:] == [{"b.jsonl": ["line 2"]}, {}]


def test_subjects_are_guessed_as_unlearn_guesses_them(call, job):
    """And on record: in the chain, after a replay too, and in its receipt."""
    home, options = job
    folder, asked = home / "chain", home / "ask.jsonl"
    assert call("chain", "init", folder, *options)[0] == 0
    rows = [{"id": "f", "prompt": "What is the capital of France?"}, {"id": "p", "prompt": "The capital of Peru is"}]
    unsure = {"id": "r", "prompt": "Who wrote Romeo and Juliet?"}

    def add(*lines, options=()):
        asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return call("chain", "add", folder, "--requests", asked, *options)

    before = files(folder)
    refused(add(rows[0], unsure), "ask.jsonl:2", "'Romeo', 'Juliet'", "--last-token")
    assert files(folder) == before
    assert add(*rows)[0] == 0
    assert add(unsure, options=["--last-token"])[0] == 0
    assert call("chain", "revoke", folder, "f")[0] == 0
    assert call("chain", "verify", folder)[0] == 0
    record = json.loads((folder / "chain.json").read_text())
    assert [batch.get("guessed_subjects") for batch in record["batches"]] == [{"p": "Peru"}, None]
    assert call("chain", "export", folder, "--out", home / "edited")[0] == 0
    assert json.loads((home / "edited" / "editlib.json").read_text())["guessed_subjects"] == {"p": "Peru"}


def test_last_token_is_for_unierase(call, start, tmp_path):
    chain = start("MEMIT")
    write_requests(tmp_path / "a.jsonl", A)
    before = files(chain.path)
    refused(call("chain", "add", chain.path, "--requests", tmp_path / "a.jsonl", "--last-token"), "is for UniErase")
    assert files(chain.path) == before
