"""What can be known of TOFU's sets and of a reference before weights are read is refused before."""

from __future__ import annotations

import json
import shutil

import pytest
from test_cli import refused
from test_early_refusals import DAMAGES
from tofu_files import write_tofu_files

from editlib.errors import ModelError
from editlib.models import loading, outline  # noqa: F401  (imported first: it keeps the real `open_weights`)


@pytest.fixture
def run(call, folder, tmp_path, monkeypatch):
    """`run(*more)`: `eval --protocol tofu`, where no weights can be read."""
    pytest.importorskip("scipy")

    def never(*_, **__):
        raise ModelError("WEIGHTS WERE READ")

    monkeypatch.setattr(loading, "open_weights", never)
    monkeypatch.chdir(tmp_path)
    write_tofu_files(tmp_path / "tofu")

    def go(*more):
        found = call("eval", folder, folder, "--protocol", "tofu", "--tofu", "tofu", "--out", "out", *more)
        assert not (tmp_path / "out").exists()
        return found

    return go


def test_sets_that_are_not_there_or_cannot_be_asked(run):
    refused(run(), "WEIGHTS WERE READ")
    refused(run("--forget", "forget05"), "no forget05.jsonl")
    refused(run("--forget", "forget02"), "'forget02'", "forget01, forget05, forget10")
    refused(run("--max-new-tokens", "500"), "positions", "500 of them for the answer")


def test_a_reference_needs_wrong_answers(run, folder, tmp_path):
    refused(run("--reference", folder), "WEIGHTS WERE READ")
    (tmp_path / "tofu" / "forget01_perturbed.jsonl").unlink()
    refused(run("--reference", folder), "no wrong answers", "forget01_perturbed")


@pytest.mark.parametrize("damage", [name for name in DAMAGES if "template" not in name])
def test_a_reference_is_looked_at(run, call, folder, tmp_path, damage):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    change, word = DAMAGES[damage]
    change(other)
    refused(run("--reference", other), word)
    config = {"model": str(folder), "sets": [{"protocol": "tofu", "source": "tofu", "reference": str(other)}]}
    (tmp_path / "compare.json").write_text(json.dumps({**config, "methods": ["none"], "perplexity": None}))
    refused(call("compare", "--config", "compare.json", "--out", "out"), word)
