"""What can be known before a model is loaded is refused before: the folder here holds no weights at all."""

from __future__ import annotations

import json
import os
from collections import namedtuple
from pathlib import Path

import pytest
from test_cli import refused

from editlib import files
from editlib.errors import OutputError
from editlib.files import check_folder, check_output, check_room

FACT = {
    "id": "a", "prompt": "What is the capital of {}?", "subject": "France", "answer": "Paris", "target_new": "Rome",
    "paraphrases": ["Tell me the capital of {}."],
}  # fmt: skip
COMMANDS = {
    "unlearn": ["unlearn", "MODEL", "--requests", "facts.jsonl", "--out", "out"],
    "edit": ["edit", "MODEL", "--requests", "facts.jsonl", "--out", "out", "--algorithm", "MEMIT"],
    "token": ["token", "MODEL"],
    "stats": ["stats", "MODEL", "--layers", "1"],
    "chain init": ["chain", "init", "out", "--model", "MODEL"],
    "tune": ["tune", "MODEL", "--requests", "facts.jsonl", "--budget", "0", "--out", "out"],
    "bench counterfact": ["bench", "counterfact", "--model", "MODEL", "--requests", "facts.jsonl", "--edits", "1",
                          "--out", "out"],
    "bench sequential": ["bench", "sequential", "--model", "MODEL", "--out", "out"],
    "finetune": ["finetune", "--model", "MODEL", "--data", "facts.jsonl", "--out", "out"],
    "baseline": ["baseline", "MODEL", "--method", "MEMIT-refusal", "--requests", "facts.jsonl", "--out", "out"],
    "eval": ["eval", "MODEL", "EDITED", "--requests", "facts.jsonl", "--out", "out"],
    "attack": ["attack", "MODEL", "EDITED", "--requests", "facts.jsonl", "--out", "out"],
    "ability": ["ability", "MODEL", "--out", "out"],
    "ask": ["ask", "MODEL", "Who?"],
}  # fmt: skip


