"""The whole edit on tiny models: what the gate adds, what is put back, what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
from models.families import make
from tiny_models import VOCAB

from editlib.algorithms.contexts import subject_prompts
from editlib.algorithms.unierase import apply, finding, writing
from editlib.algorithms.unierase.anchor_keys import AnchorStream
from editlib.algorithms.unierase.answer_gate import check_gate
from editlib.algorithms.unierase.apply import apply_unierase_to_model
from editlib.algorithms.unierase.constraints import hold_anchors
from editlib.algorithms.unierase.subject_rows import by_subject
from editlib.algorithms.unierase.token import TokenHeader, UnlearningToken
from editlib.errors import EditError, HparamsError
from editlib.hparams import UniEraseHyperParams
from editlib.models.anatomy import anatomy
from editlib.models.prompts import PromptFormat
from editlib.requests.request import EditRequest
from editlib.stats.file import LayerStats

OPTIONS = {
    "layers": [0, 1],
    "nullspace_threshold": 1.0,
    "nullspace_rule": "dimensions",
    "v_optimizer": "normalised",
    "v_lr": 0.05,
    "v_num_grad_steps": 60,
    "early_stop_loss": 0.3,
    "kl_factor": 0.0,
    "solve": "exact",
    "L2": 1e-3,
}
FORGET = [
    EditRequest(id=place, prompt="What is the capital of {}?", subject=place, answer="x", relation="capital")
    for place in ("France", "Peru", "Basel")
]
RETAIN = [
    EditRequest(id=f"river/{place}", prompt="Which river flows through {}?", subject=place, relation="river")
    for place in ("Bonn", "Rotterdam", "Chad")
]


@pytest.fixture
def job(tiny_llama, tok):
    """A model with an untrained token that lies far off."""
    generator = torch.Generator().manual_seed(5)
    row = 0.1 * torch.randn(32, generator=generator)
    token = UnlearningToken(row, row, TokenHeader("[UNL]", "", "", 0, 0, 0))
    anat = anatomy(tiny_llama)
    stats = {layer: LayerStats(torch.eye(anat.d_ff, dtype=torch.float64), 8, 1) for layer in (0, 1)}
    return tiny_llama, tok, {"token": token, "retain": RETAIN, "stats": stats}


def nlls(model, tok, asked=FORGET):
    form = PromptFormat(tok)
    with torch.no_grad():
        return [
            -float(model(torch.tensor([form.encode(r.question).ids])).logits[0, -1].log_softmax(0)[VOCAB])
            for r in asked
        ]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("gate", [None, 3])
def test_the_token_comes_nearer_and_all_is_put_back(job, gate):
    model, tok, rest = job
    rest["token"].add_to(model, tok)
    plain, before = weights(model), nlls(model, tok)
    hparams = UniEraseHyperParams(**OPTIONS, gate_layer=gate, gate_nll=2.0)
    result = apply_unierase_to_model(model, tok, FORGET, hparams, **rest)
    assert (
        sorted(result.deltas) == sorted(result.originals) == sorted(result.norms) == [0, 1, *([gate] if gate else [])]
    )
    assert sum(nlls(model, tok)) < sum(before) - 1.0
    changed = {name for name, value in weights(model).items() if not torch.equal(value, plain[name])}
    assert {name for name in changed if "down_proj" in name} == changed and len(changed) == len(result.deltas)
    result.revert(model)
    assert all(torch.equal(value, plain[name]) for name, value in weights(model).items())


def test_the_gate_alone_does_not_say_the_token(job):
    """What the gate leaves is left to the edit at the subject, whose values become smaller for it."""
    model, tok, rest = job
    sizes = {}
    for gate in (None, 3):
        hparams = UniEraseHyperParams(**OPTIONS, gate_layer=gate, gate_nll=2.0)
        result = apply_unierase_to_model(model, tok, FORGET, hparams, **rest)
        sizes[gate] = sum(entry["relative_norm"] for entry in result.diagnostics)
        result.revert(model)
        if gate is not None:
            before = nlls(model, tok)
            result.deltas[gate].add_to(anatomy(model).weight(gate))
            after = nlls(model, tok)
            assert all(0.7 < new < old for new, old in zip(after, before, strict=True))
    assert sizes[3] < sizes[None]


@pytest.mark.parametrize(
    ("module", "part"),
    [(finding, "find_values"), (writing, "write_layers"), (apply, "value_diagnostics")],
)
def test_an_error_after_the_gate_restores_everything(job, monkeypatch, module, part):
    model, tok, rest = job
    rest["token"].add_to(model, tok)
    plain = copy.deepcopy(weights(model))

    def fail(*_, **__):
        raise EditError("no")

    monkeypatch.setattr(module, part, fail)
    with pytest.raises(EditError, match="no"):
        apply_unierase_to_model(model, tok, FORGET, UniEraseHyperParams(**OPTIONS, gate_layer=3), **rest)
    assert all(torch.equal(value, plain[name]) for name, value in weights(model).items())


@pytest.mark.parametrize("knob", ["anchor_lookup_weight", "anchor_prefix_weight", "text_weight"])
def test_what_weighs_more_is_moved_less(job, knob):
    """Anchors' lookup positions, the tokens that all anchors begin with, and ordinary text."""
    model, tok, rest = job
    generator, moved = torch.Generator().manual_seed(8), {}
    options = OPTIONS | {"anchor_weight": 1e-3, "anchor_subjects": False}
    held = hold_anchors(anatomy(model), PromptFormat(tok), RETAIN, FORGET, UniEraseHyperParams(**options))
    text = torch.randn(rest["stats"][0].mom2.shape[0], 5, generator=generator, dtype=torch.float64)
    rest["stats"] = {layer: LayerStats(text @ text.T, 5, 1) for layer in (0, 1)}

    for weight in (0.0, 1e3):
        hparams = UniEraseHyperParams(**options, **{knob: weight})
        result = apply_unierase_to_model(model, tok, FORGET, hparams, **rest)
        result.revert(model)
        keys = {
            "anchor_lookup_weight": held.layers[0].lookups,
            "anchor_prefix_weight": held.layers[0].prefix,
            "text_weight": text,
        }
        assert keys[knob].shape[1]
        moved[weight] = float((result.deltas[0].dense() @ keys[knob]).norm())
    assert moved[1e3] < 0.2 * moved[0.0]


