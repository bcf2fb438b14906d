"""Lookup positions against a walk over characters; padding; the caller's tokenizer."""

import copy
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tiny_models import BOS
from tokenisers import (
    BYTE_LEVEL,
    LLAMA2,
    LOSSY,
    SENTENCEPIECE,
    THINKING,
    Slow,
    llama_bpe,
    unsplit_byte_bpe,
    wordpiece,
    wrapped,
)
from tokenizers import Tokenizer, decoders, models

from editlib.errors import RequestError
from editlib.models.anatomy import anatomy
from editlib.models.forward import forward
from editlib.models.prompts import LookupPlace, PromptFormat, TokenRow, pad, token_windows
from editlib.requests.request import EditRequest

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


def test_without_a_subject_the_last_token_counts(tok, tok_bos, tok_chat):
    for each in (tok, tok_bos, tok_chat):
        row = PromptFormat(each).encode("What is it?")
        assert row.lookup == len(row) - 1
    assert PromptFormat(tok_bos).encode("What").ids[0] == tok_bos.bos_token_id
    assert tok_bos.bos_token_id not in PromptFormat(tok_bos, chat=False).answer_ids("What")


def test_subject_must_stand_once(tok, tok_chat):
    with pytest.raises(RequestError, match="'Rome' occurs 2 times"):
        PromptFormat(tok).encode("Is Rome Rome?", "Rome")
    for each in (tok, tok_chat):
        rows = [PromptFormat(each).encode("Is Rome Rome?", "Rome", start=start) for start in (3, 8)]
        ends = [each.decode(row.ids[: row.lookup + 1]) for row in rows]
        assert ends[0].endswith("Is Rome") and ends[1].endswith("Is Rome Rome") and rows[0].ids == rows[1].ids
    with pytest.raises(RequestError, match="'Rome' occurs 0 times"):
        PromptFormat(tok).encode("Is it?", "Rome")
    tok_chat.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(RequestError, match="template changes the question"):
        PromptFormat(tok_chat).encode("Is Rome old?", "Rome")


def test_every_request_that_is_accepted_can_be_encoded(tok):
    """`EditRequest` takes the subject as a word of its own; here it is also a part of another word."""
    request = EditRequest(id="1", prompt="Is Nigeria larger than {}?", subject="Niger")
    row = PromptFormat(tok).encode(request.question, request.subject)
    assert tok.decode(row.ids[: row.lookup + 1]) == "Is Nigeria larger than Niger"


def test_places_of_the_published_settings():
    """By hand, for a subject of four tokens whose leading space is in the first of them."""
    tok = wrapped(llama_bpe("first", split=False), ends="<s> $A")
    form, question, subject = PromptFormat(tok), "Is São Paulo in Peru?", "São Paulo"
    tokens = tok.convert_ids_to_tokens(list(form.encode(question).ids))
    assert tokens == ["<s>", "▁Is", "▁S", "ão", "▁Pau", "lo", "▁in", "▁P", "er", "u", "?"]
    found = {place: form.encode(question, subject, place=place).lookup for place in get_args(LookupPlace)}
    assert found == {"last": 10, "subject_first": 2, "subject_last": 5, "subject_first_after_last": 6}
    assert form.encode(question, "Rome", place="last").lookup == 10  # the subject is not looked for
    assert form.encode("Is São Paulo", subject, place="subject_first_after_last").lookup == 5
    with pytest.raises(RequestError, match="place 'first'; expected one of last, subject_first"):
        form.encode(question, subject, place="first")


@pytest.mark.parametrize("kind", [wrapped, Slow])
def test_a_later_merge_that_undoes_an_earlier_one(kind):
    """ "abc" alone is "ab", "c", but with "d" behind it "a", "bcd": the first difference is not the place."""
    vocab = {token: i for i, token in enumerate(["a", "b", "c", "d", "cd", "bcd", "ab"])}
    bare = Tokenizer(models.BPE(vocab, [("c", "d"), ("b", "cd"), ("a", "b")]))
    bare.decoder = decoders.Fuse()
    form = PromptFormat(kind(bare))
    assert form.encode("abcd", "abc") == TokenRow((0, 5), 1)
    assert form.encode("abcd", "cd", place="subject_first") == TokenRow((0, 5), 1)
    assert form.encode("abcd", "a") == TokenRow((0, 5), 0)


