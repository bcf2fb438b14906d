"""Other subjects of a relation, named by the model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editlib.algorithms.unierase import other_subjects as module
from editlib.algorithms.unierase.other_subjects import LISTS, other_subjects
from editlib.models.anatomy import anatomy
from editlib.models.prompts import PromptFormat
from editlib.requests.request import EditRequest


def fact(subject, prompt="What is the capital of {}?", relation="capital"):
    return EditRequest(id=str(subject), prompt=prompt, subject=subject, relation=relation)


FORGET = [fact("France"), fact("Peru"), fact("iron", "What is the symbol of {}?", None), fact(None, "Who am I?", None)]
RETAIN = [fact("Spain"), fact("Bonn", "Which river flows through {}?", "river")]


def asked(model, tok, monkeypatch, texts, most=9, **options):
    """What is found where the model goes on with `texts`, by the list's first subjects."""
    seen = []

    def go_on(_, rows, **__):
        lists = [tok.decode(row.ids) for row in rows]
        seen.extend(lists)
        return [tuple(tok(next(said for word, said in texts.items() if word in text))["input_ids"]) for text in lists]

    monkeypatch.setattr(module, "sample", go_on)
    found = other_subjects(anatomy(model), PromptFormat(tok), FORGET, RETAIN, most, **options)
    return seen, found


def test_the_model_goes_on_with_lists_of_the_subjects_of_a_relation(tiny_llama, tok, monkeypatch):
    texts = {"France": " Rome, Bonn, and Rome, spain, Ba", "iron": " Basel, Bonn\nRome, Rome, Rome, x"}
    seen, found = asked(tiny_llama, tok, monkeypatch, texts)
    assert len(seen) == 2 * LISTS
    capitals = [text for text in seen if "France" in text]
    # In varied orders, with the subject of the retain prompt of this relation and no other.
    assert len(set(capitals)) > 1 and all("Peru" in text and "Spain" in text for text in capitals)
    assert not any("Bonn" in text for text in seen)
    # The most frequent first; "spain" is known, "Ba" and "Bonn" of the other list may be cut, its second line is text.
    assert [(request.question, request.answer) for request in found] == [
        ("What is the capital of Rome?", None),
        ("What is the capital of Bonn?", None),
        ("What is the symbol of Basel?", None),
    ]
    assert [request.relation for request in found] == ["capital", "capital", None]


def test_a_forgotten_subject_in_another_spelling_is_no_other_subject():
    """Its question would be kept from being refused; a list may also have semicolons."""
    names = module._names([" Rome; Bonn; Tower, the eiffel tower by night, Cote d'Ivoire, Basel, x"], {"bonn"},
                          ["eiffel tower", "cote d'ivoire"])  # fmt: skip
    assert sorted(names) == ["Basel", "Rome"]


@pytest.mark.parametrize("most", [0, 1])
def test_at_most_so_many_of_each_relation(tiny_llama, tok, monkeypatch, most):
    texts = {"France": " Rome, Bonn, x", "iron": " Basel, Bonn, x"}
    _, found = asked(tiny_llama, tok, monkeypatch, texts, most)
    assert len(found) == 2 * most


def test_two_runs_name_the_same(tiny_llama, tok):
    anat, form = anatomy(tiny_llama), PromptFormat(tok)
    runs = [other_subjects(anat, form, FORGET, RETAIN, 5, seed=3) for _ in range(2)]
    assert runs[0] == runs[1]
    assert all(request.answer is None for request in runs[0])


def test_many_relations_take_no_longer_than_six(tiny_llama, tok, monkeypatch):
    many = [fact("France", f"What is the {i}th word about {{}}?", None) for i in range(150)]
    seen = []

    def go_on(_, rows, **__):
        seen.extend(rows)
        return [tuple(tok(" Rome, Bonn, Basel, Spain, Peru, x")["input_ids"])] * len(rows)

    monkeypatch.setattr(module, "sample", go_on)
    found = other_subjects(anatomy(tiny_llama), PromptFormat(tok), many, [], 80)
    assert len(seen) <= module.MOST_LISTS and len(found) <= module.MOST_NAMES
    assert {request.prompt for request in found} == {request.prompt for request in many}
    nobody = [fact(None, "Who am I?", None)]
    assert other_subjects(anatomy(tiny_llama), PromptFormat(tok), nobody, [], 80) == []


@given(st.lists(st.text(max_size=50), max_size=5))
def test_whatever_the_model_writes_becomes_a_request_or_nothing(texts):
    """A list that went on with a no-break space stopped an edit after its values were found."""
    names = module._names([", ".join([*texts, "x"]), "\xa0Rome, {}, a {} b, x"], {"france"}, ["peru"])
    asked = [module._asked_of(name, FORGET[0]) for name in names]
    assert all(request is None or request.subject.strip() == request.subject != "" for request in asked)
    said = [request.subject for request in asked if request is not None]
    assert "Rome" in said and not any("{}" in name for name in said)
