"""The scripts of `benchmarks/` on sizes of no importance: that both sides do the same work."""

import importlib
import sys
from functools import partial
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
