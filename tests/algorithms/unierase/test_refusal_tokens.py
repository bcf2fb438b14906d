"""Tokens fitted to an edited model: said where answers were erased, told by plain forward passes, and taken back."""

import copy
from dataclasses import replace

import pytest
import torch

from editlib.algorithms.unierase import apply_unierase_to_model
from editlib.algorithms.unierase.catalogue import Catalogue
from editlib.algorithms.unierase.refusal_places import refusal_places
from editlib.algorithms.unierase.token import TokenHeader, UnlearningToken
from editlib.editing import check_given
from editlib.errors import HparamsError
from editlib.hparams import UniEraseHyperParams
from editlib.models.anatomy import anatomy
from editlib.models.prompts import PromptFormat
from editlib.models.vocabulary import add_token, free_tokens, numbered, silence
from editlib.requests.request import EditRequest
from editlib.stats.file import LayerStats

OPTIONS = {
    "layers": [2],
    "neurons": True,
    "values": "rows",
    "wordings": 1,
    "siblings": 2,
    "erase_margin": -20.0,
    "nullspace_threshold": 1.0,
    "nullspace_rule": "dimensions",
    "anchors": False,
    "token_steps": 150,
    "token_wordings": 1,
    "say_margin": -1.0,
    "v_precision": "model",
}
FORGET = [
    EditRequest(id="fr", prompt="What is the capital of {}?", subject="France", answer="Paris", relation="capital"),
    EditRequest(
        id="es", prompt="What language do people speak in {}?", subject="Spain", answer="x", relation="language"
    ),
]
RETAIN = [
    EditRequest(id=place, prompt="What is the capital of {}?", subject=place, answer="x", relation="capital")
    for place in ("Peru", "Chad", "Gaul", "Cuba")
]


@pytest.fixture(scope="module", params=["llama", "untied"])
def kind(request):
    """The kinds of tiny model, one after the other; the edit of each is made once."""
    return request.param


def given_for(model):
    """The arguments of an edit beside its requests and settings."""
    anat = anatomy(model)
    generator = torch.Generator().manual_seed(1)
    row = 0.02 * torch.randn(anat.d_model, generator=generator)
    header = TokenHeader(token="[UNL]", model="tiny", model_sha256="", seed=0, questions=0, refusals=0)
    return {
        "stats": {layer: LayerStats(torch.eye(anat.d_ff, dtype=torch.float64), 8, 1) for layer in range(anat.n_layers)},
        "token": UnlearningToken(row, row, header),
        "retain": RETAIN,
        "chat": False,
    }


@pytest.fixture(scope="module")
def fitted(kind, pristine, pristine_toks):
    """(model, tokenizer, result) of one edit; not to be changed."""
    model, tok = copy.deepcopy(pristine[kind]), copy.deepcopy(pristine_toks["plain"])
    return model, tok, apply_unierase_to_model(model, tok, FORGET, UniEraseHyperParams(**OPTIONS), **given_for(model))


@pytest.fixture
def edited(fitted):
    """As `fitted`, to be changed at will."""
    return copy.deepcopy(fitted)


def odds(model, tok, question, token):
    """Log-odds of `token` as the question's next token against all that are no refusal token, by a plain pass."""
    ids = torch.tensor([PromptFormat(tok, chat=False).encode(question).ids])
    with torch.no_grad():
        logits = model(ids).logits[0, -1].float()
    refusals = list(numbered(tok, "[UNL]").values())
    others = torch.ones_like(logits, dtype=torch.bool)
    others[refusals] = False
    return float(logits[token] - logits[others].logsumexp(0))


def test_each_relation_gets_a_token_that_is_said_for_its_requests_first(fitted):
    model, tok, result = fitted
    assert result.token.names == ("[UNL]", "[UNL2]", "[UNL3]")
    ids = dict(zip((None, "capital", "language"), result.token.ids(tok), strict=True))
    wanted = {one.relation: odds(model, tok, one.question, ids[one.relation]) for one in FORGET}
    assert min(wanted.values()) > 0
    # The same question about other subjects, of which the edit was told: values were moved, and these were not.
    for prompt in RETAIN:
        assert odds(model, tok, prompt.question, ids["capital"]) < -2
        assert odds(model, tok, prompt.question, ids["language"]) < -2


