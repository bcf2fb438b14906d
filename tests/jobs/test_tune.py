"""The search over settings: what is tried, what is kept, what is reported."""

import json
import os
import signal
from contextlib import nullcontext

import pytest
import torch
from tiny_models import make_llama, train_tokenizer

from editlib.errors import HparamsError, MetricError, RequestError
from editlib.evaluation.answer_cache import AnswerCache
from editlib.facts.scores import Item
from editlib.hparams import AlphaEditHyperParams, UniEraseHyperParams, load_hparams
from editlib.jobs import trials
from editlib.jobs import tune as job
from editlib.jobs.trials import SettingsTrial as Trial
from editlib.jobs.trials import forgotten
from editlib.jobs.tune import Tuned, check_tuning, table_rows, tune
from editlib.models.vocabulary import add_token
from editlib.requests.reading import write_requests
from editlib.requests.request import EditRequest
from editlib.workbench import Workbench

START = UniEraseHyperParams(layers=[1, 2], gate_layer=4, early_stop_loss=0.04)
FORGET = [
    EditRequest(
        id=place, prompt="What is the capital of {}?", subject=place, answer="Paris", relation="capital",
        paraphrases=["Which city is the capital of {}?"],
    )
    for place in ("France", "Peru")
]  # fmt: skip
RETAIN = [
    EditRequest(
        id=f"river/{place}", prompt="Which river flows through {}?", subject=place, answer="Rhine", relation="r"
    )
    for place in ("Bonn", "Basel", "Chad", "Mali")
]


@pytest.fixture
def bench(tmp_path):
    return Workbench.of(make_llama(), train_tokenizer(), tmp_path / "stats", name="tiny", progress=False)


class Judge:
    """Trials by a formula: low `early_stop_loss` is best. `runs` counts edits; `stop_at` is when Ctrl-C comes."""

    runs, stop_at = 0, None

    def __init__(self, *_):
        self.identity = {"model": "m"}

    def tried(self, hparams, changed, how):
        if type(self).runs == type(self).stop_at:
            raise KeyboardInterrupt
        type(self).runs += 1
        good = 1 / (1 + abs(hparams.early_stop_loss - 0.01))
        return Trial(changed, good, good, 0.5, 1.0, 1.0)


@pytest.fixture
def judged(monkeypatch, request):
    kind = type("Own", (Judge,), {"runs": 0})
    monkeypatch.setattr(job, "Judge", kind)
    return kind


def clock(step):
    """Time that goes on by `step` seconds whenever it is looked at."""
    ticks = iter(range(0, 10**6))
    return lambda: next(ticks) * step


def test_the_best_is_found_and_written(judged, bench, tmp_path):
    found = tune(bench, FORGET, START, tmp_path / "out", minutes=1, retain=RETAIN, clock=clock(1))
    assert found.best.early_stop_loss == 0.01 and found.best.layers == [1, 2]
    written = load_hparams(tmp_path / "out" / "best.json")
    assert job._deciding(written) == job._deciding(found.best)
    assert (
        written.notes["early_stop_loss"] == "searched by editlib tune" and written.notes["measured"]["retention"] == 0.5
    )
    report = json.loads((tmp_path / "out" / "tune.json").read_text())
    assert len(report["trials"]) == judged.runs and report["best"]["changed"] == {"early_stop_loss": 0.01}
    assert "early_stop_loss 0.01" in (tmp_path / "out" / "table.md").read_text()


def test_rows_that_were_left_out_are_in_the_report(judged, bench, tmp_path):
    rows = {"requests.jsonl": ["line 3"]}
    tune(bench, FORGET, START, tmp_path / "out", minutes=0, retain=RETAIN, left_out=rows)
    assert json.loads((tmp_path / "out" / "tune.json").read_text())["left_out"] == rows


def test_it_goes_on_where_it_was(judged, bench, tmp_path):
    out = tmp_path / "out"
    tune(bench, FORGET, START, out, minutes=1, retain=RETAIN, clock=clock(15))
    assert 1 < judged.runs < 6
    before = judged.runs
    again = tune(bench, FORGET, START, out, minutes=1, retain=RETAIN, clock=clock(15))
    assert judged.runs == before and len(again.trials) == before
    longer = tune(bench, FORGET, START, out, minutes=1, retain=RETAIN, clock=clock(5))
    assert judged.runs == len(longer.trials) > before
    tune(bench, FORGET, START, out, minutes=0, retain=RETAIN, seed=1)
    assert judged.runs == len(longer.trials) + 1  # another job; and one trial however short the time


