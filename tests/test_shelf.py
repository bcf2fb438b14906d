"""Stored results of resumable jobs: what is damaged counts as missing or is one line, whatever its JSON holds."""

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editlib.ability.measured import TaskResult, TaskScore
from editlib.attacks.outcome import AttackResult, Completion, LeakRate, Trial
from editlib.attacks.run import _opened
from editlib.baselines.search import TrialRun
from editlib.benches.points import CounterFactPoint, SequentialPoint
from editlib.errors import OutputError
from editlib.jobs import trials
from editlib.shelf import FINISHED, SEAL, Finished, JsonStore, append_cell, from_json, read_cells

CELL = CounterFactPoint("ROME", "batch", 3, 0.5, None, 1.0, None, 12.5, 3, "job")
POINT = SequentialPoint("ROME", 2, 4, None, 0.5, 1, None, None, 0.0, 1.01, 2.0, "job")
RUN = TrialRun(None, 3, 0.5, 0.5, 0.5, 1.0)
TRIAL = trials.SettingsTrial({"layers": [1]}, 0.5, 1, 0.25, None, 3.0)
WRONG = ("x", [1], {"a": 1}, True)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("one", [CELL, POINT, RUN, TRIAL])
def test_a_point_is_read_as_it_was_written(one):
    assert from_json(type(one), json.loads(json.dumps(asdict(one)))) == one


@pytest.mark.parametrize("one", [CELL, POINT, RUN])
def test_a_line_with_a_value_of_the_wrong_type_is_one_line(tmp_path, one):
    path = tmp_path / "cells.jsonl"
    for name, value in asdict(one).items():
        for wrong in WRONG:
            if (isinstance(value, str) and isinstance(wrong, str)) or (name == "failed" and wrong == "x"):
                continue
            path.unlink(missing_ok=True)
            append_cell(path, {**asdict(one), name: wrong})
            before = path.read_bytes()
            with pytest.raises(OutputError, match=r"cells\.jsonl: not written by an earlier run"):
                read_cells(path, type(one))
            assert path.read_bytes() == before


@given(json_values)
def test_any_json_is_a_point_or_a_type_error(value):
    for kind in (CounterFactPoint, SequentialPoint, TrialRun, trials.SettingsTrial):
        with pytest.raises(TypeError):
            from_json(kind, value)


SCORE = TaskScore(name="acc", agg_value=0.5, stderr=None, higher_is_better=True, aggregation="mean", items=(1, None))
MEASURED = TaskResult(("a", "b"), (SCORE,), 2.5)
SHARE = LeakRate(leaked=1, n=2, agg_value=0.5, interval=(0.0, 1.0), wilson=(0.1, 0.9), skipped={"why": 1})
ASKED = Trial("a", "Where?", ("Bonn",), (Completion("Where?", "Bonn", True),))
COLUMNS = ("edited", "base", "control")
ATTACK = AttackResult("paraphrase", "asks", dict.fromkeys(COLUMNS, SHARE), dict.fromkeys(COLUMNS, (ASKED,)), {}, 1.0)


@pytest.mark.parametrize("one", [MEASURED, ATTACK])
def test_results_are_read_as_they_were_written(one):
    assert type(one).from_dict(json.loads(json.dumps(one.to_dict()))) == one


def places(value, path=()):
    """The paths of all values inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*path, key)
        yield from places(one, (*path, key))


def put(value, path, wrong):
    """A copy with another value in one place."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = wrong
    return copy


@pytest.mark.parametrize(
    ("one", "read"),
    [(MEASURED.to_dict(), TaskResult.from_dict), (asdict(TRIAL), lambda kept: from_json(trials.SettingsTrial, kept))],
)
def test_a_finished_measurement_of_the_wrong_type_is_made_again(tmp_path, one, read):
    finished = Finished(tmp_path / "out")
    finished.keep("one", {"job": 1}, one)
    assert finished.find({"job": 1}, read) is not None
    (path,) = (tmp_path / "out" / FINISHED).glob("*.json")
    whole = json.loads(path.read_text())
    for wrong in (None, 3, "x", [], [3], {}, True):
        path.write_text(json.dumps({**whole, "measured": wrong}))
        if wrong != {} or "measures" in one:
            assert finished.find({"job": 1}, read) is None
        for where in places(json.loads(json.dumps(one))):
            path.write_text(json.dumps({**whole, "measured": put(one, where, wrong)}))
            finished.find({"job": 1}, read)  # read or made again
        path.write_text(json.dumps(wrong))
        assert finished.find({"job": 1}, read) is None


def test_a_finished_attack_of_the_wrong_type_is_made_again(tmp_path):
    job = {"seed": 0}
    assert _opened(tmp_path, job, overwrite=False) == {}
    path, whole = tmp_path / FINISHED / "paraphrase.json", json.loads(json.dumps(ATTACK.to_dict()))
    path.parent.mkdir()
    path.write_text(json.dumps(whole))
    assert _opened(tmp_path, job, overwrite=False) == {"paraphrase": ATTACK}
    for where in places(whole):
        for wrong in (None, 3, "x", [], [3], {}, True):
            path.write_text(json.dumps(put(whole, where, wrong)))
            for result in _opened(tmp_path, job, overwrite=False).values():
                result.to_dict()
                assert all(trial.leaked in (True, False) for trials in result.trials.values() for trial in trials)
    for wrong in (None, 3, "x", [], [3], {}):
        path.write_text(json.dumps(wrong))
        assert _opened(tmp_path, job, overwrite=False) == {}


@given(st.dictionaries(st.text(max_size=5), json_values, max_size=3))
def test_a_part_is_read_as_it_was_written(tmp_path_factory, value):
    store = JsonStore(tmp_path_factory.mktemp("store"))
    store.put("part", value)
    assert store.get("part") == value


def test_a_part_that_was_changed_counts_as_missing(tmp_path):
    store = JsonStore(tmp_path)
    value = {"sha256": "ab", "cost": {"seconds": 1.5, 3: None}, "rows": (1, 2)}
    store.put("edit", value)
    assert store.get("edit") == {"sha256": "ab", "cost": {"seconds": 1.5, "3": None}, "rows": [1, 2]}
    path = tmp_path / "edit.json"
    whole = json.loads(path.read_text())
    for where in [where for where in places(whole) if where != (SEAL,)]:
        for wrong in (None, 4, "x", [], {}, True):
            path.write_text(json.dumps(put(whole, where, wrong)))
            if json.loads(path.read_text()) != whole:
                assert store.get("edit") is None


def test_a_part_of_an_earlier_version_has_no_hash(tmp_path):
    (tmp_path / "edit.json").write_text(json.dumps({"sha256": "ab"}))
    assert JsonStore(tmp_path).get("edit") == {"sha256": "ab"}
