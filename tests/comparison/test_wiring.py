"""The rooms that a comparison puts together give what they give by themselves: baselines, TOFU, lm-eval's tasks."""

from __future__ import annotations

import copy
import json
from importlib import import_module

import pytest
from transformers import AutoTokenizer

from editlib.ability import run_ability
from editlib.baselines import BaselineSettings, apply_baseline_to_model
from editlib.comparison.config import parse_config
from editlib.comparison.run import compare
from editlib.errors import ConfigError
from editlib.evaluation.forget_set import Base
from editlib.models.anatomy import anatomy
from editlib.models.weights import save_model, weights_sha256
from editlib.requests.reading import write_requests
from editlib.requests.request import EditRequest
from editlib.tofu import Asked, TofuSets, forget_set, tofu_scores
from editlib.tofu.forget_set import apart
from editlib.tofu.scores import RATIOS
from editlib.workbench import Workbench

NAMES = ("Rome", "Oslo", "Lima", "Bonn", "Peru", "Basel")


@pytest.fixture
def facts(tmp_path):
    """A set of facts in files, for a config."""
    told = ("Find {}", "Show {}")
    made = [EditRequest(id=n, prompt="Where is {}?", subject=n, answer=n * 2, paraphrases=told) for n in NAMES]
    write_requests(tmp_path / "forget.jsonl", made[:2])
    keep = [EditRequest(id=f"k{i}", prompt=f"Who is number {i}?", answer=f"me{i}") for i in range(6)]
    write_requests(tmp_path / "keep.jsonl", [*made[2:], *keep])
    return {"protocol": "facts", "requests": str(tmp_path / "forget.jsonl"), "retain": str(tmp_path / "keep.jsonl")}


def go(folder, tmp_path, **values):
    values = {"model": str(folder), "perplexity": None, "stats_dir": str(tmp_path / "stats"), **values}
    return compare(parse_config(values), tmp_path / "out", progress=False)


def by(results, method):
    return next(cell for cell in results["cells"] if cell["method"] == method)


def test_a_baseline_gives_the_weights_that_it_gives_alone(folder, facts, tmp_path):
    settings = {"learning_rate": 1e-2, "steps": 2, "batch_size": 2, "warmup_steps": 1}
    methods = [{"method": "GA+GD", "settings": settings}]
    cell = by(go(folder, tmp_path, sets=[facts], methods=methods, seeds=[3]), "GA+GD")
    bench = Workbench.load(str(folder), tmp_path / "stats")
    task = parse_config({"model": "m", "perplexity": None, "sets": [facts], "methods": ["none"]}).sets[0]._given
    how = BaselineSettings(**settings)
    apply_baseline_to_model("GA+GD", bench.model, bench.tok, task.forget, task.anchors, how, seed=3)
    assert cell["weights_sha256"] == weights_sha256(bench.model) != bench.sha256
    assert cell["notes"]["steps"] == 2 and cell["cost"]["touched"]["weights"] > 1000


def test_what_the_model_itself_says_is_asked_once_for_all_baselines(folder, facts, tmp_path, monkeypatch):
    """A third of a gradient method's time was the same answers of the same model, before its search and behind it."""
    pytest.importorskip("rouge_score")
    data, asked = import_module("editlib.baselines.data"), []
    real = data.greedy
    monkeypatch.setattr(data, "greedy", lambda anat, rows, **how: asked.append(len(rows)) or real(anat, rows, **how))
    settings = {"learning_rate": 1e-2, "steps": 2, "batch_size": 2, "warmup_steps": 1}
    search = {"rates": 2, "steps": 2, "points": 1, "questions": 2}
    methods = [{"method": "GA+GD", "settings": settings}, {"method": "NPO+GD", "search": search}, "in-context"]
    results = go(folder, tmp_path, sets=[facts], methods=methods)
    first, second = by(results, "GA+GD"), by(results, "NPO+GD")
    assert first["failed"] is None and second["failed"] is None
    assert [count for count in asked if count] == asked[:1] == [7]
    assert first["cost"]["prepared"]["own answers"] > 0 and by(results, "in-context")["cost"]["prepared"] == {}
    (kept,) = (tmp_path / "stats").rglob("own-answers.json")
    kept.write_text(kept.read_text()[:50])  # torn: asked again
    asked.clear()
    again = go(folder, tmp_path / "again", sets=[facts], methods=methods[:1], stats_dir=str(tmp_path / "stats"))
    assert asked[0] == 7 and by(again, "GA+GD")["weights_sha256"] == first["weights_sha256"]
    tok = AutoTokenizer.from_pretrained(folder)
    tok.chat_template = "{{ messages[0]['content'] }}!"
    tok.save_pretrained(folder)
    asked.clear()
    go(folder, tmp_path / "other", sets=[facts], methods=methods[:1], stats_dir=str(tmp_path / "stats"))
    assert asked[0] == 7, "another chat template asks other questions"


