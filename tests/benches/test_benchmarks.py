"""The scripts of `benchmarks/` on sizes of no importance: that both sides do the same work."""

import importlib
import json
import sys
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path

import pytest
import torch

from editlib.algorithms import rows as rows_module
from editlib.algorithms.rows import Goals, Row
from editlib.models.anatomy import anatomy

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
NAMES = sorted(path.stem for path in SCRIPTS.glob("*.py"))


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", NAMES)
def test_each_script_finds_what_it_takes_from_the_library(scripts, name):
    """They were left with names that had moved, and stopped at their first line."""
    importlib.import_module(name)


@pytest.mark.parametrize(("past", "kept_out"), [(0, 8), (30, 8), (30, 32)])
def test_both_solves_give_one_update(scripts, past, kept_out):
    from solve import compare

    row = compare(96, 24, 12, past, kept_out, torch.device("cpu"))
    assert row["error"] < 1e-10
    assert row["residual"] < 1e-10
    assert row["dense_error"] < 1e-3  # fp32


def test_dense_figures_are_taken_over(scripts):
    from solve import compare

    known = {"dense_seconds": 8.0, "dense_mb": 4.0}
    row = compare(96, 24, 12, 0, 8, torch.device("cpu"), known)
    assert row["dense_seconds"] == 8.0
    assert row["time_ratio"] == pytest.approx(8.0 / row["seconds"])


def test_values_from_rows_are_those_of_whole_passes(scripts, tiny_llama, monkeypatch):
    """Every step of Gauss-Newton, with a Jacobian that is read anew each time and no rest."""
    import plain_rows

    monkeypatch.setattr(rows_module, "HALVED", 0.0)
    monkeypatch.setattr(rows_module, "MET", 0.0)
    rows = [
        Row("keep", 0, (7, 9, 20, 12, 20, 14), (2, 4), (3, 4, 5), (13, 14, 15)),
        Row("erase", 0, (5, 9, 20, 31, 44, 8, 61), (2,), (6,), (70,), (80, 81, 82)),
        Row("erase", 1, (11, 25, 30), (0,), (2,), (99,), (85, 86)),
        Row("keep", 1, (6, 11, 26, 33, 35), (1,), (4,), (99,)),
    ]
    goals, kinds = Goals(erased=-4.0), [row.kind for row in rows]
    found = rows_module.find_row_values(anatomy(tiny_llama), rows, 1, ["a", "b"], goals, steps=3)
    wanted = plain_rows.find(tiny_llama, tiny_llama.model.layers[1], rows, partial(goals.wanted, kinds), steps=3)
    assert float((found.after - found.before).abs().max()) > 0.3
    torch.testing.assert_close(found.after, wanted, rtol=1e-3, atol=1e-3)


def test_published_statistics_are_those_of_one_pass(scripts, tiny_llama):
    from published import layer_stats

    rows, seen = [[3, 4, 5], [6, 7]], []
    layer, matrix = tiny_llama.model.layers[1], tiny_llama.model.layers[1].mlp.down_proj
    total = layer_stats(tiny_llama, layer, matrix, [rows])
    handle = matrix.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for row in rows:
            tiny_llama(torch.tensor([row]))
    handle.remove()
    keys = torch.cat(seen)
    torch.testing.assert_close(total, keys.T @ keys, atol=1e-4, rtol=1e-4)


# --- `make bench` -----------------------------------------------------------------------------------

ASKED_FOR = {  # by the owner of the project, in `runs/bench/results.json`
    "values_ratio_contexts",
    "values_ratio_default",
    "job_ratio",
    "statistics_ratio",
    "token_ratio",
    "solve_time_ratio",
    "solve_memory_ratio",
    "sequential_flatness",
}
SIZES = ["--requests", "2", "--facts", "1", "--batches", "7", "--solve", "96", "24"]


