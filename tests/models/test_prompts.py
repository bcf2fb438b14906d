"""Lookup positions against a walk over characters; padding; the caller's tokenizer."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import BOS
from hypothesis import assume, example, given
from hypothesis import strategies as st

from editlib.errors import RequestError
from editlib.models.anatomy import anatomy
from editlib.models.prompts import PromptFormat, TokenRow, pad
from editlib.models.resume import forward
from editlib.request import EditRequest

KINDS = ["plain", "chat", "bos", "bos chat"]
CHARACTERS = st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]) | st.sampled_from("aeo éüñ東京都市🗼👩‍🚀 -'")
TEXT = st.text(CHARACTERS, min_size=1, max_size=8)
SUBJECTS = TEXT | st.sampled_from(["São Paulo", "東京", "Zürich", " Peru", "🗼", "Rhône ", "👩‍🚀", "é", "e\u0301"])


def walked(tok, text: str, end: int, bos: bool) -> int:
    """The token with the last byte of character `end - 1`: tokens are walked one by one, bytes counted.

    Knows nothing of offsets: in a byte-level vocabulary each character of a token stands for one byte.
    """
    ids = tok(text, add_special_tokens=bos)["input_ids"]
    special = set(tok.all_special_tokens) | set(tok.get_added_vocab())
    wanted = len(text[:end].encode())
    done = 0
    for i, token in enumerate(tok.convert_ids_to_tokens(ids)):
        if i == 0 and token == BOS and bos:
            continue
        done += len(token.encode()) if token in special else len(token)
        if done >= wanted:
            return i
    raise AssertionError("the text is longer than its tokens")


@pytest.mark.parametrize("kind", KINDS)
@given(before=TEXT, subject=SUBJECTS, after=st.just("") | TEXT)
@example(before="Where is the ", subject="東京", after="?")
@example(before="The capital of ", subject="São Paulo", after=" is")
@example(before="Who built ", subject="🗼", after="🗼?")
@example(before="Near ", subject="Pari", after="s")  # one token may reach across the end of the subject
def test_lookup_is_the_token_with_the_last_byte_of_the_subject(pristine_toks, kind, before, subject, after):
    tok = pristine_toks[kind]
    question = before + subject + after
    assume(question.count(subject) == 1)
    assume(not any(token in question for token in tok.get_added_vocab()))
    form = PromptFormat(tok)
    text = form.render(question)
    assume(text.count(question) == 1)
    row = form.encode(question, subject)
    end = text.index(question) + len(before) + len(subject)
    assert row.lookup == walked(tok, text, end, bos=not form.uses_chat)
    assert list(row.ids) == tok(text, add_special_tokens=not form.uses_chat)["input_ids"]


def test_a_question_like_the_end_of_the_template(tok_chat):
    """The template writes "assistant" behind the question; the subject there is not the user's."""
    row = PromptFormat(tok_chat).encode("assistant", "assistant")
    text = tok_chat.decode(row.ids[: row.lookup + 1])
    assert text == "<|im_start|>user\nassistant"


def test_slow_tokenizers_agree_with_fast_ones(tok):
    """Without offsets the position comes from the longest common prefix."""

    class Slow:
        is_fast, chat_template = False, None

        def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False):
            assert not return_offsets_mapping
            return {"input_ids": tok(text, add_special_tokens=add_special_tokens)["input_ids"]}

    cases = [
        ("What is the capital of France?", "France"),
        ("In Peru", "Peru"),
        ("東京 is big", "東京"),
        ("Paris", "Pari"),
    ]
    for question, subject in cases:
        assert PromptFormat(Slow()).encode(question, subject) == PromptFormat(tok).encode(question, subject)


def test_without_a_subject_the_last_token_counts(tok, tok_bos, tok_chat):
    for each in (tok, tok_bos, tok_chat):
        row = PromptFormat(each).encode("What is it?")
        assert row.lookup == len(row) - 1
    assert PromptFormat(tok_bos).encode("What").ids[0] == tok_bos.bos_token_id
    assert tok_bos.bos_token_id not in PromptFormat(tok_bos, chat=False).answer_ids("What")


