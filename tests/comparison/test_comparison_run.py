"""Cells: run once, kept part by part, gone on with after a crash, shared out, and none stops another."""

from __future__ import annotations

import json
import shutil
import threading

import pytest

from editlib.attacks.outcome import COLUMNS
from editlib.comparison import evaluator
from editlib.comparison.method import Prepared
from editlib.comparison.methods import METHODS
from editlib.comparison.run import compare
from editlib.comparison.store import ResultStore, try_lock
from editlib.distributed import Process
from editlib.errors import ConfigError, OutputError
from editlib.shelf import JsonStore

ALL = [("forgets", 0), ("forgets", 1), ("half", 0), ("half", 1)]


ATTACKS = ["direct", "banned-token"]


class Stopped(BaseException):
    """The process dies."""


def told(attack):
    """An attack that brought nothing back."""
    return {"attack": attack, "meaning": attack, "shares": {}, "trials": dict.fromkeys(COLUMNS, ()), "seconds": 0.0}


def cell(results, method, seed=0):
    return next(one for one in results["cells"] if (one["method"], one["seed"]) == (method, seed))


def summary(results, method):
    return next(one for one in results["sets"]["written"]["methods"] if one["method"] == method)


def test_a_second_run_runs_nothing_and_says_the_same(bench):
    first = bench.compare()
    assert bench.runs() == ALL
    assert bench.compare() == first
    assert bench.runs() == []


def test_a_changed_config_runs_what_changed(bench):
    bench.compare()
    bench.runs()
    bench.compare(methods=["none", {"method": "forgets", "strength": 2.0}, {"method": "half", "label": "renamed"}])
    assert bench.runs() == [("forgets", 0), ("forgets", 1)]
    bench.compare(seeds=[1, 2])
    assert bench.runs() == [("forgets", 2), ("half", 2)]


def test_another_attack_does_not_measure_the_rest_again(bench, monkeypatch):
    monkeypatch.setattr(evaluator.SetEvaluator, "_attack", lambda self, name: lambda workbench: told(name))
    first = bench.compare(methods=["forgets"], seeds=[0], attacks=ATTACKS)
    bench.runs()
    monkeypatch.setattr(evaluator.SetEvaluator, "_scores", lambda *_: pytest.fail("scored again"))
    attacks = ["direct", "plain-form"]
    second = bench.compare(methods=["forgets"], seeds=[0], attacks=attacks)
    assert bench.runs() == [("forgets", 0)]  # the model is needed again, its scores are not
    assert list(cell(second, "forgets")["attacks"]) == ["direct", "plain-form"]
    assert cell(second, "forgets")["items"] == cell(first, "forgets")["items"]


def test_another_set_is_another_cell(bench):
    bench.compare(methods=["forgets"], seeds=[0])
    bench.runs()
    assert bench.compare(methods=["forgets"], seeds=[0], sets=[{"protocol": "written", "facts": 2}])
    assert bench.runs() == [("forgets", 0)]


def test_killed_between_cells_it_goes_on(bench):
    METHODS["half"].fault = Stopped()
    with pytest.raises(Stopped):
        bench.compare()
    assert bench.runs() == [("forgets", 0), ("forgets", 1), ("half", 0)] and METHODS["half"].looked == [0]
    METHODS["half"].fault = None
    results = bench.compare()
    assert bench.runs() == [("half", 0), ("half", 1)]
    assert METHODS["half"].looked == [0]  # what was found was kept, and goes for all seeds
    assert cell(results, "half", 1)["cost"]["search_seconds"] == 3.0 and summary(results, "half")["forget"] == 0.5
    assert not any(one["failed"] for one in results["cells"])


def test_killed_inside_a_cell_it_keeps_what_was_measured(bench, monkeypatch):
    asked = []

    def attack(self, name):
        def measure(workbench):
            asked.append(name)
            if len(asked) == 2:
                raise Stopped
            return told(name)

        return measure

    monkeypatch.setattr(evaluator.SetEvaluator, "_attack", attack)
    with pytest.raises(Stopped):
        bench.compare(methods=["forgets"], seeds=[0], attacks=ATTACKS)
    bench.compare(methods=["forgets"], seeds=[0], attacks=ATTACKS)
    assert asked == ["direct", "banned-token", "banned-token"]


def test_a_failing_cell_is_recorded_and_tried_again_and_stops_nothing(bench):
    methods = ["breaks", "forgets"]
    results = bench.compare(methods=methods)
    assert cell(results, "breaks", 1)["failed"] == "no finite solution in any layer"
    assert summary(results, "breaks")["done"] == 0 and summary(results, "breaks")["front"] is False
    assert summary(results, "forgets")["forget"] == 1.0
    bench.runs()
    METHODS["breaks"].fault = None
    results = bench.compare(methods=methods)
    assert bench.runs() == [("breaks", 0), ("breaks", 1)]
    assert not any(one["failed"] for one in results["cells"]) and summary(results, "breaks")["forget"] == 1.0


