"""Perplexity alone, which needs no lm-eval; files of questions; differences and their standard errors."""

import json
import math
import re
import statistics
import sys

import pytest
import torch
from questions import CHOICES, CONTINUATIONS, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from editlib.ability import measured, run_ability
from editlib.ability.local_file import CHOICE, CONTINUATION, LocalFile
from editlib.ability.measured import TaskResult, TaskScore, difference
from editlib.ability.report import AbilityRow, cell
from editlib.errors import MetricError, ModelError, OutputError, RequestError
from editlib.evaluation.intervals import bootstrap_stderr
from editlib.version import install_line


@pytest.fixture
def no_lm_eval(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)


def by_hand(folder, text):
    """Mean loss and number of predicted tokens of each document, from plain transformers."""
    model, tok = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = []
    for document in text.read_text(encoding="utf-8").split("\n\n"):
        ids = tok(document, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            found.append((float(model(ids, labels=ids).loss), ids.shape[1] - 1))
    return found


def test_text_alone_needs_no_lm_eval(no_lm_eval, saved, text, tmp_path):
    report = run_ability(saved, text=str(text), out=tmp_path / "out")
    losses = {name: by_hand(folder, text) for name, folder in saved.items()}
    wanted = {
        name: math.exp(sum(loss * n for loss, n in some) / sum(n for _, n in some)) for name, some in losses.items()
    }
    rows = {name: report.row(name, "text prose", "perplexity") for name in saved}
    for name, row in rows.items():
        assert row.value == pytest.approx(wanted[name], rel=1e-4) and row.n == 5 and row.stderr > 0
        assert row.higher_is_better is False
    assert rows["base"].difference is None
    assert rows["edited"].difference == pytest.approx(wanted["edited"] - wanted["base"], rel=1e-3)
    assert rows["edited"].difference_stderr > 0
    written = json.loads((tmp_path / "out" / "ability.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(report.to_dict()))
    assert "| text prose | perplexity ↓ | 5 |" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")


def test_tasks_without_lm_eval_name_the_extra(no_lm_eval, saved, text, arc, tmp_path, call):
    with pytest.raises(MetricError, match=re.escape(install_line("ability"))):
        run_ability(saved, [str(arc)], text=str(text), out=tmp_path / "out")
    code, _, err = call("ability", saved["base"], "--tasks", arc, "--text", text, "--out", tmp_path / "out")
    assert code == 2 and err.startswith("editlib: tasks are run by lm-eval") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_shows_models_side_by_side(saved, text, tmp_path, call):
    code, out, _ = call("ability", saved["base"], saved["edited"], "--text", text, "--out", tmp_path / "out")
    assert code in (0, None) and "perplexity" in out and "±" in out
    assert {row["model"] for row in json.loads((tmp_path / "out" / "ability.json").read_text())["rows"]} == {
        str(folder) for folder in saved.values()
    }


def test_a_folder_that_is_no_model_is_found_before_anything_is_measured(saved, text, tmp_path, monkeypatch):
    monkeypatch.setattr("editlib.ability.run.load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        run_ability({**saved, "none": tmp_path}, text=str(text), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"models": {}}, "no model"),
        ({"text": None}, "nothing to measure"),
        ({"limit": 0}, "limit 0: expected 1 or more"),
        ({"batch_size": 0}, "batch size 0: expected 1 or more"),
    ],
)
def test_impossible_settings(saved, text, given, expected):
    with pytest.raises(MetricError, match=expected):
        run_ability(**{"models": saved, "text": str(text), **given})


def test_a_folder_with_other_things_is_left_alone(saved, text, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="is not empty"):
        run_ability(saved, text=str(text), out=tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_files_of_both_shapes_are_read(arc, lambada, tmp_path):
    assert LocalFile.read(arc).shape is CHOICE and LocalFile.read(arc).rows == tuple(CHOICES)
    assert LocalFile.read(lambada).shape is CONTINUATION
    assert LocalFile.read(lambada).rows == tuple(CONTINUATIONS)  # one holds U+2028, which is no end of a line
    spaced = tmp_path / "spaced.jsonl"
    lines = [json.dumps({**row, "source": i}) for i, row in enumerate(CHOICES)]
    spaced.write_text("\ufeff" + "\n\n".join(lines), encoding="utf-8")
    assert LocalFile.read(spaced) == LocalFile.read(arc)  # other fields, blank lines and a byte order mark do not count
    assert LocalFile.read(write_lines(tmp_path / "less.jsonl", CHOICES[:4])).sha256 != LocalFile.read(arc).sha256


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a list; expected an object"),
        ({"query": "Why?", "choices": ["a", "b"]}, "line 2: field 'gold' is missing; expected the number"),
        ({"query": "Why?", "choices": ["a", "b"], "gold": 2}, "line 2: field 'gold' is 2; expected the number"),
        ({"query": "Why?", "choices": ["a", "b"], "gold": -1}, "line 2: field 'gold' is -1"),
        ({"query": "Why?", "choices": ["a", "b"], "gold": True}, "line 2: field 'gold' is true"),
        ({"query": "Why?", "choices": ["a", "b"], "gold": "A"}, "line 2: field 'gold' is \"A\""),
        ({"query": "Why?", "choices": ["a"], "gold": 0}, "line 2: field 'choices' is .*; expected a list of two texts"),
        ({"query": "Why?", "choices": "ab", "gold": 0}, "line 2: field 'choices' is \"ab\""),
        ({"query": "Why?", "choices": ["a", 3], "gold": 0}, "line 2: field 'choices'"),
        ({"query": " ", "choices": ["a", "b"], "gold": 0}, "line 2: field 'query' is \" \"; expected a text"),
        ({"context": "a", "continuation": "b"}, "line 2: field 'query' is missing"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path, line, expected):
    path = tmp_path / "questions.jsonl"
    second = line if isinstance(line, str) else json.dumps(line)
    path.write_text(f"{json.dumps(CHOICES[0])}\n{second}\n", encoding="utf-8")
    with pytest.raises(RequestError, match=expected) as error:
        LocalFile.read(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_files_that_are_none(tmp_path):
    empty, foreign, latin = (tmp_path / name for name in ("empty.jsonl", "foreign.jsonl", "latin.jsonl"))
    empty.write_text("\n")
    foreign.write_text('{"question": "Why?", "answer": "So"}\n')
    latin.write_bytes(b'{"context": "caf\xe9"}')
    for path, expected in (
        (empty, "holds no questions"),
        (foreign, "line 1: its fields are question, answer; expected context, continuation; or query, choices, gold"),
        (latin, "not UTF-8"),
        (tmp_path / "absent.jsonl", "cannot be read"),
    ):
        with pytest.raises(RequestError, match=expected):
            LocalFile.read(path)


def scored(value, stderr, higher_is_better, aggregation, items, name="m"):
    return TaskScore(name=name, agg_value=value, higher_is_better=higher_is_better, stderr=stderr,
                     aggregation=aggregation, items=tuple(items))  # fmt: skip


def made(items, aggregation="mean", value=None):
    value = statistics.fmean(items) if value is None else value
    return scored(value, 0.1, True, aggregation, items)


def test_the_difference_of_means_is_paired():
    before, after = [1, 0, 1, 1, 0, 0, 1, 0], [1, 0, 0, 1, 0, 1, 0, 0]
    found = difference(made(before), made(after), None)
    gaps = [b - a for a, b in zip(before, after, strict=True)]
    assert found.value == pytest.approx(-1 / 8)
    assert found.stderr == pytest.approx(math.sqrt(sum((g + 1 / 8) ** 2 for g in gaps) / 7) / math.sqrt(8))
    assert difference(made(before), made(before), None).stderr == 0


def test_the_difference_of_perplexities_is_bootstrapped_over_pairs():
    generator = torch.Generator().manual_seed(0)
    before = (-2 + 0.3 * torch.randn(400, generator=generator)).tolist()
    after = [ll - 0.2 + 0.1 * float(torch.randn((), generator=generator)) for ll in before]

    def perplexity(items):
        return math.exp(-statistics.fmean(items))

    found = difference(
        made(before, "perplexity", perplexity(before)), made(after, "perplexity", perplexity(after)), perplexity
    )
    # The delta method: each document moves exp(-mean) by that times its own loss.
    moved = [-perplexity(after) * b + perplexity(before) * a for a, b in zip(before, after, strict=True)]
    assert found.value == pytest.approx(perplexity(after) - perplexity(before))
    assert found.stderr == pytest.approx(statistics.stdev(moved) / 20, rel=0.1)
    unpaired = math.hypot(bootstrap_stderr(perplexity, before), bootstrap_stderr(perplexity, after))
    assert found.stderr < 0.5 * unpaired


def test_differences_without_a_standard_error():
    assert difference(made([1, 0]), scored(None, None, True, "mean", (1, 0)), None) is None
    assert difference(made([1, 0], None), made([1, 1], None), None).stderr is None
    assert difference(made([1]), made([0]), None).stderr is None
    skipped = difference(made([1, 0, 1]), scored(0.5, 0.1, True, "mean", (1, None, 0)), None)
    assert skipped.stderr == pytest.approx(statistics.stdev([0, -1]) / math.sqrt(2))
    assert bootstrap_stderr(lambda some: math.exp(sum(some)), [1000.0, 2000.0]) is None


def test_models_that_read_other_documents_have_no_difference(saved, text, monkeypatch):
    def other(model, tok, documents, **_):
        hashes.append(f"h{len(hashes)}")
        return TaskResult((hashes[-1],), (scored(2.0, None, False, None, ((1.0, 1),), "perplexity"),), 0.0)

    hashes = []
    monkeypatch.setattr("editlib.ability.run.measure_text", other)
    report = run_ability(saved, text=str(text))
    assert report.row("edited", "text prose", "perplexity").difference is None


def test_cells():
    row = AbilityRow("m", "t", "acc", 0.52, 0.014, True, 9, 9, -0.0121, 0.004)
    assert cell(row) == "0.520 ± 0.014 (-0.012 ± 0.004)"
    assert cell(AbilityRow("m", "t", "perplexity", 31.456, None, False, 9, 9)) == "31.46"
    assert cell(AbilityRow("m", "t", "perplexity", 2.5e16, 1e15, False, 9, 9)) == "2.5e+16 ± 1.0e+15"
    assert cell(AbilityRow("m", "t", "perplexity", None, None, False, 9, 9)) == cell(None) == "-"


def test_what_is_kept_reads_back():
    one = TaskResult(("a", "b"), (made([1, 0]), made([[1.0, 3], [2.0, 4]], None, 1.0)), 1.5)
    assert measured.TaskResult.from_dict(json.loads(json.dumps(one.to_dict()))) == one
