"""A chain without batches, and measuring one along requests that do not fit, are refused before weights are read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from chain_cases import A, B, files
from test_cli import refused
from transformers import AutoModelForCausalLM

from editlib.chain import Chain
from editlib.errors import ModelError
from editlib.models import loading, outline  # noqa: F401  (imported first: it keeps the real `open_weights`)
from editlib.models.loading import load
from editlib.requests.reading import write_requests


@pytest.fixture
def no_weights(monkeypatch):
    def never(*_, **__):
        raise ModelError("WEIGHTS WERE READ")

    monkeypatch.setattr(loading, "open_weights", never)


@pytest.fixture
def empty(start):
    return start("MEMIT").path


@pytest.mark.parametrize("kind", ["folder", "delta", "lora", "receipt"])
def test_an_empty_chain_is_not_handed_on(call, empty, tmp_path, no_weights, kind):
    before = files(empty)
    refused(call("chain", "export", empty, "--as", kind, "--out", tmp_path / "out"), "holds no batch", "add requests")
    assert not (tmp_path / "out").exists() and files(empty) == before


def test_there_is_nothing_to_undo_revoke_or_measure(call, empty, base, tmp_path, no_weights):
    before = files(empty)
    refused(call("chain", "undo", empty), "nothing to undo")
    refused(call("chain", "revoke", empty, "a1"), "'a1' is not in")
    write_requests(tmp_path / "a.jsonl", A)
    for mode in ("batch", "sequential"):
        more = ("--requests", tmp_path / "a.jsonl", "--text", "none", "--mode", mode, "--out", tmp_path / "out")
        refused(call("eval", base / "tiny", empty, *more), "holds no batch")
    assert not (tmp_path / "out").exists() and files(empty) == before


def test_an_empty_chain_applied_is_the_base_model(empty, base):
    model, tok = load(str(base / "tiny"))
    size = len(tok)
    Chain.open(empty).apply_to(model, tok)
    plain = AutoModelForCausalLM.from_pretrained(base / "tiny").state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items()) and len(tok) == size


def test_an_empty_chain_is_sound(call, empty):
    assert "0 batches with 0 requests" in call("chain", "verify", empty)[1]
    assert call("chain", "log", empty)[:2] == (0, "")
    assert "0 requests, 0 revoked" in call("chain", "status", empty)[1]


NO_METRICS = {"gone": None, "no JSON": "x", "another kind": "[1]", "without a model": '{"edited": {}}'}


@pytest.mark.parametrize("case", NO_METRICS)
def test_metrics_of_a_chain_are_looked_at_first(call, start, tmp_path, no_weights, case):
    chain = start("MEMIT")
    chain.add(A)
    place = tmp_path / "metrics.json"
    if NO_METRICS[case] is not None:
        place.write_text(NO_METRICS[case])
    given = ("--as", "receipt", "--metrics", place, "--out", tmp_path / "out")
    refused(call("chain", "export", chain.path, *given), "metrics.json", "not metrics of `editlib eval`")


STRANGE = {
    "not all of its own": (A[:1], ["1 of its requests", "Which river flows through Basel?"]),
    "none of its own": (B, ["2 of its requests"]),
    "an id twice": ([A[0], replace(B[0], id="a1")], ["line", "a1"]),
    "a question twice": ([*A, replace(A[0], id="again")], ["jsonl:3", "the same as request 'a1'", "remove one"]),
    "a question with two answers": ([*A, replace(A[0], id="again", target_new="Bonn")], ["the same as request 'a1'"]),
    "no request": ([], ["requests.jsonl"]),
}


@pytest.mark.parametrize("case", STRANGE)
def test_requests_that_a_chain_cannot_be_followed_along(call, start, base, tmp_path, no_weights, case):
    requests, words = STRANGE[case]
    chain = start("MEMIT")
    chain.add(A)
    write_requests(tmp_path / "requests.jsonl", requests)
    out = tmp_path / "out"
    more = ("--requests", tmp_path / "requests.jsonl", "--text", "none", "--mode", "sequential", "--out", out)
    refused(call("eval", base / "tiny", chain.path, *more), *words)
    assert not out.exists()


def test_requests_without_an_answer_are_measured_all_the_same(call, start, base, tmp_path):
    """Whether a refusal came can be seen without one."""
    chain = start("MEMIT")
    chain.add(A)
    write_requests(tmp_path / "requests.jsonl", [replace(one, answer=None) for one in A])
    write_requests(tmp_path / "retain.jsonl", B)
    given = ("--requests", tmp_path / "requests.jsonl", "--retain", tmp_path / "retain.jsonl", "--text", "none")
    code, _, err = call("eval", base / "tiny", chain.path, *given, "--mode", "sequential", "--out", tmp_path / "out")
    assert code == 0, err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["points"][0]["efficacy"] == 0.0 and metrics["points"][0]["requests"] == 2


def test_no_folder_of_a_model_is_followed(call, base, tmp_path, no_weights):
    write_requests(tmp_path / "a.jsonl", A)
    shutil.copytree(base / "tiny", tmp_path / "edited")
    more = ("--requests", tmp_path / "a.jsonl", "--mode", "sequential", "--out", tmp_path / "out")
    refused(call("eval", base / "tiny", tmp_path / "edited", *more), "is not a chain")