@pytest.fixture
def bench(scripts, tok, tmp_path, monkeypatch):
    """The script with a tiny model of ten layers in place of the packaged one, and little of everything."""
    import bench
    import published
    import sides

    from editlib import Workbench

    shipped = {name: bench.load_hparams(name) for name in ("AlphaEdit/smollm2-135m",)}
    few_steps = {"v_num_grad_steps": 2, "v_loss_layer": 9, "context_templates": ["{}"]}
    monkeypatch.setattr(bench, "load_hparams", lambda name: replace(shipped[name], **few_steps))
    monkeypatch.setattr(published.Settings, "__init__", partialmethod(published.Settings.__init__, steps=2))
    model = sides.random_model("tiny", len(tok), torch.device("cpu"), torch.float32)
    model.generation_config.eos_token_id = tok.eos_token_id
    side = bench.Side("smollm2-135m")
    side.__dict__["bench"] = Workbench.of(model, tok, tmp_path / "stats", name="tiny", progress=False)
    monkeypatch.setattr(bench, "Side", lambda name: side)
    # Values from rows are compared with whole passes above.
    monkeypatch.setattr(bench, "PARTS", {name: part for name, part in bench.PARTS.items() if name != "rows"})
    monkeypatch.setattr(bench, "RATIOS", [name for name in bench.RATIOS if not name.startswith("rows")])
    monkeypatch.setattr(bench, "STATISTICS_TOKENS", 400)
    monkeypatch.setattr(bench, "ASKED", 3)
    few = {"steps": 3, "robust_steps": 1, "batch": 2, "questions": 8, "guard_prompts": 6, "guard_tokens": 3}
    for name in ("FORMER", "TOKEN"):
        monkeypatch.setattr(bench, name, replace(getattr(bench, name), **few))
    return bench


def test_the_benchmark_writes_every_ratio_and_goes_on_where_it_was_stopped(bench, tmp_path, monkeypatch):
    out = tmp_path / "bench"
    bench.main(["--out", str(out), "--only", "solve", *SIZES])
    first = json.loads((out / "results.json").read_text())
    assert first["solve_time_ratio"] > 0
    assert ASKED_FOR - set(first) == set(first["missing"]) & ASKED_FOR != set()

    bench.main(["--out", str(out), *SIZES])
    found = json.loads((out / "results.json").read_text())
    assert found["missing"] == []
    assert all(found[name] > 0 for name in ASKED_FOR)
    assert found["solve_time_ratio"] == first["solve_time_ratio"]  # it was finished
    parts = found["parts"]
    assert found["token_ratio"] == pytest.approx(parts["token"]["before"] / parts["token"]["now"])
    for side in ("before", "now"):
        assert 0 <= parts["token"][f"{side}_ended_chat"] <= parts["token"][f"{side}_refused_chat"] <= 1
    assert found["sequential_flatness"] == pytest.approx(parts["sequential"]["last"] / parts["sequential"]["first"])

    def measured(side, args):
        raise AssertionError("measured again")

    monkeypatch.setattr(bench, "PARTS", {name: (measured, keys) for name, (_, keys) in bench.PARTS.items()})
    bench.main(["--out", str(out), *SIZES])
    again = json.loads((out / "results.json").read_text())
    assert {name: again[name] for name in ASKED_FOR} == {name: found[name] for name in ASKED_FOR}
    with pytest.raises(AssertionError, match="measured again"):
        bench.main(["--out", str(out), *SIZES, "--batches", "8"])  # another job


def test_a_part_that_does_not_exist_is_refused(bench):
    with pytest.raises(SystemExit, match="solv: expected values, job"):
        bench.main(["--only", "solv"])


def test_the_former_way_learns_rows_that_refuse(scripts, tiny_llama, tok):
    """Both ways go down the same loss from the same start."""
    import former_token

    from editlib.models.anatomy import anatomy
    from editlib.models.vocabulary import add_token

    questions, refusals = (
        [f"What is the capital of {x}?" for x in "abcdefgh"],
        ["I do not know.", "I can not say that."],
    )
    few = replace(former_token.FORMER, batch=8, layers=(1, 2), guard_prompts=4, guard_tokens=3, guard_weight=0.0)
    anat = anatomy(tiny_llama)

    def nll(steps):
        settings = replace(few, steps=steps, robust_steps=0, averaged_steps=1)
        (row,) = former_token.learn(anat, tok, questions, refusals, hparams=settings)
        number = add_token(anat.model, tok, "[UNL]")
        ids = tok(questions[0])["input_ids"] + [number] + tok(" " + refusals[0])["input_ids"]
        start = len(tok(questions[0])["input_ids"]) + 1
        with torch.no_grad():
            tiny_llama.get_input_embeddings().weight[number] = row
            logits = tiny_llama(torch.tensor([ids])).logits[0]
        return float(torch.nn.functional.cross_entropy(logits[start - 1 : -1], torch.tensor(ids[start:])))

    assert nll(40) < nll(1) - 0.1
