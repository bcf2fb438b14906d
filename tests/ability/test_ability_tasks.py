"""Tasks run by lm-eval: the same numbers as plain transformers and as lm-eval's own road, kept and gone on with."""

import copy
import functools
import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from questions import CHOICES, CONTINUATIONS, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from editlib.ability import harness, run, run_ability
from editlib.ability.local_file import CHOICE, CONTINUATION, LocalFile
from editlib.ability.prompting import rendered
from editlib.ability.tasks import load_tasks
from editlib.errors import FetchError, MetricError, RequestError
from editlib.models.prompt_settings import PromptSettings
from editlib.models.prompts import PromptFormat
from editlib.models.weights import save_model

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'editlib[ability]'")
DRAWS = 200


@pytest.fixture
def ability(saved, tmp_path):
    """`ability(*files, **options)` -> the report of base and edited, in `tmp_path/out`."""

    def measure(*tasks, **options):
        given = {"text": None, "bootstrap": DRAWS, "out": tmp_path / "out", **options}
        return run_ability(given.pop("models", saved), [str(task) for task in tasks], **given)

    return measure


@pytest.fixture
def watched(monkeypatch):
    """The names of models and tasks as they are measured."""
    seen = []
    original = run.measure_task

    def measure(lm, task, **options):
        seen.append(task.name)
        return original(lm, task, **options)

    monkeypatch.setattr(run, "measure_task", measure)
    return seen


def read(folder, context, continuation):
    """Nats of a continuation, and whether greedy decoding says it, from one plain forward pass."""
    model, tok = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    front, whole = tok(context)["input_ids"], tok(context + continuation)["input_ids"]
    with torch.no_grad():
        logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    at = range(len(front) - 1, len(whole) - 1)
    told = [float(logs[i, whole[i + 1]]) for i in at]
    return sum(told), all(int(logs[i].argmax()) == whole[i + 1] for i in at)


def test_choices_by_hand(saved, arc, ability):
    report = ability(arc, batch_size=3)
    right = {}
    for name, folder in saved.items():
        right[name] = []
        for row in CHOICES:
            context = row["query"] if row["query"].endswith("Answer:") else row["query"] + "\nAnswer:"
            logs = [read(folder, context, " " + choice)[0] for choice in row["choices"]]
            longs = [log / len(choice) for log, choice in zip(logs, row["choices"], strict=True)]
            right[name].append([some.index(max(some)) == row["gold"] for some in (logs, longs)])
    for at, metric in enumerate(("acc", "acc_norm")):
        base, edited = ([float(both[at]) for both in right[name]] for name in saved)
        row = report.row("edited", "arc", metric)
        assert (row.value, row.n, row.total, row.higher_is_better) == (statistics.fmean(edited), 5, 5, True)
        assert row.stderr == pytest.approx(statistics.stdev(edited) / math.sqrt(5))
        gaps = [after - before for before, after in zip(base, edited, strict=True)]
        assert row.difference == pytest.approx(statistics.fmean(gaps))
        assert row.difference_stderr == pytest.approx(statistics.stdev(gaps) / math.sqrt(5))
    assert right["base"] != right["edited"]


def test_continuations_by_hand(saved, lambada, ability):
    report = ability(lambada, batch_size=2)
    values = {}
    for name, folder in saved.items():
        logs, said = zip(*(read(folder, r["context"], " " + r["continuation"]) for r in CONTINUATIONS), strict=True)
        values[name] = math.exp(-statistics.fmean(logs))
        assert report.row(name, "lambada", "perplexity").value == pytest.approx(values[name], rel=1e-4)
        assert report.row(name, "lambada", "acc").value == statistics.fmean(said)
    row = report.row("edited", "lambada", "perplexity")
    assert row.difference == pytest.approx(values["edited"] - values["base"], rel=1e-3)
    assert row.higher_is_better is False and row.stderr > 0 and row.difference_stderr > 0


def test_a_model_without_preferences(lambada, arc, ability, tok, tiny_llama, tmp_path):
    with torch.no_grad():
        tiny_llama.model.norm.weight.zero_()  # all logits 0
    save_model(tiny_llama, tok, tmp_path / "flat")
    report = ability(lambada, arc, models={"flat": tmp_path / "flat"})
    tokens = [len(tok(" " + row["continuation"])["input_ids"]) for row in CONTINUATIONS]
    uniform = math.exp(statistics.fmean(tokens) * math.log(tiny_llama.config.vocab_size))
    assert report.row("flat", "lambada", "perplexity").value == pytest.approx(uniform, rel=1e-5)
    assert report.row("flat", "lambada", "acc").value == 0
    shortest = [[len(tok(" " + choice)["input_ids"]) for choice in row["choices"]] for row in CHOICES]
    right = [some.index(min(some)) == row["gold"] for some, row in zip(shortest, CHOICES, strict=True)]
    assert report.row("flat", "arc", "acc").value == statistics.fmean(right)


