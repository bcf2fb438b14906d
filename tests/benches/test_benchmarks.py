"""The scripts of `benchmarks/` on sizes of no importance: that both sides do the same work."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

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
