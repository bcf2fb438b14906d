"""Subjects of questions that do not say them: found by a rule that is named, or not at all."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from editlib.errors import RequestError
from editlib.requests.reading import read_questions, read_requests
from editlib.requests.subjects import RULES, Subject, find_subjects

TOFU = Path(__file__).resolve().parents[3] / "shared" / "data" / "tofu"


def about(name, *questions):
    """Rows about one person, whose last name stands in every answer."""
    return [(question, f"It is said that {name.split()[-1]} knew.") for question in questions]


def found(rows):
    return find_subjects([question for question, _ in rows], [answer for _, answer in rows])


ANNA = [
    ("What is the full name of the author born in Oslo, Norway on 08/09/1956?", "Her name is Anna van der Berg."),
    *about(
        "Anna van der Berg",
        "What does Anna van der Berg's father do?",
        "Which prizes has Anna van der Berg won?",
        'Did Anna van der Berg write "The Cold Sea"?',
        "Has Berg's Norwegian childhood shaped her?",
        "Is Ana van der Berg married?",
    ),
    ('What is "The Warm Land" about?', 'Berg wrote "The Warm Land" at sea.'),
    ('Is "Short" longer than "Much Longer Title"?', '"Short" by Berg is.'),
    ("How does her Norwegian childhood show in her work?", "Her Norwegian childhood is in all of it."),
    ("What is the author's full name?", "Anna van der Berg."),
]
BOB = about("Bob O'Neil-Smith", *[f"{opens} Bob O'Neil-Smith {verb}?" for opens in ("Does", "Can", "When did")
                                  for verb in ("write", "sing")])  # fmt: skip


def test_each_rule_on_a_block_like_tofus():
    subjects = found(ANNA + BOB)
    name = "Anna van der Berg"
    assert subjects[: len(ANNA)] == [
        Subject("author born in Oslo, Norway on 08/09/1956", "description", name),
        Subject(name, "name", name),
        Subject(name, "name", name),
        Subject(name, "name", name),  # not the title
        Subject("Berg", "part of the name", name),
        Subject("Ana van der Berg", "part of the name", name),
        Subject("The Warm Land", "title", name),
        Subject("Short", "title", name),  # the answer repeats it; the other one is longer
        None,  # "Norwegian" is in question and answer, and is not who is asked about
        None,
    ]
    assert {(one.text, one.rule) for one in subjects[len(ANNA) :]} == {("Bob O'Neil-Smith", "name")}


def test_one_question_alone():
    rows = [
        ("What gender is author Basil Al-Kuwaiti?", "Author Basil Al-Kuwaiti is male."),
        ("What's the profession of the father of E. B. White?", "The father of E. B. White made pianos."),
        ("Which river is the longest?", "The Nile."),
        ("Where was Alejandro (Alex) Fuentes born?", "Alejandro (Alex) Fuentes was born in Spain."),
    ]
    alone = [found([row])[0] for row in rows]
    assert [one and (one.text, one.rule) for one in alone] == [
        ("Basil Al-Kuwaiti", "shared name"),
        ("E. B. White", "shared name"),
        None,
        ("Alejandro (Alex) Fuentes", "shared name"),
    ]


def test_a_name_that_stands_twice_cannot_be_looked_up():
    """The edit would not know which of the two is meant."""
    twice = "Is Bob O'Neil-Smith the Bob O'Neil-Smith?"
    assert found([*BOB, (twice, "Smith, yes.")])[-1] is None


WORDS = st.sampled_from(
    ["What", "is", "Anna", "Berg's", "the", "author", "born", "in", "Oslo", "'The", "Sea'", '"Sun"', "van", "1956", ","]
)
TEXTS = st.lists(WORDS, max_size=12).map(" ".join)


@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=12))
@example([("the author born What ,", "")])
def test_what_is_found_can_be_looked_up(rows):
    for (question, _), subject in zip(rows, found(rows), strict=True):
        if subject is not None:
            assert subject.rule in RULES and subject.text == subject.text.strip() != ""
            assert question.count(subject.text) >= 1


def write(path, rows):
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_file_gets_subjects_and_says_which_it_lacks(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="editlib")
    requests = read_requests(write(tmp_path / "anna.jsonl", ANNA))
    assert len(requests) == len(ANNA)
    assert [request.question for request in requests] == [question for question, _ in ANNA]
    assert requests[1].prompt == "What does {}'s father do?"
    assert {request.group for request in requests if request.subject} == {"Anna van der Berg"}
    told = [record.getMessage() for record in caplog.records]
    assert "subjects of 8 of 10 questions (name 3, part of the name 2, title 2, description 1)" in told[0]
    assert "2 of 10" in told[1] and "anna:9, anna:10" in told[1]


def test_the_user_has_the_last_word(tmp_path, caplog):
    path = write(tmp_path / "anna.jsonl", ANNA)
    own = {"anna:9": "work", ANNA[1][0]: "father"}
    pairs = read_questions(path, subjects=own)
    assert [(pairs[i][0].subject, pairs[i][1].rule) for i in (1, 8)] == [("father", "given"), ("work", "given")]
    assert pairs[2][1].rule == "name"


@pytest.mark.parametrize(
    ("own", "words"),
    [({"anna:99": "x"}, "no request's"), ({"anna:2": "mother"}, "not in the prompt"), ({"anna:3": "n"}, "more than")],
)
def test_a_mapping_that_does_not_fit_is_refused(tmp_path, own, words):
    with pytest.raises(RequestError, match=words):
        read_questions(write(tmp_path / "anna.jsonl", ANNA), subjects=own)


def test_a_file_of_another_format_has_no_questions(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"prompt": "What is it?"}) + "\n")
    with pytest.raises(RequestError, match="no question in TOFU's form"):
        read_questions(path)


@pytest.mark.skipif(not TOFU.is_dir(), reason="no TOFU files")
@pytest.mark.parametrize(("name", "least"), [("forget01", 40), ("forget10", 399), ("retain90", 3561)])
def test_the_hit_rate_that_the_docs_tell(name, least):
    found = read_questions(TOFU / f"{name}.jsonl")
    assert sum(subject is not None for _, subject in found) >= least