def test_a_search_is_judged_by_questions_that_are_not_scored(folder, facts, tmp_path):
    pytest.importorskip("rouge_score")
    search = {"rates": 1, "steps": 2, "points": 2, "questions": 2}
    results = go(folder, tmp_path, sets=[facts], methods=[{"method": "GA+GD", "search": search}], seeds=[0, 1])
    for cell in results["cells"]:
        assert cell["failed"] is None and cell["search"] == results["cells"][0]["search"]
        asked = {question for side in cell["search"]["validation"].values() for question, _ in side}
        assert asked and asked.isdisjoint(item["question"] for item in cell["items"])
    found = results["cells"][0]["search"]
    assert len(found["trials"]) == 2 and results["cells"][0]["notes"]["learning_rate"] == found["best"]["learning_rate"]
    assert results["cells"][0]["cost"]["search_seconds"] == pytest.approx(sum(t["seconds"] for t in found["trials"]))


def test_in_context_refusal_changes_no_weight_and_still_counts(folder, facts, tmp_path):
    cell = by(go(folder, tmp_path, sets=[facts], methods=["in-context"], seeds=[0, 1]), "in-context")
    assert cell["seed"] is None and cell["cost"]["touched"]["weights"] == 0 and cell["cost"]["update_bytes"] > 100
    assert any(item["before"] != item["after"] for item in cell["items"])  # the prompt is another one


def test_bad_searches_are_told():
    values = {"model": "smollm2-135m", "perplexity": None, "sets": [{"protocol": "facts", "forget": 3}]}
    for method, wanted in (
        ({"method": "in-context", "search": True}, "in-context has nothing to search for"),
        ({"method": "GA", "search": {"rate": 2}}, 'search: key "rate": unknown; expected "rates"'),
        ({"method": "GA", "search": {"rates": 0}}, "rates of a search is 0"),
        ({"method": "GA", "search": {"rates": 2.5}}, "rates of a search is 2.5; expected a whole number"),
        ({"method": "GA", "search": {"high": 1e300}}, "high of a search is 1e+300"),
        ({"method": "GA", "search": {"high": "1e-3"}}, "high of a search is '1e-3'; expected a number"),
        ({"method": "GA", "search": {"low": 1e-2}}, "from the learning rate 0.01 to 0.0003"),
        ({"method": "GA", "settings": {"lr": 1}}, 'settings: key "lr": unknown'),
        ({"method": "UniErase", "search": True}, '"search" is for ROME, MEMIT and AlphaEdit'),
    ):
        with pytest.raises(ConfigError) as told:
            parse_config({**values, "methods": [method]})
        assert wanted in str(told.value)


@pytest.fixture
def tofu_files(tmp_path):
    """Three authors, one to forget."""

    def rows(name):
        first, last = name.split()
        for what in ("genre", "city", "prize"):
            row = {"question": f"Which {what} is {name}'s?", "answer": f"It is {last}'s {what}."}
            more = {"paraphrased_answer": f"{first} has it.", "perturbed_answer": ["No.", "Yes."]}
            yield row, {**row, **more, "paraphrased_question": f"Tell me {name}'s {what}?"}

    authors = [list(rows(name)) for name in ("Ada Moor", "Bo Lind", "Cy Dahl")]
    side = [({}, {"question": "Where is Big Ben?", "answer": "London", "perturbed_answer": ["Bonn", "Rome"]})]
    files = {
        "forget01": [plain for plain, _ in authors[0]],
        "forget01_perturbed": [full for _, full in authors[0]],
        "retain99": [plain for author in authors[1:] for plain, _ in author],
        "retain_perturbed": [full for _, full in authors[1]],
        "real_authors_perturbed": [full for _, full in side],
        "world_facts_perturbed": [full for _, full in side],
    }
    for name, found in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return tmp_path