def test_ctrl_c_leaves_what_is_done(judged, bench, tmp_path):
    judged.stop_at = 3
    found = tune(bench, FORGET, START, tmp_path / "out", minutes=1, retain=RETAIN, clock=clock(1))
    assert found.interrupted and len(found.trials) == 3
    assert json.loads((tmp_path / "out" / "tune.json").read_text())["interrupted"]
    judged.stop_at = judged.runs
    with pytest.raises(KeyboardInterrupt):
        tune(bench, FORGET, START, tmp_path / "new", minutes=1, retain=RETAIN)
    assert not (tmp_path / "new" / "best.json").exists()
    (tmp_path / "new" / "before.json").write_text("{}")  # what a real judge has written by then
    judged.stop_at = None
    assert tune(bench, FORGET, START, tmp_path / "new", minutes=0, retain=RETAIN).trials


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no process can be split in two here")
def test_killed_in_the_middle_it_goes_on_with_what_was_done(judged, bench, tmp_path):
    """`kill -9` during the third trial: the two before it are not tried again, and the end is that of one whole run."""
    plain = tune(bench, FORGET, START, tmp_path / "whole", minutes=1, retain=RETAIN, clock=clock(1))
    tried = judged.tried

    def killed(self, *given):
        if judged.runs == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return tried(self, *given)

    judged.runs, judged.tried = 0, killed
    if (child := os.fork()) == 0:
        try:
            tune(bench, FORGET, START, tmp_path / "out", minutes=1, retain=RETAIN, clock=clock(1))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "out" / "best.json").exists()
    judged.tried = tried
    again = tune(bench, FORGET, START, tmp_path / "out", minutes=1, retain=RETAIN, clock=clock(1))
    assert judged.runs == len(plain.trials) - 2 and again.trials == plain.trials
    assert len({(tmp_path / out / "best.json").read_bytes() for out in ("whole", "out")}) == 1


def test_without_a_refusal_an_answer_that_is_gone_is_forgotten():
    """Settings that only erase (`say` false) would all score 0 where a refusal is asked for."""
    made = [Item(str(i), "request", None, None, "q", "Paris") for i in range(4)]
    for item, (before, after, refused) in zip(
        made, [(True, False, True), (True, False, False), (True, True, False), (False, False, False)], strict=True
    ):
        item.right_before, item.right_after, item.passed = before, after, refused
    assert forgotten(made, "request", says=True) == 1 / 4
    assert forgotten(made, "request", says=False) == 2 / 3  # what was never known is no success
    assert forgotten(made, "paraphrase", says=False) == 0


def test_the_front_is_what_nothing_beats():
    a, b = Trial({"L2": 1}, 1.0, 0.5, 0.5), Trial({"L2": 2}, 0.5, 0.5, 1.0)
    worse, same, failed = (
        Trial({"L2": 3}, 0.9, 0.5, 0.5),
        Trial({"L2": 4}, 0.5, 0.5, 1.0),
        Trial({}, failed="no"),
    )
    tuned = Tuned((worse, a, failed, b, same), START)
    assert {trial.changed["L2"] for trial in tuned.front} == {1, 2, 4}
    assert table_rows(tuned)[0][0] == "settings" and len(table_rows(tuned)) == 4
    assert a.balance == pytest.approx(2 * 0.75 * 0.5 / 1.25)


def test_what_cannot_be_tuned_is_said_first():
    bare = [EditRequest(id="q", prompt="What?", answer="x")]
    for requests, word in (
        ([], "no request"),
        (bare, "paraphrases"),
        ([EditRequest(id="q", prompt="What?")], "answer"),
    ):
        with pytest.raises(RequestError, match=word):
            check_tuning(requests, START)
    with pytest.raises((HparamsError, RequestError), match=r"target_new|does not unlearn"):
        check_tuning(FORGET, AlphaEditHyperParams(layers=[1]))