def test_a_relations_token_is_followed_by_the_common_one_before_any_word(fitted, kind):
    """By a plain pass; a random model of 32 dimensions has no English to go on with, and may repeat a new token."""
    if kind != "untied":
        pytest.skip("with tied embeddings so narrow a model repeats whatever token it has just read")
    model, tok, result = fitted
    common, *own = result.token_ids
    for request, number in zip(FORGET, own, strict=True):
        prompt = [*PromptFormat(tok, chat=False).encode(request.question).ids, number]
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1]
        assert logits[common] > logits[:common].max()


def test_diagnostics_tell_the_log_odds_that_a_plain_pass_gives(tiny_llama, tok):
    """Where nothing but the question itself is read."""
    settings = {**OPTIONS, "wordings": 0, "token_wordings": 0, "token_steps": 30}
    model, hparams = tiny_llama, UniEraseHyperParams(**settings)
    result = apply_unierase_to_model(model, tok, FORGET, hparams, **given_for(model))
    for request, entry, number in zip(FORGET, result.diagnostics, result.token.ids(tok)[1:], strict=True):
        said = entry["rows"]["say"]
        assert said["rows"] == 1 and said["missed"] == 0
        assert said["after"] == pytest.approx(odds(model, tok, request.question, number), abs=0.02)


def test_settings_that_fit_tokens_take_none(tmp_path):
    with pytest.raises(HparamsError, match=r"a token was given .* leave it out"):
        check_given(UniEraseHyperParams(**OPTIONS), token=tmp_path / "token.safetensors")


def test_undone_the_weights_are_back_and_the_tokens_are_never_said(edited, kind, pristine):
    before = {name: value for name, value in pristine[kind].state_dict().items() if "embed" not in name}
    before = {name: value for name, value in before.items() if "lm_head" not in name}
    model, tok, result = edited
    result.revert(model)
    now = model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in before.items())
    for request in FORGET:
        assert max(odds(model, tok, request.question, number) for number in result.token.ids(tok)) < -1


def test_an_edit_is_replayed_with_its_tokens(edited, kind, pristine):
    hparams, given = UniEraseHyperParams(**OPTIONS), given_for(pristine[kind])
    model, tok, first = edited
    asked = list(zip(FORGET, first.token_ids[1:], strict=True))
    said = [odds(model, tok, request.question, number) for request, number in asked]
    first.revert(model)
    again = apply_unierase_to_model(model, tok, FORGET, hparams, values=first.values, **{**given, "token": first.token})
    now = [odds(model, tok, request.question, number) for request, number in asked]
    assert again.token_ids == first.token_ids and now == pytest.approx(said, abs=1e-2)


def test_the_same_seed_gives_the_same_tokens(pristine, pristine_toks):
    """A few steps draw all that is drawn: text, places, and the refusals of each step."""
    hparams, made = UniEraseHyperParams(**{**OPTIONS, "token_steps": 8}), []
    for _ in range(2):
        model, tok = copy.deepcopy(pristine["untied"]), copy.deepcopy(pristine_toks["plain"])
        made.append(apply_unierase_to_model(model, tok, FORGET, hparams, **given_for(model)).token)
    first, again = made
    assert torch.equal(first.row_out, again.row_out) and torch.equal(first.row_in, again.row_in)


def test_places_are_ends_of_questions_and_where_the_model_says_the_answer(tok):
    form = PromptFormat(tok, chat=False)
    said = tuple(tok("The capital of France is Paris.", add_special_tokens=False)["input_ids"])
    answers = {FORGET[0].question: said, "Is Peru old?": said[:2]}
    places = refusal_places(form, FORGET, RETAIN[:1], ["Is Peru old?"], answers, Catalogue.bundled(), wordings=1)
    assert places.relations == ("capital", "language")
    texts = [tok.decode(place.row.ids) for place in places.wanted if place.inside]
    assert len(texts) == 1 and texts[0].endswith("The capital of France is")
    assert places.requests[:2] == [0, 0] and {place.group for place in places.kept} == {0, None}
    assert [place.sibling for place in places.kept].count(True) == 1
    assert [answer for _, answer in places.answers] == [said[:2]]


