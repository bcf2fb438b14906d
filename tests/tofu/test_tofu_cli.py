"""`editlib eval --protocol tofu` from files to files, and what it refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
from test_cli import refused
from tofu_files import FORGOTTEN, KEPT, rows, write_tofu_files

from editlib.chain import Chain
from editlib.hparams import ALGORITHMS
from editlib.requests.reading import read_requests
from editlib.workbench import Workbench

pytest.importorskip("rouge_score")
pytest.importorskip("scipy")

FEW = ("--limit", "2", "--max-new-tokens", "4")


@pytest.fixture
def tofu(tmp_path):
    return write_tofu_files(tmp_path / "tofu")


def test_all_of_it(call, folder, tofu, tmp_path):
    out = tmp_path / "out"
    given = ("--protocol", "tofu", "--tofu", tofu, *FEW, "--reference", folder, "--out", out)
    code, said, err = call("eval", folder, folder, *given)
    assert code == 0, err
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["sets"] == {
        "forget": 2,
        "forget_paraphrased": 2,
        "retain": 2,
        "real_authors": 1,
        "world_facts": 2,
    }
    before, after = metrics["scores"]["base"], metrics["scores"]["edited"]
    name = "forget_teacher_forced_probability"
    assert before[name]["agg_value"] == pytest.approx(after[name]["agg_value"], rel=1e-4)
    assert after["forget_quality"]["agg_value"] == pytest.approx(1.0)  # the reference is the model itself
    assert "Questions to forget" in said and "forget quality" in said
    assert {path.name for path in out.iterdir()} == {
        "metrics.json",
        "base.json",
        "edited.json",
        "table.md",
        "report.html",
    }
    # What was written serves as a reference, and one question at a time can be measured.
    given = ("--protocol", "tofu", "--tofu", tofu, "--reference", out / "edited.json", *FEW)
    one = json.loads((out / "edited.json").read_text())["forget_teacher_forced_truth_ratio"]["value_by_index"]["0"][
        "id"
    ]
    precisely = ("--mode", "precise", "--request", one, "--out", tmp_path / "precise")
    code, _, err = call("eval", folder, folder, *given, *precisely)
    assert code == 0, err
    metrics = json.loads((tmp_path / "precise" / "metrics.json").read_text())
    assert metrics["sets"]["forget"] == 1 and metrics["request"] == one
    assert metrics["mode"] == "single"  # "precise" is its old name


REFERENCES = {
    "open-unlearning's results": (
        {"forget_truth_ratio": {"agg_value": 0.6, "value_by_index": {"0": {"score": 0.6}}}}, "do not name their",
    ),
    "no results": ({"forget_quality": {"agg_value": 0.9}}, "no forget_teacher_forced_truth_ratio"),
    "other questions": (
        {"forget_teacher_forced_truth_ratio": {"agg_value": 1.0, "value_by_index": {"0": {"id": "x", "score": 1.0}}}},
        "lacks 2 of 2 questions",
    ),
    "not an object": ([1], "expected an object of metrics"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFERENCES)
@pytest.mark.parametrize("mode", ["batch", "precise"])
def test_a_reference_that_does_not_fit_is_refused_before_any_model_is_loaded(call, tofu, tmp_path, case, mode):
    content, said = REFERENCES[case]
    path = tmp_path / "reference.json"
    path.write_text(json.dumps(content))
    given = ("--protocol", "tofu", "--tofu", tofu, *FEW, "--reference", path, "--mode", mode, "--out", tmp_path / "out")
    more = ("--request", "x") if mode == "precise" else ()
    code, _, err = call("eval", "./no-such-model", "./no-such-model", *given, *more)
    assert code == 2 and said in err and "no-such-model" not in err
    assert not (tmp_path / "out").exists()


def test_only_what_was_learned(call, folder, tofu, tmp_path):
    learned = tmp_path / "learned.jsonl"
    learned.write_text("".join(json.dumps(row) + "\n" for name in (FORGOTTEN[0], KEPT[1]) for row in rows(name)))
    out = tmp_path / "out"
    given = ("--protocol", "tofu", "--tofu", tofu, "--learned", learned, *FEW, "--out", out)
    code, _, err = call("eval", folder, folder, *given)
    assert code == 0, err
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["unlearned"] == {"forget": 3, "retain": 9}
    assert {item["question"] for item in metrics["items"] if item["set"] == "retain"} <= {
        row["question"] for row in rows(KEPT[1])
    }
    assert "Left out, since the model never learned them: 3 to forget and 9 to keep." in (out / "table.md").read_text()


def test_options_of_the_other_protocol(call, folder, tofu, tmp_path):
    out = tmp_path / "out"
    refused(call("eval", folder, folder, "--limit", "3", "--out", out), "--limit", "--protocol tofu")
    refused(
        call("eval", folder, folder, "--protocol", "tofu", "--text", "none", "--out", out),
        "--text",
        "--protocol facts",
    )
    refused(call("eval", folder, folder, "--protocol", "wmdp", "--out", out), "'wmdp'", "facts or tofu")
    refused(call("eval", folder, folder, "--out", out), "--requests")
    refused(
        call("eval", folder, folder, "--protocol", "tofu", "--tofu", tmp_path / "no", "--out", out), "no such folder"
    )
    assert not out.exists()


def test_subjects_as_a_file(call, tofu, tmp_path):
    path, own, out = tofu / "forget01.jsonl", tmp_path / "own.json", tmp_path / "requests.jsonl"
    own.write_text(json.dumps({"forget01:2": "city"}))
    code, said, err = call("subjects", path, "--given", own, "--out", out)
    assert code == 0, err
    assert "6 of 6 questions have a subject" in said
    requests = read_requests(out)
    assert [request.subject for request in requests[:3]] == ["Ada Moor", "city", "Ada Moor"]
    assert [request.question for request in requests] == [request.question for request in read_requests(path)]
    refused(call("subjects", path, "--out", out), "exists")
    own.write_text("[]")
    refused(call("subjects", path, "--given", own), "one JSON object")


def test_along_a_chain(call, folder, tofu, tmp_path):
    """An author a batch: the forget set grows, the retain set does not."""
    wanted = [replace(one, target_new="unknown") for one in read_requests(tofu / "forget01.jsonl")]
    short = {"v_num_grad_steps": 2, "context_templates": ["{}"], "mom2_adjustment": False}
    hparams = ALGORITHMS["ROME"].from_dict({"layers": [2], **short}, "ROME")
    chain = Chain.create(tmp_path / "chain", Workbench.load(str(folder), tmp_path, progress=False), hparams)
    chain.add(wanted[:3])
    chain.add(wanted[3:])
    out = tmp_path / "out"
    given = ("--protocol", "tofu", "--tofu", tofu, "--max-new-tokens", "4", "--mode", "sequential", "--out", out)
    code, said, err = call("eval", folder, chain.path, *given)
    assert code == 0, err
    metrics = json.loads((out / "metrics.json").read_text())
    assert [point["requests"] for point in metrics["points"]] == [3, 6]
    first, last = (point["forget_teacher_forced_probability"] for point in metrics["points"])
    scores = metrics["scores"]["edited"]["forget_teacher_forced_probability"]
    assert last == scores["agg_value"] != first and scores["n"] == 6
    assert metrics["sets"]["retain"] == 3
    assert "After every batch" in (out / "report.html").read_text()
    assert "Asked: questions to forget 6" in said


def test_rows_that_were_left_out_are_in_the_metrics(call, folder, tofu, tmp_path):
    with (tofu / "world_facts_perturbed.jsonl").open("a") as file:
        file.write('{"question": 7}\n')
    given = ("--protocol", "tofu", "--tofu", tofu, *FEW, "--out", tmp_path / "out")
    refused(call("eval", folder, folder, *given), "world_facts_perturbed.jsonl:3", "--skip-bad")
    code, _, err = call("eval", folder, folder, *given, "--skip-bad")
    assert code == 0, err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["left_out"] == {"world_facts_perturbed.jsonl": ["line 3"]}


def test_what_scores_are_made_with_is_looked_at_first(call, folder, tofu, tmp_path, monkeypatch):
    """A reference, a judge or a package that is not there was missed after both models had answered everything."""
    monkeypatch.setattr("editlib.jobs.evaluate.load", None)
    given = ("eval", folder, folder, "--protocol", "tofu", "--tofu", tofu, *FEW, "--out", tmp_path / "out")
    refused(call(*given, "--reference", tmp_path / "gone"), "gone")
    refused(call(*given, "--classifier", tmp_path / "gone"), "cannot load the classifier", "gone")
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    refused(call(*given), "ROUGE needs rouge-score", "pip install")
    assert not (tmp_path / "out").exists()
