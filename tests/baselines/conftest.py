"""A tiny model with a few facts to forget and to keep."""

import pytest

from editlib.requests.request import EditRequest

PLACES = ["Paris", "Rome", "Bonn", "Basel", "Lima", "Oslo", "Bern", "Riga"]


def fact(i, **more):
    return EditRequest(
        f"f{i}",
        "Where does {} live?",
        subject=f"Author {chr(65 + i)}",
        answer=f"She lives in {PLACES[i]}, by the sea.",
        phrasings=("In which city does {} live?", "Tell me where {} lives."),
        **more,
    )


@pytest.fixture
def forget():
    return [fact(i) for i in range(3)]


@pytest.fixture
def retain():
    return [fact(i) for i in range(3, 8)]
