"""CounterFact's measures against plain transformers, and a benchmark that goes on where it was stopped."""

import json

import pytest
import torch
from test_cli import refused

from editlib.benches import counterfact as bench_module
from editlib.benches.counterfact import bench_counterfact, check_plan
from editlib.benches.counterfact_scores import known_facts, score_edits
from editlib.benches.report import counterfact_rows, write_bench
from editlib.errors import HparamsError, ModelError, RequestError
from editlib.hparams import ALGORITHMS, FTHyperParams, MEMITHyperParams, ROMEHyperParams
from editlib.models.anatomy import anatomy
from editlib.models.prompts import PromptFormat
from editlib.requests.reading import read_requests, requests_hash
from editlib.requests.request import EditRequest
from editlib.workbench import Workbench

PLACES = ["France", "Peru", "Basel", "Bonn", "Chad", "Mali"]
ANSWERS = ["Paris", "Rotterdam", "the sea", "a river", "Lima", "Rhine"]
REQUESTS = [
    EditRequest(
        id=place,
        prompt="The capital of {} is",
        subject=place,
        target_new=ANSWERS[i],
        answer=ANSWERS[i - 1],
        paraphrases=["In {} the president lives in"],
        neighbours=[{"prompt": f"The city of {PLACES[i - 1]} is", "answer": ANSWERS[i - 1]}],
    )
    for i, place in enumerate(PLACES)
]


def mean_log_probability(model, tok, prompt, answer):
    ids, new = tok(prompt)["input_ids"], tok(" " + answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids + new])).logits[0].log_softmax(-1)
    return sum(float(logits[len(ids) - 1 + j, token]) for j, token in enumerate(new)) / len(new)


def test_the_measures_are_what_they_say(tiny_llama, tok):
    def likelier(prompt, one, other):
        return mean_log_probability(tiny_llama, tok, prompt, one) > mean_log_probability(tiny_llama, tok, prompt, other)

    got = score_edits(anatomy(tiny_llama), PromptFormat(tok), REQUESTS)
    asked = [(r, r.question) for r in REQUESTS]
    shares = {name: result.agg_value for name, result in got.items()}
    assert shares["efficacy"] == sum(likelier(text, r.target_new, r.answer) for r, text in asked) / 6
    rephrased = [likelier(r.filled_paraphrases[0], r.target_new, r.answer) for r in REQUESTS]
    assert shares["generalisation"] == sum(rephrased) / 6
    kept = [likelier(r.neighbours[0].prompt, r.neighbours[0].answer, r.target_new) for r in REQUESTS]
    assert shares["specificity"] == sum(kept) / 6
    said = []
    for r, text in asked:
        new = tok(" " + r.target_new, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([tok(text)["input_ids"]])
        out = tiny_llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(new), do_sample=False)
        said.append(out[0, ids.shape[1] :].tolist() == new)
    assert shares["generated"] == sum(said) / 6
    assert {result.n for result in got.values()} == {6} and 0 < sum(shares.values()) - shares["generated"] < 3
    for result in got.values():
        assert result.higher_is_better and result.interval[0] <= result.agg_value <= result.interval[1]


def test_facts_without_an_answer_are_left_out(tiny_llama, tok):
    bare = EditRequest(id="x", prompt="The capital of {} is", subject="Mali", target_new="Rhine")
    got = score_edits(anatomy(tiny_llama), PromptFormat(tok), [bare])
    assert {(result.n, result.agg_value) for result in got.values()} == {(0, None)}