def test_a_failing_measurement_leaves_the_others(bench, monkeypatch):
    def attack(self, name):
        return lambda workbench: 1 / 0

    monkeypatch.setattr(evaluator.SetEvaluator, "_attack", attack)
    found = cell(bench.compare(methods=["forgets"], seeds=[0], attacks=ATTACKS), "forgets")
    assert found["forget"]["value"] == 1.0 and not found["attacks"]
    assert found["failed"] == "; ".join(
        f"attack {n}: ZeroDivisionError: division by zero" for n in ("direct", "banned-token")
    )


def test_a_method_that_gives_other_weights_is_measured_anew(bench, monkeypatch):
    bench.compare(methods=["half"], seeds=[0])
    METHODS["half"].strength = 0.75  # as if a library under it had changed
    monkeypatch.setattr(evaluator.SetEvaluator, "_attack", lambda self, name: lambda workbench: told(name))
    results = bench.compare(methods=["half"], seeds=[0], attacks=ATTACKS)
    assert summary(results, "half")["forget"] == 0.75


def test_a_torn_file_counts_as_not_there(bench):
    bench.compare(methods=["forgets"], seeds=[0])
    bench.runs()
    (scores,) = bench.out.glob("cells/*/scores.json")
    scores.write_text(scores.read_text()[:100])
    assert summary(bench.compare(methods=["forgets"], seeds=[0]), "forgets")["forget"] == 1.0
    assert bench.runs() == [("forgets", 0)]


def test_a_cell_that_another_process_holds_is_left_to_it(bench):
    config = bench.config(methods=["forgets"])
    other = Process(rank=1, world=2)
    object.__setattr__(other, "gather", lambda value: ["run", "run"])
    bench.compare(config)
    shelf = next(iter(ResultStore(bench.out).root.glob("cells/*")))
    (shelf / "scores.json").unlink()
    bench.runs()
    with try_lock(JsonStore(shelf)) as mine:
        assert mine
        assert compare(config, bench.out, shard=other, load=bench.load, progress=False) == {}
    assert bench.runs() == []


def test_the_first_process_waits_for_the_others_and_takes_over_from_the_dead(bench):
    config = bench.config(methods=["forgets"], seeds=[0])
    bench.compare(config)
    shelf = next(iter(bench.out.glob("cells/*")))
    (shelf / "scores.json").unlink()
    bench.runs()
    gone = threading.Event()

    def dies():
        with try_lock(JsonStore(shelf)):
            gone.wait(1.0)

    thread = threading.Thread(target=dies)
    thread.start()
    assert summary(bench.compare(config), "forgets")["forget"] == 1.0
    assert bench.runs() == [("forgets", 0)] and not gone.is_set()
    thread.join()


def test_what_a_search_made_first_is_counted(bench):
    results = bench.compare(methods=["half"], seeds=[0])
    assert results["cells"][0]["cost"]["prepared"] == {"sieve": 0.5}, "a quarter before the search, and behind it"


def test_a_search_that_another_process_is_at_keeps_nothing_else_waiting(bench):
    methods = ["half", "forgets"]
    bench.compare(methods=methods, seeds=[0])
    (search,) = bench.out.glob("searches/*")
    (search / "search.json").unlink()
    shutil.rmtree(bench.out / "cells")
    held, others, in_time = threading.Event(), threading.Event(), []

    def searches():
        with try_lock(JsonStore(search)):
            held.set()
            in_time.append(others.wait(10))

    thread = threading.Thread(target=searches)
    thread.start()
    held.wait()
    METHODS["forgets"].prepares = True
    METHODS["forgets"].prepare = lambda *_: others.set() or Prepared()
    bench.runs()
    results = bench.compare(methods=methods, seeds=[0])
    thread.join()
    assert in_time == [True] and bench.runs() == [("forgets", 0), ("half", 0)]
    assert not any(one["failed"] for one in results["cells"])


def test_what_does_not_fit_is_said_before_anything_runs(bench):
    class Picky(METHODS["forgets"]):
        def check(self, workbench, task):
            raise ConfigError("no such layer")

    METHODS["half"] = Picky
    with pytest.raises(ConfigError, match=r'"methods", entry 3 \(half\), on the set written: no such layer'):
        bench.compare()
    assert bench.runs() == []


def test_a_folder_of_something_else_is_left_alone(bench):
    bench.out.mkdir()
    (bench.out / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        bench.compare()
    assert [path.name for path in bench.out.iterdir()] == ["thesis.tex"]


def test_results_are_json_and_name_every_key(bench):
    results = bench.compare(seeds=[0])
    assert json.loads(json.dumps(results)) == results
    keys = [one["key"] for one in results["cells"]]
    assert len(set(keys)) == 3 and all((bench.out / "cells" / key / "cell.json").exists() for key in keys)