def test_the_end_of_a_prompt_is_the_end_of_its_text():
    """What a post-processor puts behind a text would end the prompt before its answer."""
    tok = wrapped(wordpiece(), ends="<s> $A </s>")
    form = PromptFormat(tok)
    assert tok.convert_ids_to_tokens(tok("Is Paris")["input_ids"]) == ["<s>", "is", "paris", "</s>"]
    row = form.encode("Is Paris", "Paris")
    assert tok.convert_ids_to_tokens(list(row.ids)) == ["<s>", "is", "paris"]
    assert row.lookup == form.encode("Is Paris").lookup == 2
    written = form.encode("Is </s>")  # but what the text itself says stays
    assert tok.convert_ids_to_tokens(list(written.ids)) == ["<s>", "is", "</s>"]


def test_a_subject_that_the_tokenizer_drops_is_refused():
    form = PromptFormat(wrapped(wordpiece()))
    for place in ("subject_first", "subject_last"):
        with pytest.raises(RequestError, match=r"drops all of the subject '\\u200b'"):
            form.encode("Is \u200b here?", "\u200b", place=place)


def test_templates_are_plain_text_around_the_question(tok):
    form = PromptFormat(tok)
    row = form.encode("Is Rome old?", "Rome", template='Rome {x} {0} {}. {{"Rome": 1}} {} Rome')
    assert tok.decode(row.ids) == 'Rome {x} {0} {}. {{"Rome": 1}} Is Rome old? Rome'
    assert tok.decode(row.ids[: row.lookup + 1]) == 'Rome {x} {0} {}. {{"Rome": 1}} Is Rome'
    with pytest.raises(RequestError, match=r'no "\{\}"; expected one in the place'):
        form.encode("Is Rome old?", "Rome", template="The first thing.")


def test_a_chat_template_may_strip_the_question():
    tok = wrapped(llama_bpe("first", split=False), chat=LLAMA2)
    row = PromptFormat(tok).encode("Is Paris large?", "Paris", template="\n {}\n")
    assert tok.decode(row.ids[: row.lookup + 1]) == "<s>[INST] Is Paris"


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


PARIS = {name: ["▁Paris"] for name in [*SENTENCEPIECE, "unigram unknown"]} | {
    "gpt2": ["ĠP", "a", "r", "i", "s"],
    "chatml": ["P", "a", "r", "i", "s"],
    "zephyr": ["P", "ari", "s"],
    "wordpiece": ["paris"],
    "slow words": ["par", "##is"],
}


@pytest.mark.parametrize("name", PARIS)
def test_answers_are_running_text_without_bos_or_eos(name):
    """In a text it is "▁Paris", wherever the tokenizer would put a "▁" of its own in front of a text."""
    tok = {**BYTE_LEVEL, **SENTENCEPIECE, **LOSSY}[name]()
    assert tok.convert_ids_to_tokens(list(PromptFormat(tok).answer_ids("Paris"))) == PARIS[name]


def test_what_a_template_writes_in_front_of_an_answer_is_not_the_answer():
    tok = wrapped(llama_bpe("first", split=False), chat=THINKING)
    assert tok.decode(PromptFormat(tok).answer_ids("Paris")) == "Paris"


def test_an_answer_that_melts_into_the_prompt_is_encoded_alone():
    tok = wrapped(unsplit_byte_bpe())
    front, both = (tok(text)["input_ids"] for text in ("a", "a Lima"))
    assert both[: len(front)] != front
    assert list(PromptFormat(tok).answer_ids("Lima")) == tok(" Lima")["input_ids"]


