"""`benchmarks/erasing.py`: what a draw holds back from the edit, and its row of the table, counted by hand."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest

from editlib.facts.sampling import ANCHORED, HELD_OUT, RELATIONS

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def erasing(monkeypatch):
    """The script, for a model that knows two of three facts; nothing is asked."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("erasing")
    monkeypatch.setattr(script, "_ask", lambda *_: None)
    monkeypatch.setattr(script, "knows", lambda bench, before, fact: random.Random(fact.id).random() < 2 / 3)
    yield script
    for name in ("erasing", "sides"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_draw_shows_the_edit_one_wording_and_nothing_that_is_watched(erasing, seed):
    drawn = erasing.draw(None, None, 4, seed)
    assert [fact.relation for fact in drawn.forget] == [relation for relation in RELATIONS for _ in range(4)]
    assert all(erasing.knows(None, None, fact) for fact in drawn.forget)
    shown = {text for fact in drawn.forget for text in fact.wordings}
    unseen = {fact.id: {text.format(fact.subject) for text in fact.paraphrases} for fact in drawn.asked}
    assert len(shown) == len(drawn.forget) and all(unseen.values())
    assert not shown & set().union(*unseen.values())
    held = {prompt.question for prompt in drawn.anchors}
    watched = {prompt.question for prompt in drawn.watch}
    assert not watched & held and not (watched | held) & (shown | set().union(*unseen.values()))
    subjects = {fact.group for fact in drawn.forget}
    asked_of = {prompt.relation for prompt in drawn.watch if prompt.group in subjects}
    assert not {prompt.group for prompt in drawn.anchors} & subjects
    assert {prompt.relation for prompt in drawn.anchors} & set(HELD_OUT) == set()
    assert asked_of <= {*RELATIONS, *ANCHORED, *HELD_OUT} and asked_of & {*ANCHORED, *HELD_OUT}


def test_draws_differ_by_their_seed_alone(erasing):
    first, again, other = (erasing.draw(None, None, 4, seed) for seed in (3, 3, 4))
    assert first == again and first.forget != other.forget


def test_the_row_of_a_draw_counts_what_was_right_before(erasing, tmp_path):
    def item(kind, before, after, passed, refused=False):
        return {
            "kind": kind, "right_before": before, "right_after": after, "passed": passed, "refused_after": refused
        }  # fmt: skip

    items = [
        item("request", True, False, True),
        item("request", True, True, False),
        item("paraphrase", True, False, True),
        item("paraphrase", True, False, False),
        item("paraphrase", False, False, True),  # was wrong before, and is not counted
        item("neighbour", True, True, True),
        item("neighbour", True, False, False, refused=True),
        item("other_question", True, True, True),
        item("other_question", False, False, False),
    ]
    metrics = dict.fromkeys(erasing.MEASURES, 0.5) | {"perplexity_ratio": 1.25, "items": items}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "metrics.json").write_text(json.dumps(metrics))
    row = erasing._row(tmp_path, attacked=False)
    assert (row["gone"], row["gone_unseen"], row["paraphrase_efficacy"]) == (0.5, 1.0, 0.5)
    assert (row["neighbours_refused"], row["questions"], row["perplexity_ratio"]) == (0.5, 1.0, 1.25)
    (tmp_path / "attacks").mkdir()
    shares = {"edited": {"rate": 0.25}, "control": {"rate": None}}
    (tmp_path / "attacks" / "attacks.json").write_text(json.dumps({"results": [{"attack": "x", "shares": shares}]}))
    row = erasing._row(tmp_path, attacked=True)
    assert (row["x/edited"], row["x/control"]) == (0.25, None)