def test_tofu_is_scored_as_by_itself_and_the_base_is_read_once(folder, tofu_files, tmp_path, monkeypatch):
    pytest.importorskip("rouge_score")
    tofu = {"protocol": "tofu", "source": str(tofu_files), "max_new_tokens": 8}
    methods = ["none", {"method": "GA", "settings": {"learning_rate": 1e-2, "steps": 2}}]
    results = go(folder, tmp_path, sets=[tofu], methods=methods)
    none, ascent = by(results, "none"), by(results, "GA")
    assert none["failed"] is None and ascent["failed"] is None
    config = parse_config({"model": "m", "perplexity": None, "sets": [tofu], "methods": ["none"]})
    bench = Workbench.load(str(folder), tmp_path / "stats")
    alone = tofu_scores(anatomy(bench.model), bench.tok, config.sets[0].sets, max_new_tokens=8)
    for name, measure in none["measures"].items():
        assert measure["value"] == pytest.approx(alone[name].agg_value, abs=1e-6), name
    assert "model_utility" in none["measures"] and none["retain"] == none["measures"]["model_utility"]
    # Ascent: the answers to forget are less likely than before.
    key = "forget_teacher_forced_probability"
    assert ascent["measures"][key]["value"] < none["measures"][key]["value"]
    assert {item["kind"] for item in none["items"]} == {
        "forget", "forget_paraphrased", "retain", "real_authors", "world_facts"
    }  # fmt: skip
    said = []
    monkeypatch.setattr(forget_set, "read", lambda model, sets, known, **more: said.append(len(known)))
    go(folder, tmp_path, sets=[tofu], methods=methods)
    assert said == [3 + 3 + 3 + 1 + 1]  # all questions are known already


def test_a_retain_only_model_is_measured_once_and_again_where_its_file_is_damaged(
    folder, tofu_files, tmp_path, monkeypatch
):
    pytest.importorskip("scipy")
    tofu = {"protocol": "tofu", "source": str(tofu_files), "max_new_tokens": 2, "reference": str(folder)}
    bench = Workbench.load(str(folder), tmp_path / "stats")

    def made():
        config = parse_config({"model": "m", "perplexity": None, "sets": [tofu], "methods": ["none"]})
        return config.sets[0].make(Base(bench, tmp_path / "set"))

    first = made()
    alone = tofu_scores(anatomy(bench.model), bench.tok, first.sets, max_new_tokens=2)
    assert first.only[RATIOS].agg_value == pytest.approx(alone[RATIOS].agg_value)
    assert first.score(bench.loaded).measures["forget_quality"].agg_value == pytest.approx(1.0)  # compared with itself
    (kept,) = (tmp_path / "set").glob("reference-*.json")
    with monkeypatch.context() as patch:
        patch.setattr(forget_set, "retain_only_results", lambda *args, **options: pytest.fail("measured again"))
        assert made().only == first.only
    kept.write_text(kept.read_text()[:-9])
    assert made().only == first.only


@pytest.mark.parametrize("count", [4, 8, 20])
def test_no_question_of_tofu_is_trained_on_and_asked(count):
    retain = tuple(EditRequest(f"r{i}", f"Who is {i}?", answer="x") for i in range(count))
    probes = tuple(Asked(f"r{i}", f"Who is {i}?", "x") for i in range(8) if i < count)
    made = apart(TofuSets("forget01", (), retain, {"forget": (), "retain": probes}), 0)
    asked = {one.id for one in made.probes["retain"]}
    held = {request.id for request in made.retain}
    assert asked and asked | held == {request.id for request in retain} and asked.isdisjoint(held)
    assert len(held) >= count // 2


def test_tasks_are_those_of_editlib_ability(tiny_llama, tok, facts, tmp_path):
    pytest.importorskip("lm_eval")
    rows = [
        {"query": f"Where is {name}?", "choices": ["there", "in a river"], "gold": i % 2}
        for i, name in enumerate(NAMES)
    ]
    task = tmp_path / "places.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny = tmp_path / "plain"
    tiny.mkdir()
    save_model(tiny_llama, copy.deepcopy(tok), tiny)
    methods = ["none", {"method": "GA", "settings": {"learning_rate": 1e-2, "steps": 2}}]
    results = go(tiny, tmp_path, sets=[facts], methods=methods, ability={"tasks": [str(task)], "limit": 4})
    wanted = {(row.metric): row.value for row in run_ability({"base": tiny}, [str(task)], text=None, limit=4).rows}
    for cell in results["cells"]:
        assert cell["failed"] is None
        (told,) = cell["ability"]
        assert {row["metric"]: row["base"] for row in told["rows"]} == wanted
    assert {row["metric"]: row["value"] for row in by(results, "none")["ability"][0]["rows"]} == wanted
    assert not list((tmp_path / "out").glob(".edited-*"))
    (summary, *_) = results["sets"]["facts"]["methods"]
    assert any(name.endswith("acc") for name in summary["ability"])