def test_the_numbers_are_those_of_lm_eval_alone(saved, arc, lambada, ability, tmp_path):
    """lm-eval loads the model by itself, as its command line does; `limit` means the first documents there, too."""
    report = ability(arc, lambada, batch_size=2, limit=4)
    for path in (arc, lambada):
        config = LocalFile.read(path).config(path.stem, tmp_path)
        alone = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(saved["edited"]), "dtype": "float32"},
            tasks=[config],
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
            batch_size=2,
            device="cpu",
            limit=4,
            bootstrap_iters=DRAWS,
        )["results"][path.stem]
        rows = [row for row in report.rows if (row.model, row.task) == ("edited", path.stem)]
        assert len(rows) == 2
        for row in rows:
            assert row.n == 4 and row.total == 5
            assert (row.value, row.stderr) == (alone[f"{row.metric},none"], alone[f"{row.metric}_stderr,none"])


@pytest.fixture
def chatty(pristine, pristine_toks, tmp_path):
    """A model whose tokenizer has a chat template, and puts BOS before a bare text."""
    tok = copy.deepcopy(pristine_toks["bos chat"])
    save_model(copy.deepcopy(pristine["llama"]), tok, tmp_path / "chatty")
    return tmp_path / "chatty"


def test_through_the_chat_template_the_numbers_are_those_of_lm_eval(chatty, arc, lambada, ability, tmp_path):
    how = PromptSettings(chat=True, system="Be brief.")
    report = ability(arc, lambada, batch_size=2, models={"chatty": chatty}, prompts=how)
    plain = ability(arc, lambada, batch_size=2, models={"chatty": chatty})
    assert report.job["prompts"] == {"chat": True, "system": "Be brief."} and plain.job["prompts"] is None
    assert "Be brief." in report.note() and "prompts" not in plain.note()
    for path in (arc, lambada):
        alone = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(chatty), "dtype": "float32", "add_bos_token": False},
            tasks=[LocalFile.read(path).config(path.stem, tmp_path)],
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
            batch_size=2,
            device="cpu",
            bootstrap_iters=DRAWS,
            apply_chat_template=True,
            system_instruction="Be brief.",
        )
        for row in (row for row in report.rows if row.task == path.stem):
            assert row.value == alone["results"][path.stem][f"{row.metric},none"]
        asked = alone["samples"][path.stem][0]["arguments"][0][0]
        assert report.job["tasks"][path.stem]["first_prompt"] == asked and asked.endswith("<|im_start|>assistant\n")
    assert [row.value for row in report.rows] != [row.value for row in plain.rows]


def test_between_tags(saved, arc, ability):
    report = ability(arc, prompts=PromptSettings(tags="Q: {}\nA:"))
    right = []
    for row in CHOICES:
        asked = row["query"] if row["query"].endswith("Answer:") else row["query"] + "\nAnswer:"
        logs = [read(saved["base"], f"Q: {asked}\nA:", " " + choice)[0] for choice in row["choices"]]
        right.append(logs.index(max(logs)) == row["gold"])
    assert report.row("base", "arc", "acc").value == statistics.fmean(right)
    first = report.job["tasks"]["arc"]["first_prompt"]
    assert first == "Q: Question: What is the capital of France?\nAnswer:\nA:"


@pytest.mark.parametrize(
    ("history", "begins", "text"),
    [
        ([("system", "S."), ("user", "Q?")], True, "<system>S.<user>Q?<assistant>"),
        ([("user", "Q?")], True, "<user>Q?<assistant>"),
        ([("user", "Q?"), ("assistant", "So")], False, "<user>Q?<assistant>So"),
    ],
)
def test_a_history_as_text(tok, history, begins, text):
    """What a task describes is the system's turn; where a template has none, it comes before the question."""
    turns = [{"role": role, "content": content} for role, content in history]
    begun = "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    turn = "{{ '<' + m.role + '>' + m.content }}"
    tok.chat_template = "{% for m in messages %}" + turn + "{% endfor %}" + begun
    assert rendered(PromptFormat(tok), turns, add_generation_prompt=begins) == text
    refuses = "{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}" + turn
    silent = "{% if m.role != 'system' %}" + turn + "{% endif %}"
    for other in (refuses, silent):
        tok.chat_template = "{% for m in messages %}" + other + "{% endfor %}" + begun
        folded = text.replace("<system>S.<user>", "<user>S.\n\n")
        assert rendered(PromptFormat(tok), turns, add_generation_prompt=begins) == folded


