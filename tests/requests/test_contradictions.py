"""Requests that cannot all be met are named."""

import logging

import pytest

from editlib.requests.contradictions import contradictions, warn_of_contradictions, warn_of_kept
from editlib.requests.request import EditRequest


def asked(name, target, prompt="{} is in", subject="Rome", **more):
    return EditRequest(name, prompt, subject, target_new=target, **more)


@pytest.mark.parametrize(
    ("others", "found"),
    [
        ([asked("b", "Peru")], [("a", "b")]),
        ([asked("b", "Peru", "Rome is in")], [("a", "b")]),
        ([asked("b", "Peru", "rome  IS in", "rome")], [("a", "b")]),
        ([asked("b", "Peru", "Where is {}?", phrasings=["{} is in"])], [("a", "b")]),
        ([asked("b", " spain")], []),
        ([asked("b", "Peru", subject="Lima")], []),
        ([asked("b", None)], []),
        ([asked("b", "Peru"), asked("c", "Chile"), asked("d", "Spain")], [("a", "b"), ("a", "c")]),
    ],
)
def test_one_question_with_two_new_answers(others, found):
    pairs = contradictions([asked("a", "Spain"), *others])
    assert [(one.id, other.id) for one, other in pairs] == found


def test_accents_may_be_composed_or_not():
    pairs = contradictions([asked("a", "x", subject="Zürich"), asked("b", "y", subject="Zu\u0308rich")])
    assert len(pairs) == 1


def test_the_warning_names_both_and_counts_the_rest(caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_contradictions("f.json", [asked(str(i), f"t{i}") for i in range(8)])
        warn_of_contradictions("g.json", [asked("a", "Spain")])
    (record,) = caplog.records
    assert record.message.startswith("f.json: one question with two new answers: 0 ('t0') and 1 ('t1') ask")
    assert record.message.endswith("and 2 more; the edit cannot meet both")


def test_what_is_to_be_kept_and_forgotten(caplog):
    kept = [EditRequest("k1", "Rome is in"), EditRequest("k2", "Paris is in")]
    with caplog.at_level(logging.WARNING):
        warn_of_kept([asked("a", None)], kept)
        warn_of_kept([asked("a", None)], kept[1:])
    (record,) = caplog.records
    assert "retain prompt k1 asks the same as request a" in record.message