def test_known_facts_are_those_the_model_says(tiny_llama_untied, tok):
    """The true answer is what plain transformers generates first, where that is a word; every other one is wrong."""
    model, asked, known = tiny_llama_untied, [], []
    words = [token for token in range(len(tok)) if tok.decode([token]).startswith(" ")]
    with torch.no_grad():
        model.lm_head.weight[words] *= 5  # so that words are said at all
    for i in range(120):
        text = f"In {PLACES[i % 6]} number {i} is"
        ids = torch.tensor([tok(text)["input_ids"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
        word = tok.decode(out[0, -1:])
        said = word.strip() if tok(word, add_special_tokens=False)["input_ids"] == [int(out[0, -1])] else ""
        true = word.startswith(" ") and said.isalpha() and i % 2
        asked.append(EditRequest(id=str(i), prompt=text, answer=said if true else "Nothing else"))
        known += [asked[-1]] if true else []
    assert len(known) > 2
    anat, form = anatomy(model), PromptFormat(tok)
    assert known_facts(anat, form, asked, 999, at_once=7) == known
    assert known_facts(anat, form, asked, 2) == known[:2]


FIND = {"context_templates": ["{}"], "v_num_grad_steps": 4}
SETTINGS = [
    FTHyperParams(layers=[2], num_steps=3, lr=0.01),
    ROMEHyperParams(layers=[2], mom2_adjustment=False, **FIND),
    MEMITHyperParams(layers=[1, 2], mom2_update_weight=0.01, **FIND),
]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"The river {i} flows by Basel and Bonn before it meets the sea." for i in range(60)))
    return str(path)


@pytest.fixture
def bench(tiny_llama, tok, tmp_path):
    tiny_llama.name_or_path = "tiny"
    return Workbench.of(tiny_llama, tok, tmp_path / "stats", name="tiny", progress=False)


def run(bench, corpus, out, **options):
    given = {"counts": [1, 4, 6], "corpus": corpus, "text": corpus, "stats_tokens": 300, **options}
    return bench_counterfact(bench, REQUESTS, SETTINGS, out, **given)


def test_cells_for_every_algorithm_mode_and_number(bench, corpus, tmp_path, monkeypatch):
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    cells = run(bench, corpus, tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in bench.model.state_dict().items())
    found = [(cell.algorithm, cell.mode, cell.edits) for cell in cells]
    assert len(set(found)) == len(found)
    both = [("FT", "batch"), ("FT", "sequential"), ("MEMIT", "batch"), ("MEMIT", "sequential"), ("ROME", "sequential")]
    assert set(found) == {(*kind, n) for kind in [*both, ("none", "-")] for n in (1, 4, 6)}
    # One edit at a time is the same as a batch of one.
    one = {mode: next(c for c in cells if (c.algorithm, c.mode, c.edits) == ("MEMIT", mode, 1)) for mode in
           ("batch", "sequential")}  # fmt: skip
    assert one["batch"].perplexity == pytest.approx(one["sequential"].perplexity, rel=1e-4)

    def never(_):
        raise AssertionError("measured again")

    monkeypatch.setattr(bench_module, "apply_function", never)
    again = run(bench, corpus, tmp_path / "out")
    assert again == cells
    assert run(bench, corpus, tmp_path / "out", counts=[1, 4]) == cells  # other numbers of the same job
    (tmp_path / "out" / "cells.jsonl").write_text(
        "".join(line + "\n" for line in (tmp_path / "out" / "cells.jsonl").read_text().split("\n")[:-2]) + '{"algor'
    )
    with pytest.raises(AssertionError, match="measured again"):  # a line that was cut is no cell
        run(bench, corpus, tmp_path / "out")
    rows = (tmp_path / "out" / "cells.jsonl").read_text().split("\n")
    assert rows[-1] == "" and all(json.loads(row) for row in rows[:-1])


def test_algorithms_with_the_same_settings_are_all_measured(bench, corpus, tmp_path):
    """MEMIT's settings are PRUNE's, too, where they are derived: the second was taken for done."""
    same = [ALGORITHMS[name].from_dict(SETTINGS[2].to_dict()) for name in ("PRUNE", "MEMIT", "MEMIT_seq")]
    given = {"counts": [1], "modes": ["sequential"], "corpus": corpus, "text": corpus, "stats_tokens": 300}
    cells = bench_counterfact(bench, REQUESTS, same, tmp_path / "out", **given)
    assert [cell.algorithm for cell in cells] == ["none", "PRUNE", "MEMIT", "MEMIT_seq"]
    assert bench_counterfact(bench, REQUESTS, same, tmp_path / "out", **given) == cells


def test_table_and_plot(bench, corpus, tmp_path):
    cells = run(bench, corpus, tmp_path / "out", counts=[1, 2], modes=["batch"])
    table, plot = write_bench(cells, tmp_path / "out")
    lines = table.read_text().splitlines()
    assert len(lines) == 2 + len(cells) and all(
        line.count("|") == len(counterfact_rows(cells)[0]) + 1 for line in lines
    )
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_too_few_requests_are_said_before_anything_is_written(bench, corpus, tmp_path):
    with pytest.raises(RequestError, match=r"6 of 6 requests .* at least 7"):
        run(bench, corpus, tmp_path / "out", counts=[7])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"algorithms": "ROME,NONE"}, "NONE.*unknown"),
        ({"edits": "1,x"}, "--edits '1,x'"),
        ({"edits": "0"}, "--edits '0'"),
        ({"modes": "batch,all"}, "--modes 'all'"),
        ({"algorithms": "ROME"}, "nothing would be measured"),  # which ended in the plot's traceback
        ({"algorithms": " , "}, "expected names of algorithms"),
        ({"hparams": ["FT/smollm2-135m"]}, "not among --algorithms"),
        ({"model": "./nowhere"}, "nowhere: no such folder"),
        ({"hparams": ["ROME/gpt2-xl"]}, "layer 47 was asked for, but the model has layers 0-29"),
    ],
)
def test_a_plan_that_makes_no_sense(words, message):
    given = {"model": "smollm2-135m", "algorithms": "ROME,MEMIT", "hparams": [], "edits": "1,10", "modes": "batch"}
    assert [one.algorithm for one in check_plan(**given).settings] == ["ROME", "MEMIT"]
    with pytest.raises((HparamsError, ModelError), match=message):
        check_plan(**{**given, **words})


