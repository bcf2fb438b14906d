"""Phase I on a tiny model and a few steps: what it learns, what it touches, what it writes."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import VOCAB, make_llama

from editlib.algorithms.unierase import token_learning
from editlib.algorithms.unierase.token import UnlearningToken
from editlib.algorithms.unierase.token_learning import TokenHyperParams, _encode, alike, learn_token
from editlib.errors import ModelError, TokenError
from editlib.models.anatomy import anatomy
from editlib.models.prompts import PromptFormat

PLACES = ("France", "Peru", "Basel", "Bonn", "Rotterdam", "Paris", "Chad", "東京")
QUESTIONS = [f"What is the {what} of {place}?" for what in ("capital", "river", "language", "sea") for place in PLACES]
REFUSALS = ["Sorry, I do not know the answer.", "I am not able to answer that.", "I do not know."]
HP = TokenHyperParams(steps=8, robust_steps=3, batch=6, lr=0.05, layers=(1, 3))


@pytest.fixture(params=["tied", "untied", "gpt2"])
def model(request, pristine):
    return copy.deepcopy(pristine[{"tied": "llama"}.get(request.param, request.param)])


def learn(model, tok, hp=HP, **options):
    return learn_token(anatomy(model), tok, QUESTIONS, REFUSALS, hparams=hp, progress=False, **options)


@torch.no_grad()
def refusal_nll(model, tok, number, chat):
    """Mean NLL of the refusals behind question and token: plain passes, no padding, one text at a time."""
    form = PromptFormat(tok, chat=chat)
    ends = model.generation_config.eos_token_id
    total, count = 0.0, 0
    for question in QUESTIONS[:8]:
        for refusal in REFUSALS:
            front = [*form.encode(question).ids, number]
            answer = [*form.answer_ids(refusal), ends]
            logits = model(torch.tensor([front + answer])).logits[0, len(front) - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
            count += len(answer)
    return total / count


@pytest.mark.parametrize("template", [False, True])
def test_the_refusal_becomes_likelier(model, tok, tok_chat, template):
    tok = tok_chat if template else tok
    start = copy.deepcopy(model)
    barely = replace(HP, steps=1, robust_steps=0, lr=1e-9)
    number_of = learn(start, tok, barely).header.token
    number = tok.convert_tokens_to_ids(number_of)
    learned = learn(model, tok, replace(HP, steps=40, robust_steps=8, guard_weight=0.0))
    for chat in {False, template}:
        assert refusal_nll(model, tok, number, chat) < refusal_nll(start, tok, number, chat) - 0.03
    assert learned.header.metrics["refusal_nll"] > 0


@pytest.mark.parametrize("template", [False, True])
def test_only_the_rows_of_the_token_change(model, tok, tok_chat, template):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learned = learn(model, tok_chat if template else tok)
    anat = anatomy(model)
    changed = set()
    for name, p in model.named_parameters():
        kept = p[:VOCAB] if len(p) == VOCAB + 1 else p
        assert torch.equal(kept.view(torch.uint8), before[name].view(torch.uint8)), name
        assert p.requires_grad
        assert p.grad is None
        if len(p) == VOCAB + 1:
            changed.add(name)
    assert len(changed) == (1 if anat.tied else 2)
    assert torch.equal(anat.embedding.weight[VOCAB], learned.row_in)
    assert torch.equal(anat.head.weight[VOCAB], learned.row_out)
    assert torch.equal(learned.row_in, learned.row_out) == anat.tied
    assert not anat.embedding._forward_hooks
    assert not anat.head._forward_hooks


def test_both_rows_of_untied_matrices_are_trained(tiny_llama_untied, tok):
    first = learn(copy.deepcopy(tiny_llama_untied), copy.deepcopy(tok), replace(HP, steps=1, robust_steps=0, lr=1e-9))
    last = learn(tiny_llama_untied, tok)
    assert float((first.row_in - last.row_in).norm()) > 1e-2
    assert float((first.row_out - last.row_out).norm()) > 1e-2


def test_the_token_stays_unlikely_on_ordinary_text(model, tok):
    """The guard: in the softmax at the ends of all questions, with the row written into the model."""
    learned = learn(model, tok, replace(HP, steps=60, robust_steps=0, guard_weight=10.0))
    form, worst = PromptFormat(tok), 0.0
    with torch.no_grad():
        for question in QUESTIONS:
            logits = model(torch.tensor([form.encode(question).ids])).logits[0, -1]
            worst = max(worst, float(logits.softmax(0)[VOCAB]))
    assert worst < 0.02
    # The metric is p(token) against all others there, from passes that may have been in bf16.
    assert learned.header.metrics["largest_probability_at_answers"] >= 0.8 * worst


def test_rows_keep_a_usual_length(model, tok):
    learned = learn(model, tok, replace(HP, lr=5.0))
    usual = float(model.get_input_embeddings().weight[:VOCAB].norm(dim=1).mean())
    for row in (learned.row_in, learned.row_out):
        assert float(row.norm()) <= 1.5 * usual * 1.0001


@pytest.mark.parametrize("template", [False, True])
def test_same_seed_same_bytes(model, tok, tok_chat, tmp_path, template):
    tok = tok_chat if template else tok
    rows, files = [], []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)  # the caller's own random state has no part in it
        path = tmp_path / f"{i}.safetensors"
        learned = learn(copy.deepcopy(model), copy.deepcopy(tok), replace(HP, seed=seed))
        learned.save(path)
        rows.append(learned.row_in)
        files.append(path.read_bytes())
    assert files[0] == files[1]
    assert float((rows[0] - rows[2]).norm()) > 0.01


def test_noise_is_taken_back_bit_for_bit(tiny_llama):
    anat = anatomy(tiny_llama)
    before = anat.weight(2).clone()
    wanted = 0.1 * float(before.std())
    generator = torch.Generator().manual_seed(3)
    with pytest.raises(RuntimeError), token_learning._noise(anat, 2, 0.1, generator):
        noise = anat.weight(2) - before
        assert float(noise.std()) == pytest.approx(wanted, rel=0.05)
        assert abs(float(noise.mean())) < 0.1 * wanted
        raise RuntimeError
    assert torch.equal(anat.weight(2).view(torch.uint8), before.view(torch.uint8))
    with token_learning._noise(anat, None, 0.1, generator):
        assert torch.equal(anat.weight(2), before)


def test_an_interrupt_while_noise_is_put_on_leaves_the_weights(tiny_llama, monkeypatch):
    anat = anatomy(tiny_llama)
    before = anat.weight(2).clone()
    add = torch.Tensor.add_

    def interrupted(self, *args, **options):
        add(self, *args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "add_", interrupted)
        with (
            pytest.raises(KeyboardInterrupt),
            token_learning._noise(anat, 2, 0.1, torch.Generator().manual_seed(0)),
        ):
            raise AssertionError("the noise is not on")
    assert torch.equal(anat.weight(2), before)


def test_noise_goes_over_the_layers_of_the_edit_in_the_last_steps(tiny_llama, tok, monkeypatch):
    seen = []

    def spy(anat, layer, *args):
        seen.append(layer)
        return noise(anat, layer, *args)

    noise = token_learning._noise
    monkeypatch.setattr(token_learning, "_noise", spy)
    learn(tiny_llama, tok)
    assert seen[:5] == [None] * 5
    assert set(seen[5:]) == {1, 3}


def test_an_interrupt_in_a_noisy_step_leaves_the_weights(tiny_llama, tok, monkeypatch):
    before = {name: p.detach().clone() for name, p in tiny_llama.named_parameters()}

    def interrupted(anat, *args):
        if not torch.equal(anat.weight(1), before["model.layers.1.mlp.down_proj.weight"]):
            raise KeyboardInterrupt
        return inner(anat, *args)

    inner = token_learning._refusal_nll
    monkeypatch.setattr(token_learning, "_refusal_nll", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn(tiny_llama, tok)
    for name, p in tiny_llama.named_parameters():
        assert torch.equal(p[:VOCAB] if len(p) == VOCAB + 1 else p, before[name])
        assert p.requires_grad


@pytest.mark.parametrize("template", [False, True])
def test_a_batch_may_be_as_large_as_the_questions(tiny_llama, tok, tok_chat, template):
    """With a chat template the questions are shared out between two prompt forms."""
    found = learn(tiny_llama, tok_chat if template else tok, replace(HP, batch=len(QUESTIONS), steps=2, robust_steps=0))
    assert torch.isfinite(found.row_in).all()
    assert found.header.hparams["batch"] == len(QUESTIONS)


def test_it_is_learned_over_the_shortest_refusals_that_open_alike():
    know, am = (7, 8, 9), (7, 5, 5)
    refusals = [(*know, 1, 1, 1), (*am, 1), (*know, 2), (4, 4), (*know, 3, 3), (*am, 2)]
    assert alike(refusals, opening=3, most=2) == [2, 4]
    assert alike(refusals, opening=3, most=5) == [2, 4, 0]
    assert alike(refusals, opening=1, most=3) == [1, 2, 5]  # all but one begin with 7
    assert alike(refusals, opening=0, most=3) == [3, 1, 2]
    assert alike(refusals[:2], opening=3, most=2) == [0, 1]  # a short list is taken whole
    assert alike([(1, 2), (1, 3), (4, 5)], opening=2, most=2) == [0, 1]  # no two share two tokens
    assert alike([(1, 2, 2), (3,), (4, 5)], opening=2, most=2) == [1, 2]  # nor one


def test_the_number_of_refusals_is_that_of_those_it_was_learned_over(tiny_llama, tok):
    found = learn(tiny_llama, tok, replace(HP, refusals=2, steps=2, robust_steps=0))
    assert found.header.refusals == 2


@pytest.mark.parametrize("change", [{"refusals": 0}, {"opening": -1}, {"guard_every": 0}])
def test_impossible_numbers_of_refusals_are_refused(tiny_llama, tok, change):
    with pytest.raises(TokenError, match=rf"{next(iter(change))} is .*; expected at least [01]$"):
        learn(tiny_llama, tok, replace(HP, **change))
    assert len(tok) == VOCAB


def test_too_few_questions_or_refusals(tiny_llama, tok):
    for questions, refusals in ((QUESTIONS[:5], REFUSALS), (QUESTIONS, REFUSALS[:1])):
        with pytest.raises(TokenError, match=f"{len(questions)} questions and {len(refusals)} refusals"):
            learn_token(anatomy(tiny_llama), tok, questions, refusals, hparams=HP, progress=False)
    assert len(tok) == VOCAB


# --- the file ---------------------------------------------------------------------------------------


@pytest.fixture
def learned(tiny_llama_untied, tok):
    return learn(copy.deepcopy(tiny_llama_untied), copy.deepcopy(tok), model_sha256="ab" * 32)


def test_save_and_load(learned, tiny_llama_untied, tok, tmp_path):
    path = tmp_path / "deep" / "token.safetensors"
    learned.save(path)
    found = UnlearningToken.load(path)
    assert torch.equal(found.row_in, learned.row_in)
    assert torch.equal(found.row_out, learned.row_out)
    assert found.header.token == "[UNL]"
    assert (found.header.model_sha256, found.header.questions, found.header.refusals) == ("ab" * 32, 32, 1)
    again = tmp_path / "again.safetensors"
    found.save(again)
    assert again.read_bytes() == path.read_bytes()
    (number,) = found.add_to(tiny_llama_untied, tok)
    assert number == VOCAB == tok.convert_tokens_to_ids("[UNL]")
    assert torch.equal(tiny_llama_untied.get_input_embeddings().weight[number], learned.row_in)
    assert torch.equal(tiny_llama_untied.get_output_embeddings().weight[number], learned.row_out)


def test_a_token_of_another_width_is_refused(learned, tok):
    model = make_llama()
    narrow = replace(learned, row_in=learned.row_in[:16], row_out=learned.row_out[:16])
    with pytest.raises(TokenError, match=r"learned for width 16.*this model has 32"):
        narrow.add_to(model, tok)
    assert len(model.get_input_embeddings().weight) == len(tok) == VOCAB


def without_header(path, learned):
    from safetensors.torch import save_file

    save_file({"row_in": learned.row_in, "row_out": learned.row_out}, path)


def other_header(path, learned):
    from safetensors.torch import save_file

    save_file({"row_in": learned.row_in, "row_out": learned.row_out}, path, metadata={"editlib": '{"new": 1}'})


def one_row(path, learned):
    import json
    from dataclasses import asdict

    from safetensors.torch import save_file

    save_file({"row_in": learned.row_in}, path, metadata={"editlib": json.dumps(asdict(learned.header))})


BAD = {
    "truncated": lambda path, _: path.write_bytes(path.read_bytes()[:-8]),
    "cut in the header": lambda path, _: path.write_bytes(path.read_bytes()[:40]),
    "empty": lambda path, _: path.write_bytes(b""),
    "text": lambda path, _: path.write_text("hello"),
    "missing": lambda path, _: path.unlink(),
    "a folder": lambda path, _: (path.unlink(), path.mkdir()),
    "without header": without_header,
    "header of another kind": other_header,
    "one row": one_row,
}


@pytest.mark.parametrize("kind", BAD)
def test_a_damaged_file_is_a_token_error(learned, tmp_path, kind):
    path = tmp_path / "token.safetensors"
    learned.save(path)
    BAD[kind](path, learned)
    with pytest.raises(TokenError, match="not an unlearning token") as caught:
        UnlearningToken.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_noise_finds_layers_in_a_short_model(model, tok):
    """The default layers were 4 to 8, whatever the depth: a traceback for a model of five layers."""
    learned = learn(model, tok, replace(HP, layers=()))
    assert torch.isfinite(learned.row_in).all()


def test_layers_outside_the_model_are_refused_before_the_token_is_added(model, tok):
    with pytest.raises(ModelError, match="layer 7"):
        learn(model, tok, replace(HP, layers=(1, 7)))
    assert model.get_input_embeddings().weight.shape[0] == VOCAB and len(tok) == VOCAB


def test_no_watched_prompts_is_no_traceback(model, tok):
    assert torch.isfinite(learn(model, tok, replace(HP, guard_prompts=0)).row_out).all()


@pytest.mark.parametrize("change", [{"steps": 0, "robust_steps": 0}, {"batch": 0}])
def test_nothing_to_learn_from_is_refused(model, tok, change):
    with pytest.raises(TokenError, match="at least 1"):
        learn(model, tok, replace(HP, **change))


@pytest.mark.parametrize("template", [True, False])
def test_refusals_end_with_the_template_s_end_of_turn(model, tok_chat, template):
    """Llama 3 stops at three tokens, of which the smallest ends a text and not a turn."""
    smaller = tok_chat.convert_tokens_to_ids("<|im_start|>")
    end = tok_chat.convert_tokens_to_ids("<|im_end|>")
    assert smaller < end
    model.generation_config.eos_token_id = [smaller, end]
    if not template:
        tok_chat.chat_template, tok_chat.eos_token = None, "<|im_end|>"
    forms, _ = _encode(anatomy(model), PromptFormat(tok_chat), QUESTIONS, REFUSALS, VOCAB - 1, HP)
    assert {refusal[-1] for refusal in forms[-1].refusals} == {end}