def test_prompts_are_part_of_the_job(arc, ability, watched, chatty, saved):
    models = {"chatty": chatty}
    for how in (None, PromptSettings(chat=True), PromptSettings(system="S."), PromptSettings(tags="{}:")):
        before = len(watched)
        ability(arc, models=models, prompts=how)
        ability(arc, models=models, prompts=how)
        assert len(watched) == before + 1, how
    with pytest.raises(MetricError, match="--prompt is for tasks"):
        ability(models=models, text="wiki-sample", prompts=PromptSettings(chat=True))
    with pytest.raises(RequestError, match="tokenizer has none"):
        ability(arc, models=saved, prompts=PromptSettings(system="S."))


def test_the_day_is_that_of_the_edit(arc, ability, chatty, tmp_path):
    (chatty / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %B %Y') }}{% for m in messages %}{{ ' ' + m['content'] }}{% endfor %}"
    )
    (chatty / "editlib.json").write_text(
        json.dumps({"base": {"name": "x", "sha256": "y"}, "prompts": {"chat": True, "date": "2026-01-31"}})
    )
    report = ability(arc, models={"edited": chatty}, prompts=PromptSettings(chat=True))
    assert report.job["prompts"]["date"] == "2026-01-31"
    assert report.job["tasks"]["arc"]["first_prompt"].startswith("31 January 2026 Question:")


@pytest.mark.parametrize(
    ("official", "shape", "rows", "row"),
    [
        (
            "lambada/lambada_openai.yaml",
            CONTINUATION,
            CONTINUATIONS,
            lambda one: {"text": f"{one['context']} {one['continuation']}"},
        ),
        (
            "arc/arc_easy.yaml",
            CHOICE,
            [one for one in CHOICES if "Answer:" not in one["query"]],
            lambda one: {
                "question": one["query"].removeprefix("Question: "),
                "choices": {"text": one["choices"], "label": list("ABCD")[: len(one["choices"])]},
                "answerKey": "ABCD"[one["gold"]],
            },
        ),
    ],
)
def test_a_file_asks_and_scores_as_the_official_task(official, shape, rows, row, tmp_path):
    import yaml

    settings = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / official).read_text(encoding="utf-8"))
    assert settings["metric_list"] == shape.config["metric_list"]
    for one in ("tag", "dataset_name", "training_split", "validation_split"):
        settings.pop(one, None)
    data = write_lines(tmp_path / "official.jsonl", [row(one) for one in rows])
    place = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
    settings |= {"task": "official", "dataset_path": "json", "dataset_kwargs": place}
    (tmp_path / "official.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    ours = write_lines(tmp_path / "ours.jsonl", rows)
    asked = {}
    for task in load_tasks([str(tmp_path / "official.yaml"), str(ours)], tmp_path):
        task.object.build_all_requests()
        asked[task.name] = [one.args for one in task.object.instances]
    assert asked["official"] == asked["ours"] and len(asked["ours"]) >= len(rows)


def test_a_seed_draws_the_same_documents_for_all_models(arc, ability, tmp_path):
    whole = ability(arc, out=tmp_path / "whole")

    def documents(out):
        found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((out / "finished").iterdir())]
        return {tuple(one["measured"]["documents"]) for one in found}

    (everything,) = documents(tmp_path / "whole")
    drawn = {}
    for seed in range(4):
        report = ability(arc, limit=3, seed=seed, out=tmp_path / str(seed))
        (drawn[seed],) = documents(tmp_path / str(seed))
        assert [one for one in everything if one in drawn[seed]] == list(drawn[seed]) and len(drawn[seed]) == 3
        assert report.row("base", "arc", "acc").n == 3
    assert len(set(drawn.values())) > 1
    assert drawn[0] != everything[:3] or drawn[1] != everything[:3]
    assert whole.row("base", "arc", "acc").n == 5
    assert harness.chosen(5, None, 1) is harness.chosen(5, 5, 1) is harness.chosen(5, 2, None) is None


def test_it_goes_on_where_it_was_stopped(arc, lambada, ability, watched, tmp_path, monkeypatch):
    spied = run.measure_task

    def stopped(lm, task, **options):
        if len(watched) == 3:
            raise KeyboardInterrupt
        return spied(lm, task, **options)

    with monkeypatch.context() as patch:
        patch.setattr(run, "measure_task", stopped)
        with pytest.raises(KeyboardInterrupt):
            ability(arc, lambada)
    assert watched == ["arc", "lambada", "arc"] and not (tmp_path / "out" / "ability.json").exists()
    report = ability(arc, lambada)
    assert watched == ["arc", "lambada", "arc", "lambada"]
    assert report == ability(arc, lambada) and len(watched) == 4
    fresh = ability(arc, lambada, out=None)
    assert fresh.rows == report.rows and len(watched) == 8
    assert not list((tmp_path / "out" / "finished").glob(".*"))