def test_the_command(call, folder, corpus, tmp_path):
    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(json.dumps(request.to_dict()) + "\n" for request in REQUESTS))
    settings = tmp_path / "FT" / "mine.json"
    settings.parent.mkdir()
    settings.write_text(json.dumps({"layers": [2], "num_steps": 2}))
    args = [
        "--requests",
        facts,
        "--model",
        folder,
        "--algorithms",
        "FT",
        "--hparams",
        settings,
        "--out",
        tmp_path / "o",
    ]
    args += ["--text", corpus, "--edits"]
    code, said, err = call("bench", "counterfact", *args, "1,2")
    assert code == 0, err
    assert said.count("FT") == 4 and "plot.png" in said
    assert read_requests(tmp_path / "o" / "facts.jsonl") == REQUESTS[:2]
    refused(call("bench", "counterfact", *args, "1,9"), "at least 9")
    told = json.loads((tmp_path / "o" / "bench.json").read_text())
    assert told["requests_sha256"] == requests_hash(REQUESTS[:2]) and told["prompts"] == {"chat": False}
    assert told["first_prompt"] == "The capital of France is" and "left_out" not in told
    with facts.open("a") as file:
        file.write('{"id": "bad"}\n')
    refused(call("bench", "counterfact", *args, "1,2"), "facts.jsonl:7", "--skip-bad")
    code, _, err = call("bench", "counterfact", *args, "1,2", "--skip-bad", "--prompt", "tags=Q: {} A:")
    told = json.loads((tmp_path / "o" / "bench.json").read_text())
    assert code == 0 and told["left_out"] == {"facts.jsonl": ["line 7"]}, err
    assert told["first_prompt"] == "Q: The capital of France is A:" and told["hparams"]["FT"]["layers"] == [2]
