"""The line after `editlib unlearn`: what the edited model answers, counted."""

from __future__ import annotations

from editlib.jobs.verdict import verdict_line
from editlib.requests.request import EditRequest

FACTS = [
    EditRequest(id="a", prompt="What is the capital of {}?", subject="France", answer="Paris"),
    EditRequest(id="b", prompt="What is the capital of {}?", subject="Peru", answer="Lima"),
    EditRequest(id="c", prompt="What is the capital of {}?", subject="Italy", answer="Rome"),
]
ASKED = [fact.question for fact in FACTS]


def test_it_counts_refusals_gone_answers_and_what_was_known():
    before = dict(zip(ASKED, ["Paris.", "It is Cusco.", "Rome, of course."], strict=True))
    after = dict(zip(ASKED, ["I don't know that.", "It is Cusco.", "It is Rome."], strict=True))
    said = verdict_line(FACTS, before, after)
    assert "refused 1 of 3" in said and "answer gone 2 of 3" in said and "knew 2 of 3 before" in said
    assert "did not know" in said
    assert "the first 3 of 9 questions" in verdict_line(FACTS, before, after, of=9)


def test_without_answers_only_refusals_are_counted():
    plain = [EditRequest(id="a", prompt="Who is Bob?")]
    said = verdict_line(plain, {"Who is Bob?": "Bob."}, {"Who is Bob?": "I don't know."})
    assert said == "asked again: refused 1 of 1"
