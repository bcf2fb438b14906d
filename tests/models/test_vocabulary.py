"""A token's rows in the model and beside it."""

import pytest
import torch
from families import make
from tiny_models import VOCAB, make_llama

from editlib.errors import TokenError
from editlib.models.anatomy import anatomy
from editlib.models.freezing import no_param_grad
from editlib.models.vocabulary import add_token, rows_in_place, token_id, write_rows

IDS = torch.tensor([[5, VOCAB, 9, VOCAB, 7]])


def test_grows_when_there_is_no_room(tiny_model, tok):
    weights = {name: p.detach().clone() for name, p in tiny_model.named_parameters()}
    tied = anatomy(tiny_model).tied
    assert token_id(tok, "[UNL]") is None
    number = add_token(tiny_model, tok, "[UNL]")
    assert number == VOCAB == token_id(tok, "[UNL]")
    anat = anatomy(tiny_model)
    assert anat.tied == tied
    assert len(anat.embedding.weight) == len(anat.head.weight) == tiny_model.config.vocab_size == VOCAB + 1
    for name, p in tiny_model.named_parameters():
        assert torch.equal(p[: len(weights[name])], weights[name])


def test_uses_the_rows_of_a_padded_vocabulary(tok):
    model = make_llama(vocab=VOCAB + 4)
    before = model.get_input_embeddings().weight.detach().clone()
    assert add_token(model, tok, "[UNL]") == VOCAB
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_adding_twice_changes_nothing(tiny_llama, tok):
    assert add_token(tiny_llama, tok, "[UNL]") == add_token(tiny_llama, tok, "[UNL]") == VOCAB
    assert len(tok) == VOCAB + 1
    assert add_token(tiny_llama, tok, "[TWO]") == VOCAB + 1
    assert {"[UNL]", "[TWO]"} <= set(tok.all_special_tokens)  # the second does not put the first out


def test_the_token_is_one_token_wherever_it_stands(tiny_llama, tok):
    add_token(tiny_llama, tok, "[UNL]")
    assert tok("Who?[UNL]I am")["input_ids"].count(VOCAB) == 1
    assert tok.decode(tok("Who?[UNL]I")["input_ids"], skip_special_tokens=True) == "Who?I"


def test_an_ordinary_token_is_refused(tiny_llama, tok):
    with pytest.raises(TokenError, match="'a' is already an ordinary token"):
        add_token(tiny_llama, tok, "a")
    assert len(tok) == VOCAB


def test_growing_leaves_the_callers_random_state_alone(tiny_llama, tok):
    torch.manual_seed(4)
    wanted = torch.rand(3)
    torch.manual_seed(4)
    add_token(tiny_llama, tok, "[UNL]")
    assert torch.equal(torch.rand(3), wanted)


CASES = {
    "tied": lambda: make_llama(vocab=VOCAB + 4),
    "untied": lambda: make_llama(vocab=VOCAB + 4, tied=False),
    "the last row": lambda: make_llama(vocab=VOCAB + 1, tied=False),
    "gpt2": lambda: make("gpt2", vocab_size=VOCAB + 4),
    "biased head": lambda: make("phi", vocab_size=VOCAB + 4),
    "scaled embedding": lambda: make("gemma3_text", vocab_size=VOCAB + 4),
    "scaled by a number": lambda: make("biogpt", vocab_size=VOCAB + 4, scale_embedding=True),
    "scaled logits": lambda: make("granite", vocab_size=VOCAB + 4, logits_scaling=3.0),
}


@pytest.mark.parametrize("kind", CASES)
def test_rows_in_place_equal_rows_in_the_weights(kind):
    """Logits, and the gradients that autograd finds for the same rows inside the matrices."""
    model = CASES[kind]()
    anat = anatomy(model)
    generator = torch.Generator().manual_seed(8)
    row_in = torch.randn(anat.d_model, generator=generator) * 0.2
    row_out = row_in if anat.tied else torch.randn(anat.d_model, generator=generator) * 0.2
    labels = torch.tensor([VOCAB, 9, 8, 7, VOCAB])

    def loss(logits):
        return torch.nn.functional.cross_entropy(logits[0], labels)

    inside = [row.clone().requires_grad_() for row in ([row_in] if anat.tied else [row_in, row_out])]
    clean = anat.embedding.weight.detach().clone()
    with no_param_grad(model), rows_in_place(anat, [VOCAB], inside[0][None], inside[-1][None]):
        logits = model(input_ids=IDS).logits
    loss(logits).backward()
    assert torch.equal(anat.embedding.weight, clean)
    assert anat.embedding.weight.grad is None

    write_rows(anat, VOCAB, row_in, row_out)
    written = model(input_ids=IDS).logits
    torch.testing.assert_close(logits, written, rtol=1e-5, atol=1e-5)
    loss(written).backward()
    matrices = [anat.embedding.weight] if anat.tied else [anat.embedding.weight, anat.head.weight]
    for row, matrix in zip(inside, matrices, strict=True):
        torch.testing.assert_close(row.grad, matrix.grad[VOCAB], rtol=1e-4, atol=1e-6)
    assert not anat.embedding._forward_hooks
    assert not anat.head._forward_hooks


def test_write_rows_touches_one_row(tiny_model, tok):
    add_token(tiny_model, tok, "[UNL]")
    before = {name: p.detach().clone() for name, p in tiny_model.named_parameters()}
    anat = anatomy(tiny_model)
    write_rows(anat, VOCAB, torch.full((32,), 2.0), torch.full((32,), 3.0))
    assert torch.equal(anat.embedding.weight[VOCAB], torch.full((32,), 2.0))
    assert torch.equal(anat.head.weight[VOCAB], torch.full((32,), 2.0 if anat.tied else 3.0))
    for name, p in tiny_model.named_parameters():
        rows = slice(0, VOCAB) if len(p) == VOCAB + 1 else slice(None)
        assert torch.equal(p[rows], before[name][rows])


def test_frozen_puts_everything_back(tiny_gpt2):
    tiny_gpt2.train()
    tiny_gpt2.transformer.h[1].eval()  # a part that the caller keeps at rest
    tiny_gpt2.transformer.wpe.weight.requires_grad_(False)
    modes = {name: module.training for name, module in tiny_gpt2.named_modules()}
    wanted = {name: p.requires_grad for name, p in tiny_gpt2.named_parameters()}
    with pytest.raises(RuntimeError), no_param_grad(tiny_gpt2):
        assert not any(module.training for module in tiny_gpt2.modules())
        assert not any(p.requires_grad for p in tiny_gpt2.parameters())
        raise RuntimeError
    assert {name: p.requires_grad for name, p in tiny_gpt2.named_parameters()} == wanted
    assert {name: module.training for name, module in tiny_gpt2.named_modules()} == modes
