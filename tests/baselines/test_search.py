"""The search: the same budget for all, what is held out, restored weights, going on; and the command."""

import json
import math
from dataclasses import replace
from importlib import import_module

import pytest
from test_cli import refused
from transformers import AutoModelForCausalLM, AutoTokenizer

from editlib.baselines import BASELINES, BaselineSettings, Budget, Validation, apply_baseline_to_model, search, split
from editlib.baselines.search import check_range, rates
from editlib.baselines.validation import Recalls, recalls, score
from editlib.errors import EditError, HparamsError, OutputError, RequestError
from editlib.models.anatomy import anatomy
from editlib.models.weights import weights_sha256
from editlib.requests.reading import write_requests
from editlib.requests.request import EditRequest

module = import_module("editlib.baselines.search")  # the name is that of its function, too
BUDGET = Budget(rates=2, steps=4, points=2, questions=2)
SETTINGS = BaselineSettings(batch_size=2, precision="float32", warmup_steps=0)


@pytest.fixture
def parts(forget, retain):
    return split(forget, retain, questions=2)


def test_what_is_held_out_is_not_trained_on(forget, retain):
    many = [replace(retain[i % 5], id=f"r{i}", prompt=f"{i}. {retain[i % 5].prompt}") for i in range(12)]
    parts = split(forget, [*many, EditRequest("open", "Write a poem.")], questions=2, seed=1)
    assert len(parts.validation.retain) == 2 and len(parts.validation.forget) == 2
    assert set(parts.validation.ids) | {prompt.id for prompt in parts.retain} == {p.id for p in many} | {"open"}
    assert not set(parts.validation.ids) & {prompt.id for prompt in parts.retain}
    trained = {text for request in parts.forget for text in (request.question, *request.filled_phrasings)}
    assert not trained & {question for question, _ in parts.validation.forget} and len(trained) == 6
    assert all(question.startswith("Tell me where") for question, _ in parts.validation.forget)
    assert split(forget, many, questions=2, seed=1).validation == parts.validation
    bare = [replace(forget[0], phrasings=(), paraphrases=("And {}?",)), replace(forget[1], phrasings=())]
    asked = {question for question, _ in split(bare, many, seed=1).validation.forget}
    assert asked == {"And Author A?", forget[1].question}
    with pytest.raises(RequestError, match="4 retain prompts"):
        split(forget, many[:3])
    with pytest.raises(RequestError, match="answer"):
        split([EditRequest("x", "Why?")], many)


def test_scores_by_hand():
    before = Recalls((0.8,), (0.75, 0.0))
    found = score(Recalls((0.2,), (0.6, 0.0)), before)
    assert (found.forgetting, found.retention) == pytest.approx((0.75, 0.8))
    assert found.balance == pytest.approx(2 * 0.75 * 0.8 / 1.55)
    assert score(Recalls((0.9,), (0.9, 0.0)), before).balance == 0
    assert score(Recalls((0.0,), (0.0,)), Recalls((0.0,), (0.0,))).balance == 1
    assert before.means == (0.8, 0.375)


def test_what_was_learned_meanwhile_is_not_kept():
    """A model that had lost all it knew and answered other questions right counted as one that kept six tenths."""
    before = Recalls((1.0, 0.0), (1.0, 0.5, 0.0, 0.0))
    found = score(Recalls((0.0, 1.0), (0.0, 0.25, 1.0, 1.0)), before)
    assert (found.forgetting, found.retention) == pytest.approx((1.0, 1 / 6))


def test_recall_is_that_of_generated_answers(tiny_llama, tok_chat):
    """The references are what the model really says, and the half of it."""
    from editlib.evaluation.answer_cache import ask

    said = {q: tok_chat.decode(ids) for q, ids in ask(anatomy(tiny_llama), tok_chat, ["Where?", "Who is it?"]).items()}
    words = said["Where?"] + " basel bonn"
    pytest.importorskip("rouge_score")
    found = recalls(
        anatomy(tiny_llama), tok_chat, Validation((("Where?", words),), (("Who is it?", said["Who is it?"]),))
    )
    assert 0 <= found.forget[0] < 1 and found.retain[0] in (0.0, pytest.approx(1.0))


