"""The catalogue: other wordings and sibling questions, and that nothing which is measured is in it."""

import re
from dataclasses import replace

import pytest

from editlib import data
from editlib.algorithms.unierase.catalogue import Catalogue, spread
from editlib.requests.request import EditRequest

CATALOGUE = Catalogue.bundled()
HELD_OUT = {"continent": r"continent", "atomic_number": r"atomic number"}
"""Relations that results report as named by nobody, and how a question for them reads."""


def request(prompt, subject, **rest):
    return EditRequest(id="r", prompt=prompt, subject=subject, answer="x", **rest)


@pytest.mark.parametrize(
    ("prompt", "subject", "wanted"),
    [
        ("What is the capital of {}?", "France", "Name the capital of France."),
        ("What is the capital of {}?", "France", "What is France's capital?"),
        ("Who wrote {}?", "Hamlet", "Name the person who wrote Hamlet."),
        ("In which country is {}?", "Lyon", "To which country does Lyon belong?"),
        ("When was {} born?", "Ada", "My friend asked me: when was Ada born?"),
    ],
)
def test_questions_are_reworded(prompt, subject, wanted):
    assert wanted in CATALOGUE.reworded(request(prompt, subject), 50)


def test_wordings_hold_the_subject_once_and_are_no_paraphrase():
    for fact in data.facts():
        found = CATALOGUE.reworded(fact, 6)
        assert len(found) <= 6 and len(set(found)) == len(found)
        measured = {fact.question, *fact.filled_paraphrases, *fact.filled_phrasings}
        assert not measured.intersection(found)
        assert all(text.count(fact.subject) == 1 for text in found)


def test_relations_that_are_measured_as_unnamed_are_never_asked_for():
    for fact in data.facts():
        if fact.relation not in HELD_OUT:
            asked = " ".join(CATALOGUE.siblings([fact], 40))
            assert not any(re.search(words, asked, re.IGNORECASE) for words in HELD_OUT.values())


def test_siblings_never_ask_for_what_is_forgotten():
    france = [
        request("What is the capital of {}?", "France"),
        request("What is the official language of {}?", "France"),
    ]
    one, both = (CATALOGUE.siblings(france[:n], 40) for n in (1, 2))
    assert any("language" in text for text in one) and not any("capital" in text for text in one)
    assert not any("language" in text or "capital" in text for text in both)
    assert both and all(text.count("France") == 1 for text in both)


def test_what_is_asked_of_other_subjects_of_the_kind_is_a_sibling():
    capital, language = "What is the capital of {}?", "What is the official language of {}?"
    requests = [
        request(capital, "France"),
        request(language, "Spain"),
        request("Who is the author of {}?", "Ivanhoe"),
        request("What is the chemical symbol of {}?", "zinc"),
    ]
    france = CATALOGUE.siblings(requests[:1], 40, requests)
    assert france[0] == "What is the official language of France?"
    assert not any("capital of" in text or "author" in text or "symbol" in text for text in france)
    assert CATALOGUE.siblings(requests[1:2], 40, requests)[0] == "What is the capital of Spain?"
    both = [request(capital, "France"), request(language, "France")]
    assert not any("capital" in text or "language" in text for text in CATALOGUE.siblings(both, 40, requests))


def test_a_question_of_common_words_alone_is_not_its_own_sibling():
    """A row that kept the answer to a request's own question would work against those that erase it."""
    country, capital = "In which country is {}?", "What is the capital of {}?"
    cities = [replace(request(country, name), relation="city country") for name in ("Lima", "Bonn")]
    requests = [*cities, request(capital, "Peru")]
    asked = CATALOGUE.siblings(requests[:1], 40, requests)
    assert "In which country is Lima?" not in asked and asked[0] == "What is the capital of Lima?"
    assert CATALOGUE.siblings(requests[2:], 40, requests)[0] == "In which country is Peru?"
    tower = replace(request("In which country is {}?", "Big Ben"), relation="landmark country")
    assert "In which city is Big Ben?" in CATALOGUE.siblings([tower], 40)


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("What is the capital of {}?", "place"),
        ("What is the chemical symbol of {}?", "substance"),
        ("Who is the author of {}?", "work"),
        ("When was {} born?", "person"),
        ("Who is the CEO of {}?", "organisation"),
        ("Which treaty ended {}?", "event"),
        ("Why {}?", "anything"),
    ],
)
def test_the_kind_of_a_subject_is_told_by_the_question(prompt, kind):
    assert CATALOGUE.kind(request(prompt, "Zyx")) == kind


def test_a_subject_of_no_known_kind_has_general_siblings_and_none_has_none():
    assert "Tell me about Zyx." in CATALOGUE.siblings([request("Why {}?", "Zyx")], 10)
    assert CATALOGUE.siblings([EditRequest(id="r", prompt="Why?", answer="x")], 10) == []


@pytest.mark.parametrize("subject", ["it", "in", "on", "ion", "no"])
def test_a_subject_that_is_a_part_of_other_words_keeps_its_place(subject):
    one = request("What is the capital of {}?", subject)
    more = CATALOGUE.with_wordings(one, 40)
    assert more.wordings[1:] == tuple(CATALOGUE.reworded(one, 40))


def test_relations_that_share_no_subject_are_not_crossed():
    """Of twenty cities and twenty countries none is both: no city is asked for its capital. Of two it may be chance."""
    names = {"capital": "What is the capital of {}?", "city country": "In which country is {}?"}
    many = [
        replace(request(prompt, f"{relation.title()} {i}"), relation=relation)
        for relation, prompt in names.items()
        for i in range(20)
    ]
    for facts, crossed in ((many, False), ([many[0], many[-1]], True)):
        asked = CATALOGUE.siblings(facts[-1:], 40, facts)
        assert any(text.startswith("What is the capital of") for text in asked) == crossed


def test_what_is_asked_for_in_two_ways_is_the_same():
    assert not any("money" in text for text in CATALOGUE.siblings([request("Tell me the currency of {}.", "Peru")], 40))
    number = request("What is the atomic number of {}?", "zinc")
    assert not any("electrons" in text for text in CATALOGUE.siblings([number], 40))


def test_requests_get_wordings_as_phrasings():
    one = request("What is the capital of {}?", "France", phrasings=("Say the capital of {}.",))
    more = CATALOGUE.with_wordings(one, 3)
    assert more.phrasings[0] == "Say the capital of {}." and len(more.wordings) == 5
    assert all("France" in text for text in more.wordings)
    assert CATALOGUE.with_wordings(one, 0) == one


def test_spread_is_even():
    assert spread(list(range(10)), 3) == [0, 3, 6]
    assert spread([1, 2], 5) == [1, 2]
