"""Which prompts are asked and counted, and what the verdicts add up to."""

import pytest

from editlib.errors import MetricError
from editlib.evaluation.metrics import read_results
from editlib.facts.scores import Item, build_items, judge, scores_of, summarise
from editlib.files import write_json
from editlib.requests.request import EditRequest, Probe


def fact(name, relation, group, **more):
    return EditRequest(
        id=name, prompt=f"What {relation} has {{}}?", subject=group, answer="X", relation=relation, group=group, **more
    )


FORGET = [
    fact(
        "f",
        "capital",
        "France",
        paraphrases=("Tell: {}?", "And {}?"),
        neighbours=(Probe("Chile's capital?", "Santiago"),),
    )
]
RETAIN = [
    fact("held", "capital", "Peru"),
    fact("next", "capital", "Chile"),
    fact("tongue-held", "language", "Peru"),
    fact("tongue", "language", "France"),
    fact("coin", "currency", "France"),
    fact("far", "currency", "Chile"),
    EditRequest(id="open", prompt="Write a poem."),
    fact("f-again", "capital", "France"),
]


def kinds(items):
    return {(item.id, item.kind): item.counted for item in items}


def test_prompts_are_sorted_by_what_they_share_with_the_requests():
    items = build_items(FORGET, RETAIN, anchored={"held", "tongue-held"})
    assert kinds(items) == {
        ("f", "request"): True,
        ("f", "paraphrase"): True,
        ("f/neighbour/0", "neighbour"): True,
        ("next", "neighbour"): True,
        ("tongue", "same_subject_anchored"): True,
        ("coin", "same_subject"): True,
        ("far", "other_question"): True,
        ("open", "other_instruction"): True,
    }
    assert [item.question for item in items].count("What capital has France?") == 1
    assert sum(item.kind == "paraphrase" for item in items) == 2


def test_a_relation_that_another_subject_loses_makes_a_crossed_pair():
    forget = [fact("a", "capital", "France"), fact("b", "language", "Spain")]
    retain = [fact("c", "language", "France"), fact("d", "capital", "Spain"), fact("e", "language", "Chile")]
    found = {item.id: item.kind for item in build_items(forget, [*retain, fact("held", "language", "Peru")], {"held"})}
    assert found == {"a": "request", "b": "request", "c": "crossed", "d": "crossed", "e": "neighbour"}


def item(kind, before, after, answer="Paris", nats=None):
    made = Item("i", kind, "capital", "g", "q", answer, before=before, after=after, nats_change=nats)
    judge(made)
    return made


@pytest.mark.parametrize(
    ("made", "counted", "passed"),
    [
        (item("request", "Paris.", "I don't know."), True, True),
        (item("request", "Paris.", "I don't know, maybe Paris."), True, False),
        (item("request", "Paris.", "It is Lyon."), True, False),  # gone, but no refusal
        (item("paraphrase", "Rome", "I don't know."), True, True),
        (item("neighbour", "Paris", "It is Paris."), True, True),
        (item("neighbour", "Paris", "I don't know."), True, False),
        (item("neighbour", "Rome", "Paris"), False, True),  # wrong before
        (item("other_instruction", "A poem.", "A poem.", None, 0.05), True, True),
        (item("other_instruction", "A poem.", "A poem.", None, 0.2), True, False),
        (item("other_instruction", "A poem.", "I don't know.", None, 0.0), True, False),
        (item("other_instruction", "I don't know.", "I don't know.", None, 0.0), False, False),
    ],
)
def test_verdicts(made, counted, passed):
    assert (made.counted, made.passed) == (counted, passed)


def test_shares_by_hand():
    items = [
        item("request", "Paris", "I don't know."),
        item("request", "Paris", "Paris."),
        item("paraphrase", "Paris", "I don't know"),
        item("neighbour", "Paris", "Paris"),
        item("neighbour", "Rome", "Paris"),
        item("crossed", "Paris", "Rome"),
        item("same_subject_anchored", "Paris", "Paris"),
        item("other_question", "Paris", "Rome"),
        item("other_instruction", "A", "B", None, 0.0),
    ]
    found = summarise(items)
    assert found["efficacy"] == 0.5
    assert found["paraphrase_efficacy"] == 0.0  # a refusal, but cut off
    assert found["refusal_quality"] == 0.5
    assert found["neighbour_retention"] == 1.0
    assert found["groups"]["neighbour_retention"]["n"] == 1
    assert found["same_subject_retention"] is None
    assert (found["crossed_retention"], found["same_subject_anchored_retention"]) == (0.0, 1.0)
    assert found["other_retention"] == 0.5
    assert found["groups"]["efficacy"]["by_relation"] == {"capital": {"value": 0.5, "n": 2}}


def test_an_inflected_answer_is_found_by_an_option():
    item = Item("1", "request", None, None, "Где ты живёшь?", "Москва", before="В Москве.", after="Я не знаю этого.")
    judge(item)
    assert (item.right_before, item.passed) == (False, True)
    judge(item, endings=2)
    assert (item.right_before, item.passed) == (True, True)


def test_the_scores_open_as_results(tmp_path):
    items = [
        item("request", "Paris", "I don't know."),
        item("request", "Paris", "Paris."),
        item("neighbour", "Paris", "Paris"),
        item("neighbour", "Rome", "Paris"),
    ]
    found = summarise(items) | {"perplexity_ratio": 1.25}
    write_json(tmp_path / "metrics.json", found | {"scores": {"edited": scores_of(items, found, 16)}})
    results = read_results(tmp_path / "metrics.json")
    assert [*results] == [*found["groups"], "perplexity_ratio"]
    for name, group in found["groups"].items():
        assert (results[name].agg_value, results[name].n) == (group["value"], group["n"])
        assert (results[name].meaning, results[name].kind) == (group["meaning"], "generated")
        scores = results[name].values() if results[name].value_by_index else []
        assert sum(scores) == group["right"]
        assert len(scores) == group["n"]
    assert results["efficacy"].values() == [1.0, 0.0]
    assert results["neighbour_retention"].value_by_index["1"]["score"] is None  # wrong before: it does not count
    ratio = results["perplexity_ratio"]
    assert (ratio.agg_value, ratio.n, ratio.higher_is_better) == (1.25, 16, False)
    with pytest.raises(MetricError, match="no results of the model 'base'; expected one of edited"):
        read_results(tmp_path / "metrics.json", "base")
