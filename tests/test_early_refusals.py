"""What can be known before weights are read is refused before: whoever reads them here is told so."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import refused
from transformers import AutoTokenizer

from editlib import files
from editlib.algorithms.unierase.token import TokenHeader, UnlearningToken
from editlib.attacks.run import planned_job
from editlib.attacks.settings import AttackSettings
from editlib.errors import ModelError, OutputError
from editlib.files import check_folder, check_output, check_room
from editlib.models import loading, outline  # noqa: F401  (imported first: it keeps the real `open_weights`)
from editlib.models.prompts import settled
from editlib.requests.reading import read_requests
from editlib.stats.file import LayerStats, StatsHeader
from editlib.stats.store import save_stats

READ = loading.open_weights
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
    "compare": ["compare", "--config", "compare.json", "--out", "out"],
}  # fmt: skip


@pytest.fixture
def run(call, folder, tmp_path, monkeypatch):
    """`run(command, *more)`: in a folder of its own, where no weights can be read."""

    def never(*_, **__):
        raise ModelError("WEIGHTS WERE READ")

    monkeypatch.setattr(loading, "open_weights", never)
    (tmp_path / "facts.jsonl").write_text(json.dumps(FACT) + "\n")
    (tmp_path / "page.txt").write_text('{"a": 1}')
    config = {"model": str(folder), "sets": [{"protocol": "facts", "requests": "facts.jsonl"}], "methods": ["none"]}
    (tmp_path / "compare.json").write_text(json.dumps({**config, "perplexity": None}))
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
    refused(run(command, *text), "WEIGHTS WERE READ")


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
    refused(run(command, out="page.txt/out"), "page.txt is not a folder")


STORING = ["unlearn", "edit", "token", "stats", "chain init", "tune", "bench sequential", "baseline"]


@pytest.mark.parametrize("command", STORING)
def test_places_of_statistics(run, command):
    refused(run(command, "--stats-dir", "page.txt"), "--stats-dir page.txt is a file")
    refused(run(command, "--stats-dir", "page.txt/stats"), "page.txt is not a folder")


@pytest.mark.parametrize(
    ("command", "more", "words"),
    [
        ("unlearn", ["--delta", "page.txt"], ["page.txt exists"]),
        ("unlearn", ["--delta", "page.txt/a.safetensors"], ["page.txt is not a folder"]),
        ("token", ["--out", "page.txt"], ["page.txt", "not an unlearning token"]),
        ("token", ["--refusals", "page.txt"], ["page.txt", "one entry a line"]),
        ("eval", ["--before", "page.txt", "--text", "none"], ["page.txt", "not a file of a model's answers"]),
        ("baseline", ["--hparams", "none.json"], ["none.json"]),
        ("baseline", ["--method", "NPO", "--hparams", "none.json"], ["NPO is not an editor", "leave it out"]),
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


def _shorter(path, by=200):
    path.write_bytes(path.read_bytes()[:-by])


def _other_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


LAYER = "model.layers.4.mlp.down_proj.weight"
DAMAGES = {
    "a configuration cut short": (lambda f: _shorter(f / "config.json"), "config.json"),
    "a tokenizer cut short": (lambda f: _shorter(f / "tokenizer.json"), "tokenizer.json"),
    "weights cut short": (lambda f: _shorter(f / "model.safetensors"), "model.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "a tensor less": (lambda f: _other_tensors(f, lambda t: t.pop(LAYER)), LAYER),
    "a tensor of another shape": (
        lambda f: _other_tensors(f, lambda t: t.update({LAYER: t[LAYER][:, :8].contiguous()})), LAYER
    ),
    "a chat template that fails": (
        lambda f: (f / "chat_template.jinja").write_text("{{ 1 / 0 }}"), "the chat template cannot be used"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["eval", "attack", "ask", "ability"])
def test_a_fault_of_the_second_model_is_told_before_the_first_is_read(run, folder, tmp_path, command, damage):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    change, word = DAMAGES[damage]
    change(other)
    if command == "ability" and "template" in damage:
        pytest.skip("tasks are asked without it")
    more = {"ask": ["--vs", other], "ability": [other], "eval": ["--text", "none"]}.get(command, [])
    refused(run(command, *more, EDITED=str(other)), word)


ASKING = [name for name in COMMANDS if name not in ("ability", "compare")]  # others ask tasks, or by a config


@pytest.mark.parametrize("command", ASKING)
def test_prompts_that_the_template_does_not_know(run, command):
    more = ["--corpus", "self"] if command == "stats" else []
    refused(run(command, *more, "--prompt", "enable_thinking=false"), "does not use 'enable_thinking'")


@pytest.mark.parametrize("command", ASKING)
def test_a_chat_that_the_tokenizer_does_not_have(run, folder, command):
    (folder / "chat_template.jinja").unlink()
    more = ["--corpus", "self"] if command == "stats" else []
    refused(run(command, *more, "--prompt", "system=Be brief."), "this tokenizer has none")


@pytest.mark.parametrize("command", [name for name in COMMANDS if "facts.jsonl" in COMMANDS[name]])
def test_a_prompt_beyond_the_positions(run, tmp_path, command):
    long = {**FACT, "id": "long", "prompt": "So it is. " * 300 + FACT["prompt"]}
    (tmp_path / "facts.jsonl").write_text(json.dumps(long) + "\n" + json.dumps(FACT) + "\n")
    text = ["--text", "none"] if command == "eval" else []
    refused(run(command, *text), "'long'", "positions")


def test_an_answer_that_rows_would_erase_is_missing(run, tmp_path):
    hparams = tmp_path / "rows.json"
    hparams.write_text(json.dumps({"alg_name": "UniErase", "layers": [1, 2], "values": "rows"}))
    (tmp_path / "facts.jsonl").write_text(json.dumps({k: v for k, v in FACT.items() if k != "answer"}) + "\n")
    refused(run("unlearn", "--hparams", hparams), "facts.jsonl:1", '"answer"')


def test_a_subject_that_is_not_evident(run, tmp_path):
    rows = [{"prompt": "The capital of France is", "answer": "Paris"}, {"question": "Who was it?", "answer": "Bob"}]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    refused(run("unlearn"), "facts.jsonl:2", '"subject"', "names in it: none", "--last-token")
    refused(run("unlearn", "--last-token"), "WEIGHTS WERE READ")


def test_a_module_that_the_model_does_not_have(run, tmp_path):
    (tmp_path / "MEMIT").mkdir()
    hparams = tmp_path / "MEMIT" / "other.json"
    hparams.write_text(json.dumps({"layers": [1], "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj"}))
    refused(run("edit", "--hparams", hparams), "rewrite_module_tmp", "transformer.h.1.mlp.c_proj")


def _token(path, width, sha256=""):
    row = torch.ones(width)
    UnlearningToken(row, row, TokenHeader("[UNL]", "another", sha256, 0, 0, 0)).save(path)


@pytest.mark.parametrize("command", ["unlearn", "chain init"])
def test_a_token_of_another_width(run, tmp_path, command):
    _token(tmp_path / "other.safetensors", 48)
    refused(run(command, "--token", "other.safetensors"), "width 48 (another)", "this model has 32", "editlib token")
    _token(tmp_path / "fits.safetensors", 32)
    refused(run(command, "--token", "fits.safetensors"), "WEIGHTS WERE READ")


@pytest.mark.parametrize("command", ["unlearn", "chain init", "tune", "bench sequential"])
def test_a_kept_token_that_cannot_be_used(run, folder, tmp_path, command):
    """One that other weights of the same name had first is no fault: this model's own goes beside it."""
    if command == "unlearn":  # with an answer to erase it needs no token
        (tmp_path / "facts.jsonl").write_text(json.dumps({**FACT, "answer": None}) + "\n")
    place = tmp_path / "stats" / folder.name / "unlearning_token.safetensors"
    place.parent.mkdir(parents=True)
    place.write_text("damaged")
    refused(run(command), str(place.relative_to(tmp_path)), "not an unlearning token")
    _token(place, 48)
    refused(run(command), "width 48")
    _token(place, 48, "0" * 64)
    refused(run(command), "WEIGHTS WERE READ")


