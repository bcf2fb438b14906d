"""Prompts beyond a model's positions are one line, and batches are bounded by their tokens."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_cli import refused
from transformers import AutoConfig

from editlib.algorithms import values
from editlib.algorithms.unierase.examples import few_shot_format
from editlib.errors import ModelError, RequestError
from editlib.evaluation.answer_cache import ask
from editlib.models.anatomy import anatomy
from editlib.models.forward import forward
from editlib.models.generation import greedy, sample, sample_each
from editlib.models.positions import check_prompts, check_requests_fit, positions_of
from editlib.models.prompt_settings import PromptSettings
from editlib.models.prompts import PromptFormat, TokenRow, pad
from editlib.requests.request import EditRequest


def question_of(form, tokens):
    """A question whose prompt has exactly so many tokens."""
    front = len(form.encode("").ids) if form.render("") else 0
    text = "".join("." if i % 2 else "," for i in range(tokens - front))
    assert len(form.encode(text)) == tokens
    return text


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("answer_tokens", [0, 24])
def test_the_limit_is_exact(tiny_model, tok_chat, chat, answer_tokens):
    limit = positions_of(tiny_model)
    form = PromptFormat(tok_chat, chat=chat)
    check_prompts(tiny_model, form, [("fits", question_of(form, limit - answer_tokens))], answer_tokens=answer_tokens)
    long = question_of(form, limit - answer_tokens + 1)
    with pytest.raises(
        RequestError, match=rf"'a': its prompt needs {limit + 1} tokens.* at most {limit}.*\(and 1 more\)"
    ):
        check_prompts(tiny_model, form, [("fits", "Who?"), ("a", long), ("b", long + ".")], answer_tokens=answer_tokens)


def test_what_is_around_a_question_counts(tiny_llama, tok_chat):
    limit = positions_of(tiny_llama)
    form = PromptFormat.of(tok_chat, PromptSettings(system=", " * limit))
    with pytest.raises(RequestError, match="positions"):
        check_prompts(tiny_llama, form, [("short", "Who?")])


def test_all_wordings_and_the_new_answer_count(tiny_llama, tok):
    form, limit = PromptFormat(tok), positions_of(tiny_llama)
    fact = EditRequest(id="f", prompt="Who is {}?", subject="Ann", target_new="Bob")
    check_requests_fit(tiny_llama, form, [fact])
    for changed in (
        EditRequest(id="f", prompt="Who is {}?", subject="Ann", phrasings=("{}" + "." * limit,)),
        EditRequest(id="f", prompt="Who is {}?", subject="Ann", paraphrases=("." * (limit + 1),)),
        EditRequest(id="f", prompt="Who is {}?", subject="Ann", target_new="," * limit),
    ):
        with pytest.raises(RequestError, match="request 'f'"):
            check_requests_fit(tiny_llama, form, [changed])


def test_nothing_is_asked_where_one_question_is_too_long(tiny_llama, tok, monkeypatch):
    monkeypatch.setattr("editlib.evaluation.answer_cache.greedy", None)
    with pytest.raises(RequestError, match="positions of this model"):
        ask(anatomy(tiny_llama), tok, ["Who?", ", " * positions_of(tiny_llama)])


def test_commands_refuse_before_statistics_are_made(call, folder, tmp_path):
    facts = tmp_path / "facts.jsonl"
    rows = [
        {"id": "ok", "prompt": "Who is {}?", "subject": "Ann"},
        {"id": "long", "prompt": "{}" + ". " * 400, "subject": "Ann"},
    ]
    facts.write_text("\n".join(json.dumps({**row, "target_new": "Bob"}) for row in rows), encoding="utf-8")
    hparams = tmp_path / "MEMIT.json"
    hparams.write_text(json.dumps({"layers": [1], "mom2_update_weight": 1.0, "v_lr": 0.1, "v_num_grad_steps": 1}))
    args = ["--requests", facts, "--hparams", hparams, "--algorithm", "MEMIT", "--stats-dir", tmp_path / "stats"]
    refused(call("edit", folder, *args, "--out", tmp_path / "out"), "long", "256")
    assert not (tmp_path / "stats").exists() and not (tmp_path / "out").exists()
    refused(call("attack", folder, folder, "--requests", facts, "--out", tmp_path / "attacks"), "answer")
    refused(call("ask", folder, ". " * 400), "256")


def test_suffixes_of_like_length_stand_together_where_there_are_many():
    requests = [[TokenRow((1,) * (10 + width), 10)] * 4 for width in (2, 9, 2, 3, 9, 2)]
    groups = values._chunks(requests, [[]] * 6, [(1,)] * 6, 50)
    assert groups == [[0, 2, 5, 3], [1, 4]]  # 48 with padding, and 180 would hold 72
    assert values._chunks(requests, [[]] * 6, [(1,)] * 6, 300) == [[0, 2, 5, 3, 1, 4]]


def test_values_are_found_for_so_many_tokens_at_once():
    def rows(length, count):
        return [[TokenRow((1,) * length, 0)] * 2 for _ in range(count)]

    short = values._chunks(rows(20, 100), [[]] * 100, [(1,)] * 100, 48)
    assert [len(group) for group in short] == [32, 32, 32, 4]
    long = values._chunks(rows(1000, 10), [[]] * 10, [(1,)] * 10, 48)
    assert [len(group) for group in long] == [4, 4, 2]
    assert values._chunks(rows(values.CHUNK_TOKENS, 2), [[]] * 2, [(1,)] * 2, 48) == [[0], [1]]


@pytest.mark.parametrize(("name", "config"), [("gpt2", {"n_positions": 16}), ("mpt", {"max_seq_len": 16})])
def test_every_name_of_the_positions(name, config):
    """MPT's is its own."""
    made = AutoConfig.for_model(name, **config)
    assert positions_of(SimpleNamespace(config=made)) == 16


