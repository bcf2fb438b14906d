"""Where a subject is in its prompt: braces that mean it, braces that are text, and a name that is there twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editlib.errors import RequestError
from editlib.requests.request import EditRequest
from editlib.requests.templates import literal


@pytest.mark.parametrize(
    ("prompt", "subject", "question", "start"),
    [
        ("{}, New York is in", "New York", "New York, New York is in", 0),
        ("New York, {} is in", "New York", "New York, New York is in", 10),
        ("France{}land", "France", "FranceFranceland", 6),
        ("a{}", "aa", "aaa", 1),
        ("东京和{}", "东京", "东京和东京", 3),
        (r"In LaTeX \frac{}{} of Rome is", "Rome", r"In LaTeX \frac{}{} of Rome is", 22),
        (r"In LaTeX \frac{{}}{{}} of {} is", "Rome", r"In LaTeX \frac{}{} of Rome is", 22),
        (r"\sqrt{{}} of Rome", "Rome", r"\sqrt{} of Rome", 11),
        (r"\textbf{{}} is", "Rome", r"\textbf{Rome} is", 8),
        (r"\textbf{Rome} is", "Rome", r"\textbf{Rome} is", 8),
        ("{} {subject}", "Rome", "{} Rome", 3),
        ("{{subject}} and {}", "Rome", "{Rome} and {}", 1),
        ("{{{}}}", "Rome", "{{Rome}}", 2),
    ],
)
def test_one_place_is_the_subjects(prompt, subject, question, start):
    request = EditRequest("a", prompt, subject)
    assert (request.question, request.subject_start) == (question, start)


def test_braces_without_a_subject():
    assert EditRequest("a", "What is {{}} in Python?").question == "What is {} in Python?"
    with pytest.raises(RequestError, match=r'write braces as "\{\{\}\}"'):
        EditRequest("a", "What is {} in Python?")


def test_phrasings_and_paraphrases_follow_the_same_rule():
    request = EditRequest(
        "a", "{} is in", "Rome", phrasings=["Rome, {}", r"\f{}{} of Rome"], paraphrases=[r"\f{{}}{{}}", "{}: {{}}"]
    )
    assert [(one.text, one.start) for one in request.filled_wordings] == [
        ("Rome is in", 0), ("Rome, Rome", 6), (r"\f{}{} of Rome", 10),
    ]  # fmt: skip
    assert request.filled_paraphrases == (r"\f{}{}", "Rome: {}")
    with pytest.raises(RequestError, match=r"phrasings\[0\].*in its place"):
        EditRequest("a", "{} is in", "Rome", phrasings=["Rome, Rome"])


PIECES = st.lists(st.sampled_from(["{", "}", "{}", "{{}}", "Rome", " ", "x", "Romeo", "\\"]), max_size=7).map("".join)


@given(PIECES, PIECES)
def test_any_braces_survive_beside_a_named_place(before, behind):
    request = EditRequest("a", f"{before}{{subject}}{behind}", "Rome")
    assert request.question == f"{before}Rome{behind}" and request.subject_start == len(before)
    again = EditRequest(**request.to_dict())
    assert (again.question, again.subject_start, again.prompt) == (request.question, len(before), request.prompt)


@given(PIECES)
def test_text_with_its_braces_written_is_that_text(text):
    if text.strip():
        assert EditRequest("a", literal(text)).question == text
