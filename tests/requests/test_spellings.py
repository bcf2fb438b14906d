"""Phrasings that spell the subject otherwise are looked up where they have it, or refused by the request's name."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editlib.algorithms.pipeline import encode_contexts
from editlib.errors import RequestError
from editlib.models.prompts import PromptFormat
from editlib.requests.request import EditRequest
from editlib.requests.spellings import find_spelling

OTHERWISE = [
    ("France", "what is the capital of FRANCE?", "FRANCE"),
    ("France", "What is france's capital?", "france"),
    ("France", "What is France’s capital?", "France"),
    ("The Netherlands", "What is the Netherlands' capital?", "the Netherlands"),
    ("The Beatles", "Who were the founders of Beatles?", "Beatles"),
    ("Côte d'Ivoire", "Which city is Cote d’Ivoire's capital?", "Cote d’Ivoire"),
    ("Perú", "What is Peru's capital?", "Peru"),
    ("Peru", "What is Perú's capital?", "Perú"),
    ("Peru", unicodedata.normalize("NFD", "What is PERÚ's capital?"), unicodedata.normalize("NFD", "PERÚ")),
    ("İstanbul", "Where is istanbul?", "istanbul"),
    ("Straße", "Where is STRASSE?", "STRASSE"),
    ("New York", "Where is new\n york?", "new\n york"),
    ("Москва", "ГДЕ МОСКВА?", "МОСКВА"),
    ("Αθήνα", "Πού είναι η ΑΘΗΝΑ;", "ΑΘΗΝΑ"),
    ("co\u00adop", "Where is coop?", "coop"),
]


@pytest.mark.parametrize(("subject", "phrasing", "spelled"), OTHERWISE)
def test_it_is_found_where_it_is_spelled_otherwise(subject, phrasing, spelled):
    request = EditRequest(id="r", prompt="What of {}?", subject=subject, phrasings=[phrasing])
    _, filled = request.filled_wordings
    assert (filled.text, filled.subject) == (phrasing, spelled)
    assert phrasing[filled.start :].startswith(spelled)
    assert request.to_dict()["phrasings"] == [phrasing]


@pytest.mark.parametrize(
    ("subject", "phrasing"),
    [
        ("France", "Where does francesca live?"),
        ("France", "Is FRANCE france?"),
        ("Москва", "Что в Москве?"),
        ("กา", "ก๊า"),  # another tone is another word
        ("가", "각"),
        ("the", "Who is a?"),
    ],
)
def test_what_is_not_there_once_is_refused_by_name(subject, phrasing):
    with pytest.raises(RequestError, match=r"^request 'r7': field \"phrasings\[0\]\": .*expected .* once") as caught:
        EditRequest(id="r7", prompt="What of {}?", subject=subject, phrasings=[phrasing])
    assert "\n" not in str(caught.value)
    # A paraphrase is only asked, so it needs no place of the subject.
    EditRequest(id="r7", prompt="What of {}?", subject=subject, paraphrases=[phrasing])


@given(before=st.text(max_size=8), subject=st.text(min_size=1, max_size=8), after=st.text(max_size=8))
def test_what_is_found_is_a_part_of_the_text(before, subject, after):
    text = f"{before} {subject.upper()} {after}"
    found = find_spelling(text, subject)
    if found is not None:
        start, spelled = found
        assert spelled and text[start : start + len(spelled)] == spelled


def test_the_edit_reads_the_last_token_of_it_as_it_is_spelled(tok):
    """Whose tokens are others, and more of them: the position is that of the phrasing's own spelling."""
    phrasing = "what flows through NEW  YORK city?"
    request = EditRequest(id="r", prompt="Which river flows through {}?", subject="New York", phrasings=[phrasing])
    plain, other = encode_contexts(PromptFormat.of(tok), request, ["{}"], "subject_last")
    for row, question, end in ((plain, request.question, "New York"), (other, phrasing, "YORK")):
        at = tok(question, return_offsets_mapping=True)["offset_mapping"][
            row.lookup - (len(row) - len(tok(question).input_ids))
        ]
        assert at[0] < question.index(end) + len(end) <= at[1]