def test_every_baseline_has_the_same_budget(tiny_llama, tok_chat, parts, monkeypatch):
    monkeypatch.setattr(module, "recalls", lambda *_: Recalls((0.5,), (0.5,)))
    budget = Budget(rates=3, steps=8, points=2, questions=1)
    assert budget.measured == (4, 8)
    for name, entry in BASELINES.items():
        if entry.kind == "gradient":
            continue
        calls = []
        monkeypatch.setattr(module, "apply_baseline_to_model", lambda *args, **kw: calls.append(args[5]))  # noqa: B023
        found = search(name, tiny_llama, tok_chat, parts.forget, parts.retain, parts.validation, budget)
        assert len(found.trials) == len(calls) == (6 if entry.searched else 1)
        assert {run.steps for run in calls} == ({4, 8} if entry.searched else {None})
    monkeypatch.undo()
    monkeypatch.setattr(module, "recalls", lambda *_: Recalls((0.5,), (0.5,)))
    found = search("GA", tiny_llama, tok_chat, parts.forget, parts.retain, parts.validation, budget, SETTINGS)
    assert [(t.learning_rate, t.steps) for t in found.trials] == [(r, s) for r in rates("GA", budget) for s in (4, 8)]
    assert rates("GA", budget) == pytest.approx([1e-5, math.sqrt(3e-9), 3e-4], rel=1e-2)


def test_the_range_of_rates_is_the_users_where_given():
    assert rates("GA", Budget(rates=3, low=1e-4, high=4e-4)) == pytest.approx([1e-4, 2e-4, 4e-4])
    assert rates("GA", Budget(rates=2, high=1e-3)) == pytest.approx([1e-5, 1e-3])
    assert rates("GA", Budget(rates=1, low=1e-4, high=4e-4)) == pytest.approx([2e-4])
    with pytest.raises(HparamsError, match=r"from the learning rate 0\.001 to 0\.0003: expected a range"):
        check_range("GA", Budget(rates=2, low=1e-3))
    with pytest.raises(HparamsError, match="in-context has no learning rate"):
        check_range("in-context", Budget(high=1e-3))
    for bad in (0.0, -1e-4, math.inf, math.nan):
        with pytest.raises(HparamsError, match="high of a search is"):
            Budget(high=bad)


def test_trials_leave_the_model_as_it_was_and_go_on(tiny_llama, tok_chat, parts, tmp_path, monkeypatch):
    pytest.importorskip("rouge_score")
    sha, template = weights_sha256(tiny_llama), tok_chat.chat_template
    args = (tiny_llama, tok_chat, parts.forget, parts.retain, parts.validation, BUDGET, SETTINGS)
    before = recalls(anatomy(tiny_llama), tok_chat, parts.validation)
    whole = search("NPO+GD", *args)
    assert whole.before == before.means
    assert weights_sha256(tiny_llama) == sha and len(whole.trials) == 4
    real, seen = module.recalls, []

    def stops(*given):
        if len(seen) == 4:  # before, and three trials
            raise KeyboardInterrupt
        seen.append(real(*given))
        return seen[-1]

    monkeypatch.setattr(module, "recalls", stops)
    with pytest.raises(KeyboardInterrupt):
        search("NPO+GD", *args, out=tmp_path)
    assert weights_sha256(tiny_llama) == sha and tok_chat.chat_template == template
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == 3
    seen.clear()
    monkeypatch.setattr(module, "recalls", lambda *given: seen.append(0) or real(*given))
    found = search("NPO+GD", *args, out=tmp_path)
    assert len(seen) == 2, "before, and the one that was missing"
    assert [replace(t, seconds=0) for t in found.trials] == [replace(t, seconds=0) for t in whole.trials]
    assert found.best == replace(SETTINGS, learning_rate=found.chosen.learning_rate, steps=found.chosen.steps)
    apply_baseline_to_model("NPO+GD", tiny_llama, tok_chat, parts.forget, parts.retain, found.best)
    chosen = score(real(anatomy(tiny_llama), tok_chat, parts.validation), before)
    assert chosen.balance == found.chosen.balance, "applied, the best is what the trial was"
    monkeypatch.setattr(module, "weights_sha256", lambda _: sha)
    with pytest.raises(OutputError, match="other seed"):
        search("NPO+GD", *args, out=tmp_path, seed=5)


def test_the_best_at_an_edge_is_said_and_a_failed_trial_counts_nothing(tiny_llama, tok_chat, parts, monkeypatch):
    points = {(1e-5, 2): 0.2, (1e-5, 4): 0.3, (3e-4, 2): 0.9, (3e-4, 4): 0.95}

    def apply(name, model, tok, forget, retain, run, *, watch, watched, **_):
        for steps in watched:
            if (run.learning_rate, steps) == (3e-4, 4):
                raise EditError("the loss is not finite")
            now.append(points[run.learning_rate, steps])
            watch(steps)

    now = [0.0]
    monkeypatch.setattr(module, "apply_baseline_to_model", apply)
    monkeypatch.setattr(module, "recalls", lambda *_: Recalls((1 - now[-1],), (0.5,)))
    found = search("GA", tiny_llama, tok_chat, parts.forget, parts.retain, parts.validation, BUDGET, SETTINGS)
    assert found.edges == ("learning_rate high", "steps low")
    assert (found.chosen.learning_rate, found.chosen.steps) == (3e-4, 2)
    assert found.trials[-1].failed == "the loss is not finite" and found.trials[-1].balance == 0
    json.dumps(found.to_dict())
    with pytest.raises(HparamsError, match="points"):
        Budget(steps=2, points=3)


