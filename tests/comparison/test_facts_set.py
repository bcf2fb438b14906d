"""Real questions and attacks in a world whose every word is written by hand; and how facts are shared out."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import REFUSE, Unit, World, scripted

from editlib.attacks.registry import ATTACKS, Entry
from editlib.comparison import evaluator
from editlib.comparison.config import parse_config
from editlib.comparison.method import Cost, Method
from editlib.comparison.methods import METHODS, NoSettings
from editlib.comparison.run import compare
from editlib.facts.sampling import allot
from editlib.requests.reading import write_requests
from editlib.requests.request import EditRequest
from editlib.workbench import Workbench


class Refuses(Method):
    """The model refuses behind the first subjects."""

    Settings, family, seeded = NoSettings, "closed form", False
    world: World

    def identity(self):
        return {}

    def forget(self, bench, task, seed, *, ready, found):
        subjects = self.world.subjects[: {"forgets": 4, "half": 2}[self.name]]
        units = (Unit(1, subjects, {REFUSE: 1.0}),)
        bench.model.load_state_dict(scripted(self.world.says, units).state_dict())
        return Cost(notes={"given": [request.to_dict() for request in task.forget]})


@pytest.fixture(scope="module")
def told(pristine_toks, tmp_path_factory):
    """The results, and for each time that the attack `direct` ran, whether it was on the base."""
    folder = tmp_path_factory.mktemp("compared")
    world, asked = World(copy.deepcopy(pristine_toks["plain"])), []
    facts = [
        replace(fact, paraphrases=tuple(f"{verb}: Capital of {fact.subject}" for verb in ("Say", "Tell")))
        for fact in world.facts
    ]
    write_requests(folder / "forget.jsonl", facts[:3])
    write_requests(folder / "watch.jsonl", facts[3:])
    write_requests(folder / "keep.jsonl", [EditRequest(id="held", prompt="Hold", answer="on")])
    files = {"requests": "forget.jsonl", "retain": "keep.jsonl", "watch": "watch.jsonl"}
    values = {
        "model": "world",
        "perplexity": None,
        "sets": [{"protocol": "facts", **{key: str(folder / name) for key, name in files.items()}}],
        "methods": ["none", "forgets", "half"],
        "attacks": {"names": ["direct", "banned-token"], "settings": {"max_new_tokens": 6}},
    }
    usual = ATTACKS["direct"].run

    def counted(target, facts, context):
        asked.append(target.anat.model is context.base.anat.model)
        return usual(target, facts, context)

    def load(name):
        return Workbench.of(world.base().anat.model, copy.deepcopy(world.tok), folder / "stats", name=name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(evaluator.ATTACKS, "direct", Entry(counted, "counted"))
        patch.setattr(evaluator, "bundled_control", lambda *_: [])
        for name in ("forgets", "half"):
            patch.setitem(METHODS, name, type(name, (Refuses,), {"world": world}))
        return compare(parse_config(values), folder / "out", load=load, progress=False), asked


@pytest.fixture
def results(told):
    return told[0]


def cell(results, method):
    return next(one for one in results["cells"] if one["method"] == method)


def summary(results, method):
    return next(one for one in results["sets"]["facts"]["methods"] if one["method"] == method)


def test_scores_and_attacks_are_those_of_the_world(results):
    none, forgets, half = (summary(results, name) for name in ("none", "forgets", "half"))
    # The fourth fact is watched; every method but the first refuses behind its subject, too.
    assert (none["forget"], none["retain"]) == (0.0, 1.0)
    assert (forgets["forget"], forgets["retain"]) == (1.0, 0.0)
    assert half["forget"] == pytest.approx(2 / 3) and half["retain"] == 1.0
    assert none["front"] is False and forgets["front"] and half["front"]  # half keeps as much and forgets more
    assert none["seeds"] == 1
    leaks = {name: told["edited"]["rate"] for name, told in forgets["attacks"].items()}
    assert leaks == {"direct": 0.0, "banned-token": 1.0}
    assert none["attacks"]["direct"]["base"]["rate"] == 1.0
    assert half["attacks"]["direct"]["edited"]["rate"] == pytest.approx(1 / 3)


def test_what_it_cost_is_told(results):
    none, forgets = cell(results, "none")["cost"], cell(results, "forgets")["cost"]
    assert none["touched"]["weights"] == none["touched"]["tensors"] == none["update_bytes"] == 0
    # One unit: a row of gate and up (three subjects and the watched one), one number of down.
    assert forgets["touched"]["weights"] == 4 + 4 + 1 and forgets["touched"]["tensors"] == 3
    assert forgets["update_bytes"] == 9 * 4 and forgets["seconds"] > 0 and forgets["memory_mb"] > 10


def test_every_text_before_and_after_is_kept(results):
    items = cell(results, "half")["items"]
    told = {item["question"]: (item["before"], item["after"], item["passed"]) for item in items}
    assert told["Capital of B"] == ("Pxyz", "-", True) and told["Capital of F"] == ("ljkg", "ljkg", False)
    assert [item["kind"] for item in items] == [*["request", "paraphrase"] * 3, "neighbour"]


def test_no_wording_that_a_search_may_see_is_scored(results):
    given = [request["paraphrases"] for request in cell(results, "half")["notes"]["given"]]
    assert given == [[f"Say: Capital of {subject}"] for subject in "BDF"]
    scored = {item["question"] for item in cell(results, "half")["items"] if item["kind"] == "paraphrase"}
    assert scored == {f"Tell: Capital of {subject}" for subject in "BDF"}


def test_the_base_is_attacked_once(told):
    assert sorted(told[1]) == [False, False, False, True]


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 60), min_size=1), st.data())
def test_facts_are_shared_out_in_proportion(known, data):
    every = sum(known.values())
    total = data.draw(st.integers(0, every))
    if not every:
        return
    found = allot(total, known)
    assert sum(found.values()) == total
    for name, count in known.items():
        assert abs(found.get(name, 0) - total * count / every) < 1
        assert found.get(name, 0) <= count
