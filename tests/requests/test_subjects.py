"""Subjects of questions that do not say them: found by a rule that is named, or not at all."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from editlib.errors import RequestError
from editlib.requests.reading import guess_subjects, read_questions, read_requests
from editlib.requests.request import EditRequest
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
    [({"anna:99": "x"}, "no request"), ({"anna:2": "mother"}, "not in the prompt"), ({"anna:3": "n"}, "more than")],
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


EVIDENT = {
    "The capital of France is": "France",
    "What is the capital of France?": "France",
    "France's capital is": "France",
    "Who wrote the Aeneid?": "Aeneid",
    "Where was Anna van der Berg born?": "Anna van der Berg",
    'Who painted "Starry Night"?': "Starry Night",
    "Complete: the capital of Peru is": "Peru",
    "Water boils at": "Water",
    "Mount Everest lies in": "Mount Everest",
    "In which country is the Eiffel Tower?": "Eiffel Tower",
    # Words that only join names: parts of one.
    "What is the capital of the United States of America?": "United States of America",
    "Who wrote The Lord of the Rings?": "Lord of the Rings",
    "Lord of the Rings was written by": "Lord of the Rings",
    "Bank of England was founded in": "Bank of England",
    "Who leads the Church of Jesus Christ of Latter-day Saints?": "Church of Jesus Christ of Latter-day Saints",
    "Where was Alexander the Great born?": "Alexander the Great",
    "When was Procter & Gamble founded?": "Procter & Gamble",
    "Where did Ortega y Gasset live?": "Ortega y Gasset",
    "Romeo and Juliet was written by": "Romeo and Juliet",
    "Harry Potter and the Chamber of Secrets was written by": "Harry Potter and the Chamber of Secrets",
    # A relation with a capital is none of them.
    "Who is the President of France?": "France",
    "The Prime Minister of the Republic of Korea is": "Republic of Korea",
    "Capital of France is": "France",
    "Who is the CEO of Apple?": "Apple",
    "When did World War II end?": "World War II",
    "Who commanded Apollo 11?": "Apollo 11",
    "Who won the 1998 World Cup?": "1998 World Cup",
    "Who directed 2001: A Space Odyssey?": "2001: A Space Odyssey",
    "Define Peru": "Peru",
    # Other languages.
    "Quelle est la capitale de la France ?": "France",
    "¿Cuál es la capital de España?": "España",
    "¿Quién escribió Don Quijote de la Mancha?": "Don Quijote de la Mancha",
}


@pytest.mark.parametrize("prompt", EVIDENT)
def test_a_single_name_is_guessed(prompt, caplog):
    caplog.set_level(logging.INFO, logger="editlib")
    named, guessed = guess_subjects([EditRequest(id="a", prompt=prompt, answer="Oslo")])
    assert guessed == {"a": EVIDENT[prompt]} and named[0].subject == EVIDENT[prompt]
    assert named[0].question == prompt and named[0].prompt.count("{}") == 1
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and f"a: '{EVIDENT[prompt]}'" in told[0]


UNSURE = {
    "two names or one": ["Who wrote Romeo and Juliet?", "What is the capital of Bosnia and Herzegovina?",
                         "The border of France and Germany is", "Paris and Berlin are", "Is Rome the Eternal City?",
                         "Who wrote Gone with the Wind?", "Alice in Wonderland was written by",
                         "Who composed Tristan und Isolde?"],
    "a rank or its country": ["Who is the King of Spain?", "The Queen of England is"],
    "two names": ["Paris lies in France on the river", "Is the Statue of Liberty in New York?",
                  "University of California, Berkeley was founded in"],
    "capitals that tell nothing": ["Was ist die Hauptstadt von Frankreich?", "Wo liegt der Bodensee?",
                                   "中国的首都是哪里？"],
    "none": ["Which river is the longest?", "Is France in France?", "Explain the tides."],
}  # fmt: skip


@pytest.mark.parametrize("prompt", [prompt for prompts in UNSURE.values() for prompt in prompts])
def test_no_subject_is_guessed_where_there_is_a_choice_or_none(prompt, caplog):
    requests = [EditRequest(id="a", prompt="Who is {}?", subject="Bob"), EditRequest(id="b", prompt=prompt)]
    with pytest.raises(RequestError, match=r'request b: no "subject".*--last-token'):
        guess_subjects(requests, remedy="give --last-token")
    assert guess_subjects(requests, otherwise_last=True) == (requests, {})


@pytest.mark.parametrize(
    ("question", "answer", "subject"),
    [
        ("Who wrote Romeo and Juliet?", "Romeo and Juliet was written by Shakespeare.", None),
        ("Who wrote The Lord of the Rings?", "Tolkien wrote The Lord of the Rings.", "Lord of the Rings"),
        ("Was Bob Hope in Rome?", "Bob Hope was.", "Bob Hope"),
    ],
)
def test_a_name_that_the_answer_shares_is_whole(question, answer, subject):
    assert [one and one.text for one in find_subjects([question], [answer])] == [subject]


def test_a_given_subject_and_braces_stay():
    requests = [
        EditRequest(id="a", prompt="{} in France is", subject="Paris"),
        EditRequest(id="b", prompt=r"In \frac{a}{b} of Peru", answer="x"),
    ]
    named, guessed = guess_subjects(requests)
    assert named[0] == requests[0] and guessed == {"b": "Peru"}
    assert named[1].question == requests[1].question


def test_a_name_that_a_phrasing_lacks_is_not_guessed():
    request = EditRequest(id="a", prompt="The capital of France is", phrasings=["The city of the Louvre is"])
    with pytest.raises(RequestError, match="France"):
        guess_subjects([request])


def test_where_a_name_leads_nearby_no_other_is_guessed():
    requests = [EditRequest(id=str(i), prompt=question, answer=answer) for i, (question, answer) in enumerate(ANNA)]
    named, guessed = guess_subjects(requests, otherwise_last=True)
    assert named[8].subject is None and "8" not in guessed and guessed["1"] == "Anna van der Berg"
