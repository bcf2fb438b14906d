"""`editlib compare` on a saved model: files, exit codes, two processes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
from tiny_models import SENTENCES

from editlib.errors import ModelError
from editlib.requests.reading import write_requests
from editlib.requests.request import EditRequest

HPARAMS = {"layers": [1, 2], "num_steps": 2, "lr": 1e-2}


@pytest.fixture
def config(folder, tmp_path):
    """Writes a config with some keys changed."""
    facts = [EditRequest(id=f"f{x}", prompt="Where is {}?", subject=x, answer=x * 2) for x in ("Rome", "Oslo", "Lima")]
    write_requests(tmp_path / "forget.jsonl", facts[:2])
    write_requests(tmp_path / "keep.jsonl", [*facts[2:], EditRequest(id="w", prompt="Who are you?", answer="me")])
    (tmp_path / "FT.json").write_text(json.dumps(HPARAMS))
    text = " ".join(SENTENCES)
    (tmp_path / "text.txt").write_text("\n\n".join([text] * 8))
    memit = {"layers": [1, 2], "v_num_grad_steps": 2, "mom2_update_weight": 10, "context_templates": ["{}"]}
    (tmp_path / "MEMIT.json").write_text(json.dumps(memit))
    values = {
        "model": str(folder),
        "stats_dir": str(tmp_path / "stats"),
        "corpus": str(tmp_path / "text.txt"),
        "stats_tokens": 500,
        "perplexity": str(tmp_path / "text.txt"),
        "sets": [
            {"protocol": "facts", "requests": str(tmp_path / "forget.jsonl"), "retain": str(tmp_path / "keep.jsonl")}
        ],
        "methods": ["none", {"method": "FT-refusal", "hparams": str(tmp_path / "FT.json")}],
    }

    def write(**changes):
        path = tmp_path / "compare.json"
        path.write_text(json.dumps({**values, **changes}))
        return path

    return write


def test_it_leaves_a_table_a_page_and_the_results(config, call, tmp_path):
    methods = ["none", {"method": "MEMIT-refusal", "hparams": str(tmp_path / "MEMIT.json")}]
    code, told, said = call("compare", "--config", config(methods=methods), "--out", tmp_path / "out")
    assert code == 0, said
    assert "MEMIT-refusal" in told and "report.html" in told
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    none, memit = results["cells"]
    assert none["perplexity"]["ratio"] == 1.0 and memit["perplexity"]["ratio"] != 1.0
    assert memit["cost"]["prepared"]["statistics"] > 0 and memit["notes"]["layers"] == [1, 2]
    # Two requests at two layers: a column and a row each.
    assert memit["cost"]["update_bytes"] == 2 * 2 * (32 + 64) * 4
    assert memit["cost"]["touched"]["tensors"] == 2 and none["cost"]["touched"]["weights"] == 0
    assert results["sets"]["facts"]["retain"] == 1  # of two prompts one is held, the other one watched
    assert {item["question"] for item in none["items"]} > {"Where is Rome?", "Where is Oslo?"}


def test_a_failed_cell_is_told_by_the_exit_code(config, call, tmp_path):
    methods = ["none", {"method": "FT-refusal", "hparams": str(tmp_path / "FT.json"), "settings": {"lr": 1e38}}]
    code, told, said = call("compare", "--config", config(methods=methods), "--out", tmp_path / "out")
    assert code == 3 and "FT-refusal (0 of 1 runs)" in told
    assert said.splitlines()[-1].startswith("editlib: failed: facts, FT-refusal, seed 0: ")
    assert (tmp_path / "out" / "report.html").exists()


def test_a_slip_leaves_nothing(config, call, tmp_path):
    code, _, said = call("compare", "--config", config(methdos=[]), "--out", tmp_path / "out")
    assert code == 2 and 'key "methdos": unknown; expected "methods"' in said and said.count("\n") == 1
    layers = {"layers": [7]}
    methods = [{"method": "FT-refusal", "hparams": str(tmp_path / "FT.json"), "settings": layers}]
    code, _, said = call("compare", "--config", config(methods=methods), "--out", tmp_path / "out")
    assert code == 2 and "on the set facts" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "word"),
    [
        ({"method": "FT-refusal", "settings": {"layers": [7]}}, "layer 7"),
        ({"method": "MEMIT-refusal", "settings": {"rewrite_module_tmp": "model.layers.{}.no"}}, "has no module"),
        ({"method": "SimNPO", "settings": {"rank": 4}}, None),
        ({"method": "RMU", "settings": {"rank": 4}}, "leave the rank out"),
    ],
)
def test_what_does_not_fit_is_said_before_weights_are_read_and_leaves_nothing(
    config, call, tmp_path, monkeypatch, method, word
):
    def read(*_, **__):
        raise ModelError("weights were read")

    monkeypatch.setattr("editlib.models.outline.load", read)
    plan, before = config(methods=["none", method]), sorted(tmp_path.rglob("*"))
    code, _, said = call("compare", "--config", plan, "--out", tmp_path / "out")
    wanted = "weights were read" if word is None else word
    assert code == 2 and said.count("editlib:") == 1 and wanted in said
    assert ("weights were read" in said) == (word is None)
    assert sorted(tmp_path.rglob("*")) == before


def test_two_processes_share_the_cells(config, tmp_path):
    methods = [
        {
            "method": "FT-refusal",
            "label": f"FT {n}",
            "hparams": str(tmp_path / "FT.json"),
            "settings": {"num_steps": n},
        }
        for n in (1, 2, 3)
    ]
    path = config(methods=methods, seeds=[0, 1], perplexity=None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "editlib", "compare", "--config", str(path), "--out", str(tmp_path / "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["cells"]) == 6 and all(cell["forget"] is not None for cell in results["cells"])
    assert done.stdout.count("report.html") == 1


def test_a_part_of_the_wrong_type_is_measured_again_or_one_line(config, call, tmp_path):
    """A file without a hash is an earlier version's: it is read as it is, and refused where it does not fit."""
    plan, whole = config(methods=["none"]), tmp_path / "whole"
    assert call("compare", "--config", plan, "--out", whole)[0] == 0
    before = (whole / "results.json").read_bytes()
    contents = ("3", '{"forget": 3, "sha256": 3}', '{"measures": [1], "cost": "x"}')
    for i, (part, content) in enumerate(itertools.product(("scores", "edit"), contents)):
        out = tmp_path / f"out{i}"
        shutil.copytree(whole, out)
        path = next((out / "cells").glob(f"*/{part}.json"))
        path.write_text(content)
        code, _, said = call("compare", "--config", plan, "--out", out)
        if content == "3":
            assert code == 0 and json.loads(path.read_text()), part
            continue
        assert code == 2 and said.count("editlib:") == 1 and "not written by an earlier run" in said, (part, content)
        assert (out / "results.json").read_bytes() == before
