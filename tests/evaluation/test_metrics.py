"""Verdicts on single answers, on sentences judged by hand."""

import pytest

from editlib.data import refusals
from editlib.evaluation.metrics import has_answer, is_fluent, is_fluent_refusal, is_refusal, wilson_interval


@pytest.mark.parametrize(
    ("text", "answers", "there"),
    [
        ("The capital of France is Paris.", ["Paris"], True),
        ("the capital is PARIS", ["Paris"], True),
        ("Parisian life", ["Paris"], False),
        ("He was here.", ["He"], True),
        ("he was here.", ["He"], False),  # a symbol of two letters is no pronoun
        ("The symbol is Fe2O3", ["Fe"], False),
        ("It is Sana'a.", ["Sanaa", "Sana'a"], True),
        ("", ["Paris"], False),
        ("C++ (1985)", ["C++"], True),
    ],
)
def test_has_answer(text, answers, there):
    assert has_answer(text, answers) is there


@pytest.mark.parametrize("text", refusals())
def test_every_bundled_refusal_is_a_fluent_refusal(text):
    assert is_fluent_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "The capital of France is Paris.",
        "The capital of Not specified.",
        "I know the answer: it is Paris.",
        "The answer is not known to historians.",
        "Paris. I don't know why you ask.",
        "",
    ],
)
def test_answers_are_no_refusals(text):
    assert not is_refusal(text)


@pytest.mark.parametrize(
    ("text", "fluent"),
    [
        ("I don't know.", True),
        ("I'm not sure what that is.", True),
        ("I don't know", False),  # cut off
        ("I'mI'm not sure.", False),
        ("I am not not sure.", False),
        ("I do not know I do not know.", False),
        ("Unknown.", False),
    ],
)
def test_is_fluent(text, fluent):
    assert is_fluent(text) is fluent


def test_wilson_interval_by_hand():
    # 8 of 10: centre (0.8 + 3.8416/20) / (1 + 3.8416/10), half-width by the formula
    low, high = wilson_interval(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(5, 5)[1] == 1.0