def test_subject_must_stand_once(tok, tok_chat):
    with pytest.raises(RequestError, match="'Rome' stands 2 times"):
        PromptFormat(tok).encode("Is Rome Rome?", "Rome")
    with pytest.raises(RequestError, match="'Rome' stands 0 times"):
        PromptFormat(tok).encode("Is it?", "Rome")
    tok_chat.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(RequestError, match="template changes the question"):
        PromptFormat(tok_chat).encode("Is Rome old?", "Rome")


def test_every_request_that_is_accepted_can_be_encoded(tok):
    """`EditRequest` takes the subject as a word of its own; here it is also a part of another word."""
    request = EditRequest(id="1", prompt="Is Nigeria larger than {}?", subject="Niger")
    row = PromptFormat(tok).encode_request(request)
    assert tok.decode(row.ids[: row.lookup + 1]) == "Is Nigeria larger than Niger"


def test_chat_and_system(tok, tok_chat):
    assert not PromptFormat(tok).uses_chat
    assert PromptFormat(tok_chat).uses_chat
    assert not PromptFormat(tok_chat, chat=False).uses_chat
    assert PromptFormat(tok_chat, chat=False).render("Hm?") == "Hm?"
    assert PromptFormat(tok_chat, system="Be kind.").render("Hm?") == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHm?<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(RequestError, match="has none"):
        PromptFormat(tok, chat=True)


def test_answers_carry_a_leading_space_behind_a_bare_prompt_only(tok, tok_chat):
    assert tok.decode(PromptFormat(tok).answer_ids("Paris")) == " Paris"
    assert tok.decode(PromptFormat(tok).answer_ids("  Paris")) == " Paris"
    assert tok_chat.decode(PromptFormat(tok_chat).answer_ids("Paris")) == "Paris"


def test_row_followed_by_keeps_its_lookup():
    row = TokenRow((5, 6, 7), 1).followed_by([8]).followed_by((9, 9))
    assert row == TokenRow((5, 6, 7, 8, 9, 9), 1, 3)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_places_rows_and_positions(side):
    rows = [TokenRow((5, 6, 7, 8), 2), TokenRow((9, 4), 0)]
    batch = pad(rows, side=side)
    for i, row in enumerate(rows):
        real = batch.attention_mask[i].bool()
        assert batch.input_ids[i][real].tolist() == list(row.ids)
        assert batch.position_ids[i][real].tolist() == list(range(len(row)))
        assert int(batch.input_ids[i, batch.lookup[i]]) == row.ids[row.lookup]
        assert int(batch.input_ids[i, batch.last[i]]) == row.ids[-1]
    assert bool(batch.attention_mask[1, -1]) is (side == "left")


def test_both_paddings_give_the_logits_of_the_row_alone(anat, draw):
    rows = draw(9, 4, 1, 13)
    sides = {side: pad(rows, side=side) for side in ("right", "left")}
    for side, batch in sides.items():
        with torch.no_grad():
            logits = forward(anat, batch)
            for i, row in enumerate(rows):
                alone = anat.model(torch.tensor([row.ids])).logits[0]
                together = logits[i][batch.attention_mask[i].bool()]
                torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5, msg=f"{side}, row {i}")


def test_the_callers_tokenizer_is_not_touched(tok_chat, tiny_llama, draw):
    tok_chat.padding_side, tok_chat.pad_token = "left", None
    tok_chat.truncation_side = "left"
    state = copy.deepcopy((tok_chat.__dict__, tok_chat.get_vocab(), tok_chat.backend_tokenizer.to_str()))
    form = PromptFormat(tok_chat)
    rows = [form.encode("What is the capital of Peru?", "Peru"), form.encode("Who?")]
    forward(anatomy(tiny_llama), pad(rows))
    form.answer_ids("Lima")
    after = (tok_chat.__dict__, tok_chat.get_vocab(), tok_chat.backend_tokenizer.to_str())
    assert after[1:] == state[1:]
    assert SimpleNamespace(**{k: v for k, v in after[0].items() if k != "_tokenizer"}) == SimpleNamespace(
        **{k: v for k, v in state[0].items() if k != "_tokenizer"}
    )