GAPS = [
    ("The capital of France is", "Paris", " "),
    ("The capital of France is", "  Paris", " "),
    ("The capital of France is ", "Paris", ""),
    ("The capital of France is ", " Paris", ""),
    ("The capital of France is\u00a0", "Paris", ""),
    ("Question: Where?\nAnswer:", "Paris", " "),
    ("Question: Where?\nAnswer:\n", "Paris", ""),
    ('He said: "', "Paris", ""),
    ('He said: "Yes"', "Paris", " "),
    ('Is it " Paris "', "yes", " "),
    ("He said: \u201c", "Paris", ""),
    ("He said: \u201cYes\u201d", "Paris", " "),
    ("Elle dit \u00ab\u00a0", "Paris", ""),
    ("Elle dit \u00ab Oui \u00bb", "Paris", " "),
    ("Er sagt: \u00bb", "Paris", ""),
    ("Er sagt: \u00bbJa\u00ab", "Paris", " "),
    ("Er sagt: \u201eJa\u201c", "Paris", " "),
    ("他说\u201c", "北京", ""),
    ("他说\u201c好\u201d", "北京", ""),
    ("Er sagt: \u201e", "Paris", ""),
    ("It is (", "Paris", ""),
    ("It is (or was)", "Paris", " "),
    ('{"city": "', "Paris", ""),
    ("the boys'", "Paris", " "),
    ("中国的首都是", "北京", ""),
    ("中国的首都是哪里？", "纽约", ""),
    ("中国的首都是哪里?", "纽约", ""),
    ("中国的首都是：", "Beijing", ""),
    ("问：中国的首都是哪里？\n答：", "北京", ""),
    ("Question: 中国的首都是哪里？\nAnswer:", "北京", " "),
    ("首都は", "東京", ""),
    ("首都は「", "東京", ""),
    ("トヨタの本社は", "愛知", ""),
    ("เมืองหลวงของไทยคือ", "กรุงเทพ", ""),
    ("대한민국의 수도는", "서울", " "),
    ("Столица России -", "Москва", " "),
    ("The Chinese name of Beijing is", "北京", " "),
    ("中国成立于1949", "年", ""),
    ("La capitale de l'", "Italie", ""),
    ("Il vient de l\u2019", "Italie", ""),
    ("Vive nell'", "Italia", ""),
    ("rock 'n'", "roll", " "),
    ("Pregunta: \u00bf", "Paris", ""),
    ("ประเทศในปี 2024 คือ", "กรุงเทพ", ""),
    ("ราชอาณาจักรต่าง ๆ", "กรุงเทพ", ""),
    ("「東京」は", "愛知", ""),
    ("대한민국의 수도는(", "서울", ""),
    ("राजधानी है:", "Paris", " "),
    ("Elle est a\u0300", "Paris", " "),
    ("He lives in Paris", ", France", ""),
    ("It is the boy", "'s ball", ""),
    ("It grew by 5", "%", ""),
    ("It is made with", ".NET", " "),
    ("Answer: **", "Paris", ""),
    ("Answer: **Yes**", "Paris", " "),
    ("<q>Where?</q><answer>", "Paris", ""),
    ("<q>Where?</q>", "Paris", " "),
    ("List<int>", "it is", " "),
    ("It costs $", "5", ""),
    ("Jean-", "Paul", ""),
    ("the years 1939\u2013", "1945", ""),
    ("See http://", "example.com", ""),
    ("aujourd'", "hui", ""),
    ("הוא גר ב", "ירושלים", ""),
    ("العاصمة هي", "القاهرة", " "),
    ("سافر إلى بيروت و", "القاهرة", ""),
    ("הוא גר ב", "Paris", " "),
]


@pytest.mark.parametrize("name", ["gpt2", "llama first", "llama legacy", "gemma", "unigram always", "slow unigram"])
@pytest.mark.parametrize(("prompt", "answer", "gap"), GAPS)
def test_prompt_and_answer_meet_as_in_running_text(name, prompt, answer, gap):
    form = PromptFormat({**BYTE_LEVEL, **SENTENCEPIECE}[name]())
    assert form.gap(answer, prompt) == gap
    ids = form.answer_ids(answer, prompt)
    read = form.tok.decode([*form.encode(prompt).ids, *ids], skip_special_tokens=True)
    if name not in ("unigram always", "slow unigram"):  # these read several blanks, and line ends, as others
        assert read == prompt + gap + answer.strip()
    word = form.tok.convert_ids_to_tokens(list(ids))[0]
    assert word.startswith(("Ġ", "▁")) is (gap == " ")