def test_the_seconds_of_trials_are_those_of_the_search(tiny_llama, tok_chat, parts, monkeypatch):
    """A trial's were counted from its run's beginning, and so the first steps of a run once for each of its trials."""

    def apply(*_, watch, watched, **__):
        begun = now[0]
        for steps in watched:
            now[0] = begun + 10.0 * steps
            watch(steps)

    def measure(*_):
        now[0] += 1
        return Recalls((0.5,), (0.5,))

    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(module, "apply_baseline_to_model", apply)
    monkeypatch.setattr(module, "recalls", measure)
    found = search("GA", tiny_llama, tok_chat, parts.forget, parts.retain, parts.validation, BUDGET, SETTINGS)
    assert [trial.seconds for trial in found.trials] == [21.0, 20.0, 21.0, 20.0]


# --- the command


@pytest.fixture
def files(tmp_path, forget, retain):
    write_requests(tmp_path / "forget.jsonl", forget)
    write_requests(tmp_path / "keep.jsonl", retain)
    return ["--requests", tmp_path / "forget.jsonl", "--retain", tmp_path / "keep.jsonl"]


def test_a_folder_that_eval_and_attack_read(call, folder, files, tmp_path):
    pytest.importorskip("rouge_score")
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    searched = ["--search", 1, "--max-steps", 2, "--points", 2, "--batch-size", 2]
    code, shown, err = call("baseline", folder, "--method", "npo+gd", *files, "--out", out, *searched)
    assert code == 0, err
    assert "NPO+GD" in shown and "retention" in shown
    model = AutoModelForCausalLM.from_pretrained(out)
    receipt = json.loads((out / "editlib.json").read_text())
    assert weights_sha256(model) == receipt["result_sha256"] != receipt["base"]["sha256"]
    found = receipt["baseline"]["search"]
    assert receipt["algorithm"] == "NPO+GD" and receipt["hparams"]["learning_rate"] == found["chosen"]["learning_rate"]
    assert len(found["trials"]) == 2 and not list(tmp_path.glob(".out*"))
    assert sorted(receipt["anchors"]) == ["f3", "f4", "f5", "f6", "f7"]
    assert "negative preference" in (out / "README.md").read_text()
    code, _, err = call("eval", folder, out, *files, "--out", tmp_path / "report", "--text", "none")
    assert code == 0, err
    code, _, err = call("attack", folder, out, *files[:2], "--out", tmp_path / "attacks", "--attacks", "direct")
    assert code == 0, err


def test_in_context_changes_the_template_alone(call, folder, files, tmp_path):
    out = tmp_path / "out"
    code, _, err = call("baseline", folder, "--method", "in-context", *files, "--out", out)
    assert code == 0, err
    question = AutoTokenizer.from_pretrained(out).apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    assert "Where does Author A live?" in question
    receipt = json.loads((out / "editlib.json").read_text())
    assert receipt["result_sha256"] == receipt["base"]["sha256"] and receipt["baseline"]["parameters"] == 0


def test_bad_input_is_one_line(call, folder, files, tmp_path):
    out = ["--out", tmp_path / "out"]
    refused(call("baseline", folder, "--method", "NPX", *files, *out), "NPX", "NPO")
    refused(call("baseline", folder, "--method", "GA", *files, *out, "--search", 2, "--steps", 3), "--search")
    refused(call("baseline", folder, "--method", "GA", *files, *out, "--low", 1e-5), "--search")
    searched = [*out, "--search", 2, "--low", 1e-2]
    refused(call("baseline", folder, "--method", "GA", *files, *searched), "0.01 to 0.0003")
    refused(call("baseline", folder, "--method", "in-context", *files, *searched), "no learning rate")
    refused(call("baseline", folder, "--method", "GA", "--requests", tmp_path / "no.jsonl", *out), "no.jsonl")
    assert not (tmp_path / "out").exists()
    code, shown, _ = call("baselines")
    assert code == 0 and all(name in shown for name in BASELINES)