@pytest.mark.parametrize("drafted", [False, True])
def test_what_a_model_writes_ends_where_its_positions_end(tiny_gpt2, draw, drafted):
    """Positions that were learned end there: the next is an error of torch. Each token is the likeliest by plain
    passes, and what was written can be read again."""
    tiny_gpt2.transformer.wpe = torch.nn.Embedding.from_pretrained(tiny_gpt2.transformer.wpe.weight[:16])
    tiny_gpt2.config.n_positions = 16
    tiny_gpt2.generation_config.eos_token_id = None
    anat, rows = anatomy(tiny_gpt2), draw(16, 10, 15, 3)
    drafts = [tuple(range(40, 64))] * 4
    if drafted:  # right up to the end, and beyond it
        drafts = [said + (9,) * 9 for said in greedy(anat, rows, max_new_tokens=24)]
    said = greedy(anat, rows, max_new_tokens=24, drafts=drafts)
    assert [len(answer) for answer in said] == [1, 6, 1, 13]
    with torch.no_grad():
        for row, answer in zip(rows, said, strict=True):
            logits = tiny_gpt2(torch.tensor([(row.ids + answer)[:16]])).logits[0, len(row) - 1 :]
            assert logits.argmax(-1).tolist()[: len(answer)] == list(answer)
    generator = torch.Generator().manual_seed(0)
    sampled = sample(anat, rows, max_new_tokens=24, top_k=5, generator=generator)
    each = sample_each(anat, rows, [1, 2, 3, 4], max_new_tokens=24)
    assert [len(answer) for answer in sampled] == [len(answer) for answer in each] == [1, 6, 1, 13]


def test_a_pass_over_too_many_tokens_is_one_line(tiny_gpt2, draw):
    with pytest.raises(ModelError, match="takes 257 tokens, but the model has 256 positions"):
        forward(anatomy(tiny_gpt2), pad(draw(257, 3)))
    with pytest.raises(IndexError):  # a fault of another kind is not called so
        forward(anatomy(tiny_gpt2), pad([TokenRow((10_000,), 0)]))


def test_few_shot_prompts_have_only_examples_that_fit(tok):
    fact = EditRequest(
        id="f", prompt="What is the capital of {}?", subject="France", answer="Paris", relation="capital"
    )
    others = [
        EditRequest(id=name, prompt="What is the money of {}?", subject=name, answer=money, relation="money")
        for name, money in (("Japan", "yen"), ("Peru", "sol"), ("India", "rupee"))
    ]
    made = few_shot_format(PromptFormat(tok), fact, others)
    length = len(made.encode(fact.question))
    assert len(made.shots) == 3 and few_shot_format(PromptFormat(tok), fact, others, limit=length) == made
    fewer = few_shot_format(PromptFormat(tok), fact, others, limit=length - 1)
    assert fewer.shots == made.shots[1:] and len(fewer.encode(fact.question)) < length
    assert few_shot_format(PromptFormat(tok), fact, others, limit=len(fewer.encode(fact.question)) - 1) is None
