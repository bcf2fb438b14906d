"""The unlearning token is learned on every architecture, in either dtype, and within a model's positions."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, SLOW, make
from tiny_models import train_tokenizer

from editlib.algorithms.unierase.token_learning import TokenHyperParams
from editlib.errors import TokenError
from editlib.models.positions import check_prompts, fitting
from editlib.models.prompts import PromptFormat
from editlib.workbench import Workbench

QUICK = TokenHyperParams(steps=2, robust_steps=0, averaged_steps=1, batch=4, questions=8, guard_prompts=6)


@pytest.mark.parametrize("family", [*FAMILIES, *SLOW])
@pytest.mark.parametrize("bf16", [False, True])
def test_it_is_learned_on_every_architecture(tmp_path, monkeypatch, family, bf16):
    """Some have few learned positions, others mix fp32 into narrower products."""
    monkeypatch.setattr("editlib.models.precision.bf16_is_faster", lambda: bf16)
    model = make(family)
    before = {name: weight.clone() for name, weight in model.named_parameters() if weight.shape[0] < 300}
    bench = Workbench.of(model, train_tokenizer(), tmp_path, name=family, progress=False)
    token = bench.make_token(hparams=QUICK)
    assert torch.isfinite(token.row_in).all() and torch.isfinite(token.row_out).all()
    assert token.header.questions == 8 and bench.tok.convert_tokens_to_ids("[UNL]") is not None
    for name, weight in model.named_parameters():  # all but the rows of the vocabulary
        if name in before:
            assert weight.dtype == before[name].dtype and torch.equal(weight, before[name]), name


def test_questions_beyond_the_positions_are_left_out(tmp_path, caplog):
    model = make("gpt2", n_positions=100, max_position_embeddings=100)
    bench = Workbench.of(model, train_tokenizer(), tmp_path, name="short", progress=False)
    with caplog.at_level("INFO"):
        bench.make_token(hparams=QUICK)
    assert "longer than the positions of short: left out" in caplog.text


def test_too_few_positions_are_one_line(tmp_path):
    model = make("gpt2", n_positions=40, max_position_embeddings=40)
    bench = Workbench.of(model, train_tokenizer(), tmp_path, name="short", progress=False)
    with pytest.raises(TokenError, match=r"short has 40 positions, too few for \d+ of the \d+ bundled questions"):
        bench.make_token(hparams=QUICK)
    assert "[UNL]" not in bench.tok.get_vocab()


def test_what_fits_is_what_is_not_refused(tiny_llama, tok_chat):
    form = PromptFormat(tok_chat)
    questions = ["." * n if n % 2 else ",." * n for n in range(1, 260, 5)]
    kept = fitting(tiny_llama, form, questions, answer_tokens=20)
    check_prompts(tiny_llama, form, zip(kept, kept, strict=True), answer_tokens=20)
    for question in set(questions) - set(kept):
        with pytest.raises(Exception, match="positions of this model"):
            check_prompts(tiny_llama, form, [("q", question)], answer_tokens=20)
    assert 0 < len(kept) < len(questions)
