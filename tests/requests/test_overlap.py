"""Retained facts that ask for what is forgotten are left out, however they spell it."""

import pytest

from editlib import data
from editlib.algorithms.unierase.anchors import choose_anchors
from editlib.requests.request import EditRequest


def ids(request):
    return {prompt.id for prompt in data.retain_prompts([request])}


@pytest.mark.parametrize(
    ("prompt", "subject", "answer", "same", "other"),
    [
        ("Who wrote {}?", "Hamlet", "William Shakespeare", "author/hamlet", "author/macbeth"),
        ("Name the capital of the {}.", "Netherlands", "Amsterdam", "capital/netherlands", "language/netherlands"),
        ("What sign has {}?", "Gold", "Au", "symbol/gold", "symbol/silver"),
        ("Where is {}?", "Eiffel Tower", "france", "landmark_country/eiffel-tower", "capital/france"),
        ("What is paid with in {}?", "Japan", "Japanese yen", "currency/japan", "capital/japan"),
    ],
)
def test_a_bundled_fact_is_known_in_another_spelling(prompt, subject, answer, same, other):
    request = EditRequest(id="r", prompt=prompt, subject=subject, answer=answer)
    every = {fact.id for fact in data.facts()}
    assert {same, other} <= every
    assert same not in ids(request) and other in ids(request)


def test_of_a_users_own_prompts_those_that_ask_in_any_wording_are_no_anchors():
    asked = EditRequest(
        id="r", prompt="What is the capital of {}?", subject="France", answer="Paris", phrasings=("Name {}'s capital.",)
    )
    retain = [
        EditRequest(id="wording", prompt="Name {}'s capital.", subject="France"),
        EditRequest(id="answer", prompt="Which city rules {}?", subject="the France", answer="the city of Paris"),
        EditRequest(id="other answer", prompt="What lies in {}?", subject="France", answer="Parish"),
        EditRequest(id="other subject", prompt="Which city rules {}?", subject="Gaul", answer="Paris"),
    ]
    assert [one.id for one in choose_anchors(retain, [asked], most=None, seed=0)] == ["other answer", "other subject"]