def test_a_refusal_replaces_the_whole_name_and_may_come_in_other_answers_that_hold_it(tok):
    """The answer is "Bonn" where the model says "Basel Bonn"; what it says of France before that stays."""
    form = PromptFormat(tok, chat=False)
    fact = replace(FORGET[0], answer="Bonn")
    said, told = (
        tuple(tok(text, add_special_tokens=False)["input_ids"])
        for text in ("The capital of France is Basel Bonn.", "France is old. Its city Basel is not Bonn but Rome.")
    )
    answers = {fact.question: said, "Is France old?": told, "Is Peru old?": told}
    siblings = ["Is France old?", "Is Peru old?"]
    places = refusal_places(form, [fact], [], siblings, answers, Catalogue.bundled(), wordings=0)
    (inside,) = [place for place in places.wanted if place.inside]
    assert tok.decode(inside.row.ids).endswith("The capital of France is")
    ours, other = [tok.decode(list(answer)) for _, answer in places.answers]
    assert ours == "France is old. Its city Basel is not" and other.startswith(ours) and len(other) > len(ours)


def test_requests_without_a_relation_are_told_apart_by_how_they_ask(tok):
    form, catalogue = PromptFormat(tok, chat=False), Catalogue.bundled()
    bare = [replace(one, relation=None) for one in FORGET]
    places = refusal_places(form, bare, [replace(RETAIN[0], relation=None)], [], {}, catalogue, wordings=0)
    assert places.relations == tuple(one.prompt for one in bare)
    assert places.kept[0].group == 0
    many = [
        EditRequest(id=f"m{i}", prompt=f"What is number {i} of {{}}?", subject="Rome", answer="x") for i in range(40)
    ]
    asked = [*many, *bare, replace(bare[0], id="again", prompt="What is the capital of {}?", subject="Peru")]
    places = refusal_places(form, asked, [], [], {}, catalogue, wordings=0)
    assert len(places.relations) == 24 and {None, FORGET[0].prompt} <= set(places.relations)
    assert all(place.group is not None for place in places.wanted) and len(places.wanted) == len(asked)


def test_names_are_numbered_past_those_that_are_taken(tiny_llama, tok):
    assert free_tokens(tok, "[UNL]", 2) == ["[UNL]", "[UNL2]"]
    add_token(tiny_llama, tok, "[UNL2]")
    assert free_tokens(tok, "[UNL]", 3) == ["[UNL]", "[UNL3]", "[UNL4]"]
    assert list(numbered(tok, "[UNL]")) == ["[UNL2]"]


def test_a_silenced_token_is_the_mean_of_the_others(tiny_llama_untied, tok):
    number = add_token(tiny_llama_untied, tok, "[UNL]")
    silence(anatomy(tiny_llama_untied), [number])
    for matrix in (tiny_llama_untied.get_input_embeddings().weight, tiny_llama_untied.get_output_embeddings().weight):
        others = torch.cat([matrix[:number], matrix[number + 1 :]])
        torch.testing.assert_close(matrix[number], others.mean(0))


def test_tokens_of_several_edits_are_joined_in_their_order():
    header = TokenHeader(token="[UNL]", model="tiny", model_sha256="", seed=0, questions=0, refusals=0)
    one = UnlearningToken(torch.zeros(3), torch.ones(3), header)
    two = UnlearningToken(
        torch.full((2, 3), 2.0),
        torch.full((2, 3), 3.0),
        TokenHeader(**{**vars(header), "token": "[UNL2]", "names": ("[UNL2]", "[UNL3]")}),
    )
    joined = UnlearningToken.joined([one, two])
    assert joined.names == ("[UNL]", "[UNL2]", "[UNL3]")
    assert joined.row_in[:, 0].tolist() == [0, 2, 2] and joined.row_out[:, 0].tolist() == [1, 3, 3]