def _stats(tmp_path, folder, module, inputs, *, named=None):
    keys = torch.randn(inputs, 400, generator=torch.Generator().manual_seed(0))
    header = StatsHeader(str(folder), named or module, inputs, 400, 4, "drawn", "", 64, 0, 0, "")
    made = LayerStats(keys @ keys.T, 400, 4, header)
    path = save_stats(tmp_path / "stats", made)
    return path if named is None else path.rename(path.with_name(path.name.replace(named, module)))


DOWN = "model.layers.{}.mlp.down_proj"


@pytest.fixture
def middle(tmp_path):
    """Settings for the layers 1 and 2, by algorithm."""
    made = {}
    for name in ("UniErase", "MEMIT"):
        (tmp_path / name).mkdir()
        made[name] = tmp_path / name / "middle.json"
        made[name].write_text(json.dumps({"layers": [1, 2]}))
    return made


@pytest.mark.parametrize("command", ["unlearn", "edit", "chain init", "tune", "baseline"])
def test_statistics_of_another_width(run, folder, tmp_path, middle, command):
    more = ("--hparams", middle["MEMIT" if command in ("edit", "baseline") else "UniErase"])
    path = _stats(tmp_path, folder, DOWN.format(2), 24)
    refused(run(command, *more), path.name, "24 x 24", "statistics of another model")
    path.write_bytes(path.read_bytes()[:300])
    refused(run(command, *more), path.name, "not a readable .npz")
    path.unlink()
    _stats(tmp_path, folder, DOWN.format(2), 64, named=DOWN.format(1))
    refused(run(command, *more), "was made for model.layers.1", "renamed")


