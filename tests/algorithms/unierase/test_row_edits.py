"""Whole edits with values from rows, on tiny models: without a token, put back bit for bit, told in diagnostics."""

import logging

import pytest
import torch
from tiny_models import VOCAB, train_tokenizer

from editlib.algorithms.unierase import apply_unierase_to_model
from editlib.algorithms.unierase.catalogue import Catalogue
from editlib.algorithms.unierase.refusal_places import refusal_places, say_rows
from editlib.algorithms.unierase.subject_rows import answer_slot, subject_columns, subject_rows
from editlib.errors import HparamsError, RequestError
from editlib.hparams import UniEraseHyperParams
from editlib.jobs.edit import rows_of
from editlib.models.anatomy import anatomy
from editlib.models.prompts import PromptFormat, TokenRow
from editlib.requests.request import EditRequest
from editlib.stats.file import LayerStats
from editlib.workbench import Workbench

OPTIONS = {
    "layers": [0, 1],
    "values": "rows",
    "say": False,
    "wordings": 2,
    "siblings": 4,
    "erase_margin": -8.0,
    "nullspace_threshold": 1.0,
    "nullspace_rule": "dimensions",
    "solve": "exact",
    "L2": 1e-3,
    "anchors": False,
}
FORGET = [
    EditRequest(id=place, prompt="What is the capital of {}?", subject=place, answer="x", relation="capital")
    for place in ("France", "Peru")
]


@pytest.fixture
def given(tiny_llama):
    anat = anatomy(tiny_llama)
    return {"stats": {layer: LayerStats(torch.eye(anat.d_ff, dtype=torch.float64), 8, 1) for layer in (0, 1)}}