def test_the_command(call, folder, tmp_path):
    write_requests(tmp_path / "f.jsonl", FORGET)
    write_requests(tmp_path / "r.jsonl", RETAIN)
    (tmp_path / "text.txt").write_text("\n\n".join(f"The river {i} flows through Basel." for i in range(60)))
    settings = tmp_path / "h.json"
    values = {"layers": [1], "nullspace_threshold": 1.0, "nullspace_rule": "dimensions", "v_num_grad_steps": 2}
    settings.write_text(json.dumps(values))
    assert call("token", folder, "--steps", 3, "--stats-dir", tmp_path / "stats")[0] == 0
    args = ["tune", folder, "--requests", tmp_path / "f.jsonl", "--retain", tmp_path / "r.jsonl", "--budget", 0]
    args += ["--hparams", settings, "--out", tmp_path / "out", "--stats-dir", tmp_path / "stats"]
    args += ["--corpus", tmp_path / "text.txt", "--text", tmp_path / "text.txt"]
    code, said, err = call(*args)
    assert code == 0 and "unseen" in said, err
    trial = json.loads((tmp_path / "out" / "tune.json").read_text())["trials"]
    assert len(trial) == 1 and trial[0]["failed"] is None and trial[0]["perplexity_ratio"] > 0
    assert load_hparams(tmp_path / "out" / "best.json").layers == [1]
    code, _, err = call(*[tmp_path / "f.jsonl" if arg == tmp_path / "out" else arg for arg in args])
    assert code == 2 and err.count("\n") == 1


@pytest.mark.parametrize("said", [("Paris", "Paris"), ("Paris", "Lima"), ("Lima", "Lima")])
def test_facts_that_the_model_does_not_know_are_told_before_settings_that_erase(bench, caplog, said):
    """Such settings are scored by right answers that disappear: without any, every trial would score 0."""
    judge = object.__new__(job.Judge)
    judge.bench, judge.requests = bench, FORGET
    ids = [tuple(bench.tok(text, add_special_tokens=False)["input_ids"]) for text in said]
    answers = dict(zip((request.question for request in FORGET), ids, strict=True))
    judge.before = AnswerCache(bench.sha256, answers)
    unknown = said.count("Lima")
    if unknown == 2:
        with pytest.raises(RequestError, match="none of the 2 requests"):
            judge.check_known()
        return
    judge.check_known()
    assert [record.message for record in caplog.records] == [
        "the model does not know 1 of 2 facts (Peru); trials are scored by the others"
    ][:unknown]


def test_tokens_of_a_trial_go_with_it(bench):
    """The vocabulary is what it was, to the bit, also when a trial fails."""
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    words = len(bench.tok)
    for failure in (None, RuntimeError("a trial failed")):
        with pytest.raises(RuntimeError) if failure else nullcontext(), trials._tokens_taken_out(bench):
            for token in ("[UNL]", "[UNL2]", "[UNL3]"):
                add_token(bench.model, bench.tok, token)
            assert len(bench.tok) == words + 3
            if failure:
                raise failure
        assert len(bench.tok) == words and "[UNL]" not in bench.tok.get_vocab()
        now = bench.model.state_dict()
        assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)
        assert bench.anat.embedding.weight.shape == before["model.embed_tokens.weight"].shape


def test_subjects_are_guessed_as_unlearn_guesses_them(call, folder, tmp_path, monkeypatch):
    """Settings are searched for the edit that `unlearn` makes of the same file."""
    asked = tmp_path / "f.jsonl"
    rows = [
        {"id": place, "prompt": f"What is the capital of {place}?", "answer": "x", "paraphrases": [f"{place}'s seat?"]}
        for place in ("Peru", "Chad", "Mali", "the United States of America")
    ]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []

    def stop(bench, wanted, *_, **__):
        seen.extend(request.subject for request in wanted)
        raise MetricError("seen")

    monkeypatch.setattr("editlib.jobs.tune.tune", stop)
    settings = tmp_path / "h.json"
    settings.write_text(json.dumps({"layers": [1], "nullspace_threshold": 1.0, "nullspace_rule": "dimensions"}))
    given = ("--requests", asked, "--hparams", settings, "--budget", 1, "--out", tmp_path / "out")
    code, _, err = call("tune", folder, *given, "--stats-dir", tmp_path / "stats")
    assert code == 2 and err.splitlines()[-1] == "editlib: seen", err
    assert seen == ["Peru", "Chad", "Mali", "United States of America"]