@pytest.mark.parametrize("answer", ["Paris", " Paris", "北京"])
def test_a_chat_template_decides_the_gap(answer):
    for chat, gap in ((LLAMA2, " "), (THINKING, "")):
        tok = wrapped(llama_bpe("first", split=False), ends="<s> $A", chat=chat)
        form = PromptFormat(tok)
        for question in ("Where?", "Where? ", "哪里", '"'):
            assert form.gap(answer, question) == gap
            assert tok.decode(form.answer_ids(answer, question)).strip() == answer.strip()


def test_shots_have_the_gap_of_running_text(tok):
    shots = (("Where?", "Rome"), ("首都は", "東京"), ("It is ", " Lima"))
    assert PromptFormat(tok, shots=shots).render("Who?") == "Where? Rome\n首都は東京\nIt is Lima\nWho?"


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


@pytest.mark.parametrize("kind", ["tok", "tok_bos"])
def test_every_window_of_a_text_begins_as_a_text_does(request, kind):
    """Windows behind the first once lacked BOS, which doubles the perplexity of models that were trained with it."""
    tok = request.getfixturevalue(kind)
    text = "The river Rhine flows through Basel, Bonn and Rotterdam. " * 3
    ids = tok(text, add_special_tokens=False)["input_ids"]
    windows = list(token_windows(tok, text, 10))
    front = [tok.bos_token_id] if kind == "tok_bos" else []
    assert all(window[: len(front)] == front and len(window) <= 10 for window in windows)
    assert [token for window in windows for token in window[len(front) :]] == ids
    assert all(len(window) == 10 for window in windows[:-1])
    assert list(token_windows(tok, "", 10)) == []


LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' +"
    " m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role'])"
    " + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ONLY_BETWEEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if not loop.last %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("chat", "special", "eos", "stops", "end"),
    [
        (LLAMA3, ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], 1, (0, 1, 2), "<|eot_id|>"),
        (LLAMA3, ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], 0, (0,), "<|eot_id|>"),  # not where generation stops
        (GEMMA, ["<eos>", "<end_of_turn>"], 0, (0, 1), "<end_of_turn>"),
        (QWEN, ["<|endoftext|>", "<|im_end|>"], 1, (1, 0), "<|im_end|>"),
        (ONLY_BETWEEN, ["<|endoftext|>", "<|im_end|>"], 0, (0, 1), "<|im_end|>"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", ["<a>", "<b>"], 1, (0, 1), "<b>"),
        (None, ["<a>", "<b>"], 1, (0, 1), "<b>"),
        (None, ["<a>", "<b>"], None, (0, 1), "<a>"),
        (None, ["<a>", "<b>"], 1, (), "<b>"),
        (None, ["<a>", "<b>"], None, (), None),
    ],
)
def test_an_answer_ends_with_what_the_template_writes_after_it(tok, chat, special, eos, stops, end):
    tok.add_tokens([*special, "<|start_header_id|>", "<start_of_turn>", "<|im_start|>"], special_tokens=True)
    ids = tok.convert_tokens_to_ids(special)
    tok.chat_template, tok.eos_token = chat, None if eos is None else special[eos]
    found = PromptFormat(tok).end_ids([ids[i] for i in stops])
    assert tok.convert_ids_to_tokens(list(found)) == ([] if end is None else [end])


@pytest.mark.parametrize(
    "template", ["{% for %}", "{% for m in messages %}", "{{ raise_exception('no') }}", "{{ a.b.c }}", "\n", "{{ '' }}"]
)
def test_a_template_that_cannot_be_used_is_one_line(tok_chat, template):
    tok_chat.chat_template = template
    with pytest.raises(RequestError, match=r"the chat template .*chat=false") as told:
        PromptFormat(tok_chat, chat=True).encode("Who?")
    assert "\n" not in str(told.value)
    assert PromptFormat(tok_chat, chat=False).encode("Who?").ids