def test_statistics_that_the_edit_does_not_read_are_not_looked_at(run, folder, tmp_path, middle):
    _stats(tmp_path, folder, DOWN.format(4), 24)
    _stats(tmp_path, folder, "transformer.h.1.mlp.c_proj", 24)
    _stats(tmp_path, folder, DOWN.format(1), 64)
    refused(run("unlearn", "--hparams", middle["UniErase"]), "WEIGHTS WERE READ")


@pytest.mark.parametrize("second", [False, True])
def test_questions_beyond_the_positions(run, folder, tmp_path, second):
    long = "So it is. " * 300
    more = []
    if second:  # of two models the shorter one counts
        other = tmp_path / "other"
        shutil.copytree(folder, other)
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
        long, more = "So it is. " * 6, ["--vs", other]
    refused(run("ask", long, *more), "positions", "for the answer")


KEPT_ATTACKS = {
    "another seed": {"seed": 5},
    "other facts": {"requests": "0" * 64},
    "another control": {"control": "0" * 64},
    "other settings": {"settings": {}},
    "other prompts": {"prompts": {"chat": False}},
}


@pytest.mark.parametrize("case", KEPT_ATTACKS)
def test_a_folder_with_other_attacks(run, folder, tmp_path, case):
    tok = AutoTokenizer.from_pretrained(folder)
    facts = read_requests(tmp_path / "facts.jsonl")
    job = planned_job(facts, AttackSettings(), prompts=settled(tok, None))
    (tmp_path / "out").mkdir()
    place = tmp_path / "out" / "job.json"
    place.write_text(json.dumps({"base": "x", "edited": "y", **job}))
    refused(run("attack"), "WEIGHTS WERE READ")
    place.write_text(json.dumps({"base": "x", "edited": "y", **job, **KEPT_ATTACKS[case]}))
    refused(run("attack"), "another job's attacks", f"other {next(iter(KEPT_ATTACKS[case]))}", "--overwrite")
    refused(run("attack", "--overwrite"), "WEIGHTS WERE READ")


def test_too_little_room(run, monkeypatch):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(10, 5, 1000))
    for command in ("unlearn", "edit", "finetune", "baseline"):
        refused(run(command), "0 MB are free")


def test_facts_that_no_attack_could_try(run, tmp_path):
    (tmp_path / "facts.jsonl").write_text(json.dumps({"id": "a", "prompt": "Who?"}) + "\n")
    refused(run("attack"), "none of the 1 requests can be attacked")


def test_nothing_to_judge_trials_by(run, tmp_path):
    (tmp_path / "retain.jsonl").write_text(json.dumps({"id": "b", "prompt": "Who is there?"}) + "\n")
    refused(run("tune", "--retain", "retain.jsonl"), "nothing measures retention")


def test_a_folder_with_another_training(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "finetune.json").write_text(json.dumps({"job": {"base": "x", "pairs": "y"}}))
    refused(run("finetune"), "another model's training", "--overwrite")
    (tmp_path / "out" / "finetune.json").unlink()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    refused(run("finetune"), "not empty")


def test_a_set_with_another_model_is_looked_at_first(call, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "open_weights", None)  # whoever calls it fails otherwise
    facts, other = tmp_path / "facts.jsonl", tmp_path / "other"
    facts.write_text(json.dumps(FACT) + "\n")
    shutil.copytree(folder, other)
    _shorter(other / "tokenizer.json")
    sets = [{"protocol": "facts", "requests": str(facts), "name": name} for name in ("one", "two")]
    sets[1]["model"] = str(other)
    config = {"model": str(folder), "sets": sets, "methods": ["GA"], "perplexity": None}
    (tmp_path / "compare.json").write_text(json.dumps(config))
    refused(call("compare", "--config", tmp_path / "compare.json", "--out", tmp_path / "out"), "tokenizer.json")


RECEIPTS = {
    "not an object": [1],
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
    with pytest.raises(OutputError, match="no permission"):
        check(tmp_path / "new" / "out")


def test_a_folder_of_statistics_may_be_one_to_read_only(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    check_folder(tmp_path, write=False)
    with pytest.raises(OutputError, match="no permission"):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    ("command", "more"),
    [("edit", ()), ("unlearn", ()), ("stats", ()), ("token", ())],
)
def test_statistics_and_tokens_that_cannot_be_kept_are_not_made(run, tmp_path, monkeypatch, command, more):
    """Read-only folders of statistics, by what the system says of them; weights are read by no edit."""
    (tmp_path / "kept").mkdir()
    kept = tmp_path / "kept"
    monkeypatch.setattr(
        os, "access", lambda path, mode: not mode & os.W_OK or kept not in (Path(path), Path(path).parent)
    )
    made = {"stats": "editlib.workbench.layer_stats", "token": "editlib.workbench.learn_token"}
    if command in made:
        monkeypatch.setattr(loading, "open_weights", READ)
        monkeypatch.setattr(made[command], lambda *_, **__: pytest.fail("it was made"))
    refused(run(command, *more, "--stats-dir", tmp_path / "kept"), "kept", "no permission")