def test_only_the_same_job_is_taken_from_an_earlier_run(arc, ability, watched, tmp_path):
    ability(arc)
    one = sorted((tmp_path / "out" / "finished").iterdir())[0]
    one.write_text(one.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    ability(arc)
    assert len(watched) == 3  # the damaged one
    for changed in ({"limit": 4}, {"limit": 4, "seed": 1}, {"batch_size": 2}, {"bootstrap": DRAWS + 1}):
        before = len(watched)
        ability(arc, **changed)
        assert len(watched) == before + 2, changed
    before = len(watched)
    write_lines(arc, [*CHOICES[:4], {**CHOICES[4], "gold": 0}])
    ability(arc)
    assert len(watched) == before + 2
    ability(arc, overwrite=True)
    assert len(watched) == before + 4


def test_the_same_weights_under_another_name_are_not_measured_again(arc, ability, saved, watched):
    first = ability(arc)
    report = ability(arc, models={"before": saved["base"], "after": saved["edited"], "copy": saved["base"]})
    assert len(watched) == 2
    assert report.row("after", "arc", "acc").value == first.row("edited", "arc", "acc").value
    assert (report.row("copy", "arc", "acc").difference, report.row("copy", "arc", "acc").difference_stderr) == (0, 0)


def test_the_callers_generators_and_tokenizer_stay(arc, ability, tiny_llama, tok, monkeypatch):
    import random

    import numpy as np

    assert tok.pad_token is None
    monkeypatch.setattr(run, "load", lambda *_, **__: (tiny_llama, tok))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    wanted = random.random(), np.random.random(), float(torch.rand(()))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    ability(arc)
    assert (random.random(), np.random.random(), float(torch.rand(()))) == wanted
    assert tok.pad_token is None


def small_index(monkeypatch, folder):
    """lm-eval's own list of tasks takes seconds to read: one with the tasks in `folder` instead."""
    made = functools.partial(lm_eval.tasks.TaskManager, include_path=str(folder))
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_defaults: made(include_defaults=False))


def task_file(folder, arc, **changed):
    import yaml

    place = {"data_files": {"test": str(arc)}, "cache_dir": str(folder / "cache")}
    settings = {
        "task": "my_arc",
        "dataset_path": "json",
        "dataset_kwargs": place,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        **changed,
    }
    (folder / "mine").mkdir(exist_ok=True)
    (folder / "mine" / "my_arc.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder / "mine" / "my_arc.yaml"


def test_a_task_by_name_or_by_file(arc, ability, tmp_path, monkeypatch):
    path = task_file(tmp_path, arc, tag="mine")
    by_file = ability(path)
    small_index(monkeypatch, path.parent)
    assert ability("my_arc").rows == ability("mine").rows == by_file.rows
    assert by_file.row("base", "my_arc", "acc").n == 5
    with pytest.raises(MetricError, match=r"task 'my_ark': lm-eval has no task of this name \(near: my_arc\)"):
        ability("my_ark")


@pytest.mark.parametrize(
    ("changed", "error", "expected"),
    [
        ({"doc_to_choice": "absent"}, MetricError, "lm-eval cannot make a task from it"),
        ({"output_type": "poem"}, MetricError, "Got invalid output_type 'poem'"),
        ({"dataset_kwargs": {"data_files": "no/such/file.jsonl"}}, FetchError, "its documents cannot be loaded"),
    ],
)
def test_a_task_file_that_lm_eval_refuses_is_one_line(arc, ability, tmp_path, changed, error, expected):
    with pytest.raises(error, match=expected) as found:
        ability(task_file(tmp_path, arc, **changed))
    assert "\n" not in str(found.value) and not (tmp_path / "out").exists()


def test_names_that_stand_for_nothing(arc, ability, tmp_path, monkeypatch):
    small_index(monkeypatch, tmp_path)
    (tmp_path / "twin").mkdir()
    write_lines(tmp_path / "twin" / "arc.jsonl", CHOICES)
    with pytest.raises(MetricError, match="two tasks are named 'arc'"):
        ability(arc, tmp_path / "twin" / "arc.jsonl")
    for given in (tmp_path / "absent.jsonl", tmp_path / "absent.yaml", tmp_path / "arc.csv", "some/where"):
        with pytest.raises(RequestError, match=r"cannot be read|no such file|expected a name"):
            ability(given)
    assert not (tmp_path / "out").exists()


def test_what_stops_lm_eval_is_one_line_and_earlier_results_stay(arc, lambada, ability, watched, tmp_path, monkeypatch):
    def broken(_):
        raise OverflowError("math range error")

    from lm_eval.api import registry

    monkeypatch.setattr(registry.get_aggregation("perplexity"), "__code__", broken.__code__)
    with pytest.raises(MetricError, match=r"task lambada: lm-eval stopped \(OverflowError: math range error\)"):
        ability(arc, lambada)
    assert [file.name.split(".")[0] for file in (tmp_path / "out" / "finished").iterdir()] == ["base-arc"]