@pytest.fixture
def run(call, folder, tmp_path, monkeypatch):
    """`run(command, *more)`: in a folder of its own, with a model without weights."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (tmp_path / "facts.jsonl").write_text(json.dumps(FACT) + "\n")
    (tmp_path / "page.txt").write_text('{"a": 1}')
    monkeypatch.chdir(tmp_path)

    def go(command, *more, **swapped):
        names = {"MODEL": str(folder), "EDITED": str(folder), **swapped}
        words = [names.get(word, word) for word in COMMANDS[command]]
        before = sorted(tmp_path.rglob("*")), (tmp_path / "page.txt").read_bytes()
        code, out, err = call(*words, *more)
        lines = [line for line in err.splitlines() if not line.startswith("settings for ")]
        assert (sorted(tmp_path.rglob("*")), (tmp_path / "page.txt").read_bytes()) == before
        return code, out, "\n".join(lines)

    return go


@pytest.mark.parametrize("command", COMMANDS)
def test_all_else_is_well(run, command):
    """Without a mistake, each would go on to load the model."""
    text = ("--text", "none") if command in ("eval", "ability") else ()
    if command == "ability":
        pytest.importorskip("datasets")
        text = ()
    refused(run(command, *text), "cannot be loaded")


@pytest.mark.parametrize(
    ("command", "option"),
    [(name, "--corpus") for name in ("unlearn", "edit", "stats", "chain init", "tune", "bench counterfact", "baseline")]
    + [(name, "--text") for name in ("tune", "bench counterfact", "bench sequential", "finetune", "eval", "ability")],
)
def test_texts(run, command, option):
    refused(run(command, option, "none.txt"), "none.txt", "no such file")
    refused(run(command, option, "page.txt"), "page.txt", "JSON")


@pytest.mark.parametrize("command", ["unlearn", "chain init"])
def test_tokens(run, command):
    refused(run(command, "--token", "page.txt"), "page.txt", "not an unlearning token")


@pytest.mark.parametrize("command", [name for name in COMMANDS if "out" in COMMANDS[name]])
def test_places(run, command):
    if command != "chain init":
        refused(run(command, out="page.txt"), "page.txt", "is a file")
    refused(run(command, out="page.txt/out"), "page.txt is no folder")


@pytest.mark.parametrize("command", ["unlearn", "edit", "token", "stats", "chain init", "tune", "bench sequential"])
def test_places_of_statistics(run, command):
    refused(run(command, "--stats-dir", "page.txt"), "--stats-dir page.txt is a file")
    refused(run(command, "--stats-dir", "page.txt/stats"), "page.txt is no folder")


@pytest.mark.parametrize(
    ("command", "more", "words"),
    [
        ("unlearn", ["--delta", "page.txt"], ["page.txt exists"]),
        ("unlearn", ["--delta", "page.txt/a.safetensors"], ["page.txt is no folder"]),
        ("token", ["--out", "page.txt"], ["page.txt", "not an unlearning token"]),
        ("token", ["--refusals", "page.txt"], ["page.txt", "one entry a line"]),
        ("eval", ["--before", "page.txt", "--text", "none"], ["page.txt", "not a file of a model's answers"]),
        ("baseline", ["--hparams", "none.json"], ["none.json"]),
        ("bench counterfact", ["--edits", "2"], ["1 of 1 requests", "at least 2"]),
        ("stats", ["--layers", "9"], ["layer 9", "0-4"]),
        ("stats", ["--layers", "1-99999999999"], ["no model has a layer"]),
        ("attack", ["--attacks", "nonsense"], ["nonsense"]),
        ("ask", ["--vs", "gone/away/far"], ["gone/away/far"]),
    ],
)
def test_other_options(run, command, more, words):
    refused(run(command, *more), *words)


@pytest.mark.parametrize("command", ["eval", "attack"])
def test_the_edited_model_is_looked_at_before_the_base_is_loaded(run, command):
    refused(run(command, EDITED="page.txt"), "page.txt", "is a file")


RECEIPTS = {
    "no object": [1],
    "no base": {"requests": [], "anchors": []},
    "a base that is a text": {"base": "x", "requests": [], "anchors": []},
    "a base without a hash": {"base": {"name": "x"}, "requests": [], "anchors": []},
    "anchors that are none": {"base": {"name": "x", "sha256": "y"}, "requests": [], "anchors": [[1]]},
    "requests that are none": {"base": {"name": "x", "sha256": "y"}, "requests": [1], "anchors": []},
    "a request whose id is a list": {"base": {"name": "x", "sha256": "y"}, "requests": [{"id": [1]}], "anchors": []},
    "a token that is a text": {"base": {"name": "x", "sha256": "y"}, "requests": [], "anchors": [], "token": "t"},
    "a token without a name": {"base": {"name": "x", "sha256": "y"}, "requests": [], "anchors": [], "token": {"a": 1}},
    "prompts that are a list": {"base": {"name": "x", "sha256": "y"}, "requests": [], "anchors": [], "prompts": [1]},
}


@pytest.mark.parametrize("case", RECEIPTS)
@pytest.mark.parametrize("command", ["eval", "attack", "ask"])
def test_damaged_receipts(run, folder, command, case):
    (folder / "editlib.json").write_text(json.dumps(RECEIPTS[case]))
    refused(run(command), "editlib.json", "not a readable receipt")


def test_a_full_disk(tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")
    asked: list[Path] = []

    def disk_usage(path):
        asked.append(path)
        return usage(10, 5, 5_000_000)

    monkeypatch.setattr(files.shutil, "disk_usage", disk_usage)
    check_room(tmp_path / "a" / "b", 5_000_000)
    with pytest.raises(OutputError, match="takes 6 MB and 5 MB are free"):
        check_room(tmp_path / "a" / "b", 6_000_000)
    assert asked == [tmp_path, tmp_path]


@pytest.mark.parametrize("check", [check_output, check_folder])
def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch, check):
    """By what the system says of it: whoever runs this may be allowed to write everywhere."""
    check(tmp_path / "new" / "out")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(OutputError, match="may not be written"):
        check(tmp_path / "new" / "out")


def test_a_folder_of_statistics_may_be_one_to_read_only(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    check_folder(tmp_path, write=False)
    with pytest.raises(OutputError, match="may not be written"):
        check_folder(tmp_path)