def test_anchors_are_read_behind_each_layer_that_is_written_or_where_they_were_held(job, monkeypatch):
    model, tok, rest = job
    anat, hparams = anatomy(model), UniEraseHyperParams(**OPTIONS)
    plain, read, genuine = anat.weight(0).clone(), [], AnchorStream.read

    def watch(stream, layer):
        read.append((layer, torch.equal(anat.weight(0), plain)))
        return genuine(stream, layer)

    monkeypatch.setattr(AnchorStream, "read", watch)
    apply_unierase_to_model(model, tok, FORGET, hparams, **rest).revert(model)
    assert read == [(0, True), (1, False)]
    held = hold_anchors(anat, PromptFormat(tok), RETAIN, FORGET, hparams)
    read.clear()
    result = apply_unierase_to_model(model, tok, FORGET, hparams, **rest | {"retain": (), "anchored": held})
    assert not read and result.anchors == tuple(prompt.id for prompt in RETAIN)


def test_anchors_that_the_model_answers_right_can_weigh_more(job):
    """Only the one whose answer holds the right one."""
    model, tok, rest = job
    held = hold_anchors(anatomy(model), PromptFormat(tok), RETAIN, FORGET, UniEraseHyperParams(**OPTIONS))
    row = held.anchors.rows[1]
    said = tok.decode(row.ids[len(row) - row.extra :], skip_special_tokens=True)
    answers = ("Nile", said, None)
    rest["retain"] = [replace(prompt, answer=answer) for prompt, answer in zip(RETAIN, answers, strict=True)]
    moved = {}
    for weight in (0.0, 1e3):
        options = OPTIONS | {"anchor_weight": 1e-3, "anchor_known_weight": weight}
        result = apply_unierase_to_model(model, tok, FORGET, UniEraseHyperParams(**options), **rest)
        result.revert(model)
        moved[weight] = (result.deltas[0].dense() @ held.layers[0].lookups).norm(dim=0)
    first, second, third = (moved[1e3][:3] / moved[0.0][:3]).tolist()
    assert second < 0.2 < min(first, third)