def test_an_answer_is_erased_without_a_token_and_put_back(tiny_llama, tok, given):
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    size = len(tok)
    form = PromptFormat(tok)
    ids = torch.tensor([form.encode(FORGET[0].question).ids])
    base = tiny_llama(ids).logits[0, -1]
    hparams = UniEraseHyperParams(**{**OPTIONS, "wordings": 0})
    result = apply_unierase_to_model(tiny_llama, tok, FORGET, hparams, **given)
    assert len(tok) == size and tiny_llama.get_input_embeddings().num_embeddings == VOCAB
    # The state that the rows ask for is written, and put into the unedited model it does what they report.
    row, layer = form.encode(FORGET[0].question, "France"), tiny_llama.model.layers[1]
    target = result.values.targets[:, 0]
    states = tiny_llama.model(ids, output_hidden_states=True).hidden_states[2][0]
    torch.testing.assert_close(states[row.lookup], target, rtol=1e-3, atol=1e-3)
    result.revert(tiny_llama)
    answer = form.answer_ids("x")[0]
    rivals = [token for token in base.topk(21).indices.tolist() if token != answer][:20]

    def put(_, __, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.clone()
        hidden[0, row.lookup] = target
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = layer.register_forward_hook(put)
    patched = tiny_llama(ids).logits[0, -1]
    handle.remove()
    read = [float(logits[answer] - logits[rivals].logsumexp(0)) for logits in (base, patched)]
    rows = result.diagnostics[0]["rows"]["erase"]
    assert [rows["before"], rows["after"]] == pytest.approx(read, abs=0.01)
    assert read[1] < read[0] - 0.5
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


def test_an_edit_is_replayed_from_its_values(tiny_llama, tok, given):
    hparams = UniEraseHyperParams(**OPTIONS)
    first = apply_unierase_to_model(tiny_llama, tok, FORGET, hparams, **given)
    written = {
        layer: first.originals[layer] + first.deltas[layer].dense().to(first.originals[layer]) for layer in (0, 1)
    }
    first.revert(tiny_llama)
    apply_unierase_to_model(tiny_llama, tok, FORGET, hparams, values=first.values, **given)
    for layer, weight in written.items():
        torch.testing.assert_close(anatomy(tiny_llama).weight(layer), weight, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused_before_anything_changes(tiny_llama, tok, given):
    with pytest.raises(HparamsError, match="no unlearning token was given"):
        descent = UniEraseHyperParams(layers=[0, 1], nullspace_threshold=1.0, nullspace_rule="dimensions")
        apply_unierase_to_model(tiny_llama, tok, FORGET, descent, **given)
    unanswered = [EditRequest(id="u", prompt="Who is {}?", subject="Ada")]
    with pytest.raises(RequestError, match='request u: has no "answer"'):
        apply_unierase_to_model(tiny_llama, tok, unanswered, UniEraseHyperParams(**OPTIONS), **given)
    with pytest.raises(HparamsError, match="gate_layer"):
        UniEraseHyperParams(**OPTIONS, gate_layer=3)


def test_facts_that_the_model_does_not_know_are_named(tiny_llama, tok, given, caplog):
    with caplog.at_level(logging.WARNING):
        apply_unierase_to_model(tiny_llama, tok, FORGET, UniEraseHyperParams(**OPTIONS), **given)
    assert "2 of 2 requests to none of their wordings, first France, Peru" in caplog.text


def test_the_slot_is_where_the_answer_begins(tok):
    form = PromptFormat(tok)
    said = tok("The capital of France is Paris. Sorry", add_special_tokens=False)["input_ids"]
    slot = answer_slot(form, said, ("Paris",))
    assert tok.decode(said[:slot]) == "The capital of France is" and tok.decode(said[slot:]).startswith(" Paris")
    assert answer_slot(form, said, ("Lima",)) is None
    # "P" is not the answer where "Peru" follows, whatever tokens it has.
    said = tok("Peru has a sign. The sign is P.", add_special_tokens=False)["input_ids"]
    slot = answer_slot(form, said, ("P",))
    assert tok.decode(said[:slot]) == "Peru has a sign. The sign is"


@pytest.mark.parametrize(
    ("lead", "subject", "ends"),
    [
        ("The river Rhine is in Basel; the river is old", "the river", [8, 37]),
        ("france and France", "France", [5, 16]),
        ("巴黎在法国", "法国", [4]),
        ("Peruvian", "Peru", [3]),  # as in scripts without spaces
        ("Basel", "Rome", []),
    ],
)
def test_the_subject_is_found_in_the_models_sentence_in_any_spelling(lead, subject, ends):
    tok = train_tokenizer()
    form, prompt = PromptFormat(tok, chat=False), TokenRow((1, 2, 3), 1)
    said = tok(lead, add_special_tokens=False)["input_ids"]
    columns = subject_columns(form, prompt, said, subject)
    assert columns[0] == 1 and len(columns) == 1 + len(ends)
    for column, end in zip(columns[1:], ends, strict=True):
        without, text = (tok.decode(said[: column - more]) for more in (3, 2))
        assert len(without) <= end < len(text) and text[:end] == lead[:end]


def test_rows_erase_in_the_models_own_sentence_at_both_subjects(tiny_llama, tok):
    form = PromptFormat(tok)
    request = EditRequest(
        id="fr", prompt="What is the capital of {}?", subject="France", answer="Paris", relation="capital"
    )
    retain = [
        EditRequest(id=name, prompt="What is the capital of {}?", subject=name, answer=answer, relation="capital")
        for name, answer in (("Peru", "Lima"), ("Chad", "Bonn"), ("Basel", "Basel"), ("Gaul", "Paris"))
    ]
    said = tuple(tok("The capital of France is Paris.", add_special_tokens=False)["input_ids"])
    made = subject_rows(
        anatomy(tiny_llama), form, [request], retain, [[0]], siblings=0,
        catalogue=Catalogue.bundled(), known_answers={request.question: said},
    )  # fmt: skip
    (erase,) = made.rows
    assert erase.kind == "erase" and tok.decode(erase.ids).endswith("The capital of France is")
    ends = [tok.decode(erase.ids[: place + 1]).endswith("France") for place in erase.places]
    assert ends == [True, True]
    assert tok.decode([erase.targets[0]]).strip() and tok.decode(said).index(tok.decode([erase.targets[0]])) > 0
    first = {tok(f" {text}", add_special_tokens=False)["input_ids"][0] for text in ("Basel", "Bonn", "Lima")}
    assert set(erase.rivals) == first - {erase.targets[0]}
    assert made.made[0].known and made.made[0].rivals == ("Basel", "Bonn", "Lima")
    # A refusal is wanted where the answer was, and at the end of the question in each wording.
    known = {request.question: said}
    places = refusal_places(form, [request], [], [], known, Catalogue.bundled(), wordings=1)
    reworded, end, inside = say_rows(form, places, [request], {0: 3}, 900)
    assert (inside.kind, inside.ids, inside.places, inside.columns) == ("say", erase.ids, erase.places, erase.columns)
    assert tok.decode(end.ids) == request.question and end.columns == (len(end.ids) - 1,)
    for row in (reworded, end):
        (place,) = row.places
        assert tok.decode(row.ids[: place + 1]).endswith("France") and row.columns == (len(row.ids) - 1,)
    assert reworded.ids != end.ids and {(row.targets, row.owner) for row in (reworded, end, inside)} == {((900,), 3)}


def test_relations_of_the_retain_prompts_are_kept_for_the_subject(tiny_llama, tok):
    """Three retain prompts ask for a currency, so that of the request's subject is kept; a single question is not."""
    currency, only = "What is the currency of {}?", "Does a large river flow through {}?"
    fact = EditRequest(id="fr", prompt="What is the capital of {}?", subject="France", answer="Paris")
    retain = [EditRequest(id=name, prompt=currency, subject=name, relation="currency") for name in ("Peru", "Chad")]
    retain.append(EditRequest(id="river", prompt=only, subject="Peru", relation="river"))
    for name, asked in (("Peru", False), ("Gaul", True)):
        retain.append(EditRequest(id=f"more {name}", prompt=currency, subject=name, relation="currency"))
        made = subject_rows(
            anatomy(tiny_llama), PromptFormat(tok), [fact], retain, [[0]], siblings=30, catalogue=Catalogue.bundled()
        )
        assert ("What is the currency of France?" in made.made[0].siblings) == asked
        assert "Does a large river flow through France?" not in made.made[0].siblings


def test_rows_are_shown_without_an_edit(tiny_llama, tok):
    bench = Workbench.of(tiny_llama, tok)
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    made = rows_of(bench, FORGET, UniEraseHyperParams(**OPTIONS), retain=[])
    assert [rows.id for rows in made] == ["France", "Peru"] and made[0].kind == "place"
    assert len(made[0].wordings) == 3 and len(made[0].siblings) == 4 and not made[0].known
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())
    with pytest.raises(HparamsError, match='--show-rows needs settings with "values": "rows"'):
        rows_of(bench, FORGET, UniEraseHyperParams(layers=[0]))
