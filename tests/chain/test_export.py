"""What a chain is handed on as, against its own model, plain transformers and plain peft."""

from __future__ import annotations

import json

import pytest
import torch
from chain_cases import RETAIN, A, B, C
from test_cli import refused
from transformers import AutoModelForCausalLM, AutoTokenizer

from editlib.chain import Chain
from editlib.chain.export import chain_delta, save_chain, save_chain_delta, save_chain_lora, save_chain_receipt
from editlib.errors import ChainError
from editlib.export import Delta, read_receipt
from editlib.export.apply import apply_delta_file
from editlib.models.weights import weights_sha256


@pytest.fixture
def chain(start, algorithm):
    """Three batches, of which a request of the first was revoked."""
    made = start(algorithm, **({"retain": RETAIN} if algorithm.startswith("UniErase") else {}))
    for some in (A, B, C):
        made.add(some)
    made.revoke(["a2"])
    return made


def test_the_folder_is_the_chains_model_and_so_is_the_delta_on_the_base(chain, base, tmp_path):
    sha256 = save_chain(chain, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    mine = chain.model.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in plain.state_dict().items())
    receipt = read_receipt(tmp_path / "out")
    assert receipt["result_sha256"] == sha256 == weights_sha256(plain)
    assert [entry["id"] for entry in receipt["requests"]] == ["a1", "b1", "c1", "c2"]
    assert [entry["batch"] for entry in receipt["requests"]] == [1, 2, 3, 3]
    assert [entry["time"] for entry in receipt["requests"]] == ["t1", "t2", "t3", "t3"]
    assert receipt["revoked"] == [{"time": "t4", "requests": 1, "ids": ["a2"]}] and receipt["created"] == "t3"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(chain.tok)

    save_chain_delta(chain, tmp_path / "delta.safetensors")
    apply_delta_file(str(base / "tiny"), tmp_path / "delta.safetensors", tmp_path / "again")
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_the_delta_is_small_where_the_update_is(start, tmp_path):
    made = start("MEMIT")
    made.add(A)
    delta = save_chain_delta(made, tmp_path / "delta.safetensors")
    assert {layer: one.rank for layer, one in delta.factors.items()} == {1: 2, 2: 2} and not delta.matrices


@pytest.mark.parametrize("algorithm", ["UniErase", "PRUNE", "RECT"])
def test_the_adapter_is_the_chains_model(start, algorithm, base, tmp_path):
    peft = pytest.importorskip("peft")
    made = start(algorithm, **({"retain": RETAIN} if algorithm == "UniErase" else {}))
    made.add(A)
    made.add(B)
    report = save_chain_lora(made, tmp_path / "lora", base=str(base / "tiny"))
    assert report.error == 0
    assert save_chain_lora(made, tmp_path / "thin", base=str(base / "tiny"), rank=1).error > 0
    tok = AutoTokenizer.from_pretrained(tmp_path / "lora")
    plain = AutoModelForCausalLM.from_pretrained(base / "tiny")
    plain.resize_token_embeddings(max(len(tok), plain.get_input_embeddings().weight.shape[0]))
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "lora").eval()
    ids = torch.tensor([[5, 9, 200, 17, 33, 8]])
    with torch.no_grad():
        mine, theirs = (one(input_ids=ids).logits for one in (made.model, adapted))
    assert mine.shape == theirs.shape and (mine - theirs).abs().max() < 1e-4


def test_a_private_receipt_holds_not_one_word(start, tmp_path):
    made = start("UniErase", retain=RETAIN)
    made.add(A)
    made.add(B)
    made.revoke(["a1"])
    page, key = save_chain_receipt(made, tmp_path / "out", private=True)
    told = json.loads((page.parent / "receipt.json").read_text())
    assert told["revoked"] == [{"requests": 1, "time": "t3"}]
    assert [entry["time"] for entry in told["requests"]] == ["t1", "t2"]
    both = page.read_text() + (page.parent / "receipt.json").read_text()
    words = {"a1", "a2", "b1", "Basel", "Peru", "Rhine", "Bonn", "river", "flows"}
    assert not [word for word in words if f'"{word}"' in both or f">{word}<" in both or f" {word} " in both]
    assert "Taken back t3: 1 request<" in page.read_text() and "Basel" in key.read_text()


def test_an_open_receipt_tells_all(start, tmp_path):
    made = start("MEMIT")
    made.add(A)
    made.revoke(["a1"])
    page, key = save_chain_receipt(made, tmp_path / "out")
    assert key is None and "Taken back t2: a1<" in page.read_text() and A[1].question in page.read_text()


def test_without_a_batch_there_is_nothing_to_hand_on(start, tmp_path):
    made = start("MEMIT")
    for save in (save_chain, save_chain_delta, save_chain_lora, save_chain_receipt):
        with pytest.raises(ChainError, match="holds no batch"):
            save(made, tmp_path / "out")
    made.add(A)
    made.revoke([request.id for request in A])
    with pytest.raises(ChainError, match="holds no batch"):
        chain_delta(made)
    assert not (tmp_path / "out").exists()


def test_exports_leave_the_chain_to_go_on(start, again):
    one, two = start("MEMIT", "one"), start("MEMIT", "two")
    for made in (one, two):
        made.add(A)
    chain_delta(one)
    one.add(B)
    two.add(B)
    assert one.record.batches == two.record.batches
    again(one).verify()


def test_from_the_command_line(call, start, base, tmp_path):
    start("MEMIT").add(A)
    folder = tmp_path / "chain"
    for kind, name in (("folder", "model"), ("delta", "d.safetensors"), ("lora", "lora"), ("receipt", "receipt")):
        code, said, err = call("chain", "export", folder, "--as", kind, "--out", tmp_path / name)
        assert code == 0, err
        assert name in said.replace("\n", "")
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert Delta.load(tmp_path / "d.safetensors").receipt["batches"] == 1
    assert (tmp_path / "lora" / "adapter_config.json").exists() and (tmp_path / "receipt" / "receipt.html").exists()
    bad = [
        (["--rank", "2"], "--rank is for --as lora"),
        (["--private"], "--private is for --as receipt"),
        (["--as", "delta", "--metrics", tmp_path / "m.json"], "--metrics is for --as receipt"),
        (["--as", "lora", "--rank", "0"], "expected at least 1"),
        (["--as", "receipt", "--metrics", tmp_path / "m.json"], "not metrics"),
    ]
    for options, what in bad:
        refused(call("chain", "export", folder, "--out", tmp_path / "new", *options), what)
        assert not (tmp_path / "new").exists()
    refused(call("chain", "export", folder, "--out", tmp_path / "model"), "--overwrite")
    assert Chain.open(folder).status()["requests"] == 2