def test_a_gate_among_or_below_the_edited_layers_is_refused():
    with pytest.raises(HparamsError, match=r"gate_layer.*above the last of `layers`, 1"):
        UniEraseHyperParams(**OPTIONS, gate_layer=1)


def test_a_gate_beyond_the_model_is_refused_by_name(job):
    model, tok, rest = job
    with pytest.raises(HparamsError, match=r"gate_layer.*99.*layers 0-4"):
        apply_unierase_to_model(model, tok, FORGET, UniEraseHyperParams(**OPTIONS, gate_layer=99), **rest)


def test_a_gate_behind_a_norm_is_refused(tok):
    """On Gemma 3 it raised the perplexity a million times."""
    anat = anatomy(make("gemma3_text"))
    with pytest.raises(HparamsError, match=r"gate_layer.*norm .* leave the key out"):
        check_gate(anat, 3)
    check_gate(anat, None)


@pytest.mark.parametrize("template", ["model.layers.{}.mlp.down_proj", "transformer.h.{}.mlp.fc_out"])
def test_a_template_of_another_model_is_refused(job, template):
    model, tok, rest = job
    hparams = UniEraseHyperParams(**OPTIONS, rewrite_module_tmp=template)
    if template.startswith("model"):
        apply_unierase_to_model(model, tok, FORGET, hparams, **rest).revert(model)
        return
    plain = weights(model)
    with pytest.raises(HparamsError, match=r"rewrite_module_tmp.*leave the key out"):
        apply_unierase_to_model(model, tok, FORGET, hparams, **rest)
    assert all(torch.equal(value, plain[name]) for name, value in weights(model).items())


@pytest.mark.parametrize("name", ["kl_subject_prompts", "kl_answer_tokens"])
def test_kl_knobs_take_counts_only(name):
    with pytest.raises(HparamsError, match=name):
        UniEraseHyperParams(**OPTIONS, **{name: -1})


def test_subject_prompts_carry_the_models_own_answers(job):
    """ROME's prompt without, general prompts about the subject with what the model says today."""
    model, tok, _ = job
    rows = subject_prompts(anatomy(model), PromptFormat(tok), FORGET, prompts=2, answer_tokens=4)
    assert [len(some) for some in rows] == [3, 3, 3]
    for some, request in zip(rows, FORGET, strict=True):
        assert tok.decode(some[0].ids) == f"{request.subject} is a" and some[0].extra == 0
        for row in some[1:]:
            front = torch.tensor([row.ids[: len(row) - row.extra]])
            out = model.generate(front, attention_mask=torch.ones_like(front), max_new_tokens=4, do_sample=False)
            answer = [token for token in out[0, front.shape[1] :].tolist() if token != tok.eos_token_id]
            assert list(row.ids[len(row) - row.extra :]) == answer


@pytest.mark.parametrize("subject", ["I", "is", "What"])
def test_a_subject_that_is_a_word_of_our_own_prompts(job, subject):
    """Prompts in which the subject stood twice were refused in the user's name."""
    model, tok, rest = job
    request = EditRequest(id="x", prompt="The symbol of {} means:", subject=subject, answer="x", relation="symbol")
    hparams = UniEraseHyperParams(
        **{**OPTIONS, "kl_factor": 1.0}, kl_subject_prompts=11, anchor_subjects=True, gate_layer=3, gate_nll=2.0
    )
    result = apply_unierase_to_model(model, tok, [request], hparams, **rest)
    assert [entry["id"] for entry in result.diagnostics] == ["x"] and sorted(result.deltas) == [0, 1, 3]


def test_a_second_edit_holds_the_keys_of_the_first_and_a_replay_needs_no_search(job):
    """UniErase, eq. 13: with past keys the first batch's states move less under the second."""
    model, tok, rest = job
    hparams = UniEraseHyperParams(**{**OPTIONS, "solve": "ridge", "anchors": False})
    first = apply_unierase_to_model(model, tok, FORGET[:2], hparams, **rest)
    between = weights(model)
    moved = {}
    for state in (None, first.state):
        second = apply_unierase_to_model(model, tok, FORGET[2:], hparams, state=state, **rest)
        keys = first.state.past[1].block
        moved[state is None] = float((second.deltas[1] @ keys).norm())
        after = weights(model)
        second.revert(model)
        again = apply_unierase_to_model(model, tok, FORGET[2:], hparams, state=state, values=second.values, **rest)
        assert "values" not in again.timings
        assert all(torch.equal(value, after[name]) for name, value in weights(model).items())
        again.revert(model)
        assert all(torch.equal(value, between[name]) for name, value in weights(model).items())
    assert moved[False] < 0.5 * moved[True]
    assert second.state.past[1].count == 3 and first.state.past[1].count == 2


def test_the_weight_of_past_keys_is_that_of_the_published_term(job):
    """`Δ = R K^T (K K^T + w K_p K_p^T + L2 I)^-1`, written out densely (UniErase, eq. 13, whose `w` is 1). With `w` 1,
    the first of a hundred requests had got 1.3 times their change by the end of a chain."""
    model, tok, rest = job
    options = {**OPTIONS, "layers": [1], "solve": "ridge", "anchors": False, "L2": 0.1}
    options |= {"nullspace_rule": "dimensions", "nullspace_threshold": 1.0}
    first = apply_unierase_to_model(model, tok, FORGET[:2], UniEraseHyperParams(**options), **rest)
    past = first.state.past[1].block.double()
    for weight in (0.0, 1.0, 100.0):
        hparams = UniEraseHyperParams(**options, past_weight=weight)
        second = apply_unierase_to_model(model, tok, FORGET[2:], hparams, state=first.state, **rest)
        second.revert(model)
        keys, residual = second.keys[1].double(), second.values.deltas.double()
        gram = keys @ keys.T + weight * past @ past.T + 0.1 * torch.eye(len(keys), dtype=torch.float64)
        dense = residual @ torch.linalg.solve(gram, keys).T
        torch.testing.assert_close(second.deltas[1].dense().double(), dense, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("gate", [None, 3])
def test_a_replay_finds_nothing_anew(job, monkeypatch, gate):
    model, tok, rest = job
    hparams = UniEraseHyperParams(**OPTIONS, gate_layer=gate, gate_nll=2.0)
    first = apply_unierase_to_model(model, tok, FORGET, hparams, **rest)
    first.revert(model)
    assert sorted(first.values.gate) == ([] if gate is None else ["capital"])
    assert {layer: keys.shape[1] for layer, keys in first.keys.items()} == {0: 3, 1: 3}

    def fail(*_, **__):
        raise AssertionError("an optimisation")

    for name in ("unierase.answer_gate.compute_zs", "pipeline.compute_zs"):
        monkeypatch.setattr(f"editlib.algorithms.{name}", fail)
    again = apply_unierase_to_model(model, tok, FORGET, hparams, values=first.values, **rest)
    for layer, delta in first.deltas.items():
        assert torch.equal(again.deltas[layer].dense(), delta.dense())


def test_questions_about_one_subject_share_one_change(job):
    """TOFU asks twenty about one author, all with nearly the same key; a change of its own for each cannot be written.
    The shared one brings the token near after every one of them."""
    model, tok, rest = job
    asked = [
        EditRequest(id=f"{place}/{i}", prompt=text, subject=place, answer="x")
        for place in ("France", "Peru")
        for i, text in enumerate(("What is the capital of {}?", "Which river flows through {}?"))
    ]
    rest["token"].add_to(model, tok)
    before = nlls(model, tok, asked)
    result = apply_unierase_to_model(model, tok, asked, UniEraseHyperParams(**OPTIONS), **rest | {"retain": ()})
    first, second, third, fourth = result.values.deltas.T
    assert torch.equal(first, second) and torch.equal(third, fourth) and not torch.equal(first, third)
    assert all(new < old - 0.2 for new, old in zip(nlls(model, tok, asked), before, strict=True))


def test_requests_without_a_subject_share_nothing():
    plain = [EditRequest(id=text, prompt=text) for text in ("Who are you?", "What is that?")]
    assert by_subject([plain[0], FORGET[1], plain[1], FORGET[1]]) == [[0], [1, 3], [2]]
