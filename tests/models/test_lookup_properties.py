"""Lookup positions against the bytes of the tokens, for every style of tokenizer.

What is right is found without offsets and without a second encoding: each token stands for bytes that its vocabulary
entry names, and the bytes of all tokens are laid along the text.
"""

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tiny_models import BOS
from tokenisers import BYTE_LEVEL, LOSSY, SENTENCEPIECE, START, byte_level_bytes, piece_bytes

from editlib.errors import RequestError
from editlib.models.prompts import MARK, PromptFormat, TokenRow, pad
from editlib.requests.templates import occurrences

CHARACTERS = st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Co"], exclude_characters="▁\ufffd")
FAMILIAR = st.sampled_from("aeo éãüñ東京都市🗼 -'.?")
WORDS = st.sampled_from(
    ["Is ", "the capital ", " of", "São", "Par", "Pariser", " Rhine", "Niger", "東京", "  ", "{}", "{a}"]
)
TEXT = st.lists(FAMILIAR | WORDS | CHARACTERS, max_size=7).map("".join)
SUBJECTS = (TEXT | st.sampled_from(["São Paulo", "東", "Zürich", "Pari", "🗼", "👩‍🚀", "e\u0301", "Niger"])).map(
    str.strip
)
CLOSING = ",;:)]}%.!?'\u2019\u201d"  # beginnings of an answer that take no space before them
ANSWERS = (TEXT | st.text(max_size=12)).filter(lambda text: text.lstrip()[:1] not in [*CLOSING])
quick = settings(deadline=None, max_examples=40)


def each(*names: str):
    return pytest.mark.parametrize("form", names, indirect=True)


@pytest.fixture(scope="module")
def form(request):
    return PromptFormat({**BYTE_LEVEL, **SENTENCEPIECE, **LOSSY}[request.param]())


@pytest.fixture(scope="module")
def packaged(real_tok):
    return real_tok


def asked(question: str, subject: str, form: PromptFormat) -> None:
    """Skips what no request could be, and text that holds a special token's name."""
    assume(subject and len(occurrences(question, subject)) == 1)
    assume(not any(token in question for token in form.tok.all_special_tokens))


def owners(form: PromptFormat, row: TokenRow, text: str) -> list[int]:
    """Which token each byte of `text` is in. A tokenizer may put blanks in, or drop those at the beginning."""
    tokens = form.tok.convert_ids_to_tokens(list(row.ids))
    special = form.tok.all_special_tokens
    bare = form.tok.backend_tokenizer if form.tok.is_fast else getattr(form.tok, "bare", None)
    byte_level = bare is not None and "ByteLevel" in bare.to_str()
    data, found = text.encode(), []
    for i, token in enumerate(tokens):
        if i == 0 and token in (BOS, START) and not form.uses_chat:
            continue
        stands_for = token.encode() if token in special else (byte_level_bytes if byte_level else piece_bytes)(token)
        for byte in stands_for:
            while byte != 32 and data[len(found)] == 32 and not data[: len(found)].strip():
                found.append(i)
            if data[len(found) : len(found) + 1] == bytes([byte]):
                found.append(i)
            else:
                assert byte == 32, f"{token!r} is not in the text at byte {len(found)}"
    assert len(found) == len(data)
    return found


def check_places(form: PromptFormat, before: str, subject: str, after: str) -> None:
    question = before + subject + after
    asked(question, subject, form)
    text = form.render(question)
    assume(text.count(question.strip()) == 1)
    row = form.encode(question, subject)
    where = owners(form, row, text)
    start = text.index(question.strip()) - question.index(question.strip()) + occurrences(question, subject)[0]
    first, last = len(text[:start].encode()), len(text[: start + len(subject)].encode()) - 1
    assert row.lookup == where[last]
    assert form.encode(question, subject, place="subject_first").lookup == where[first]
    after_last = form.encode(question, subject, place="subject_first_after_last")
    assert after_last.lookup == min(where[last] + 1, len(row) - 1)
    assert form.encode(question, subject, place="last").lookup == len(row) - 1


@each(*BYTE_LEVEL, *SENTENCEPIECE)
@quick
@given(before=TEXT, subject=SUBJECTS, after=TEXT)
@example(before="Where is ", subject="北", after="海道?")  # a run of characters outside the vocabulary
@example(before="Where is 北", subject="海道", after="?")
@example(before="", subject="東京", after="")
@example(before="", subject="🗼", after="🗾 in Rhône")
@example(before="Is the ", subject="São Paulo", after=" large?")
@example(before="Near ", subject="Pari", after="s is")  # one token reaches across the end of the subject
@example(before="Near Pa", subject="ris", after="")  # and here across its start
def test_first_and_last_token_hold_the_first_and_last_byte(form, before, subject, after):
    check_places(form, before, subject, after)


@pytest.mark.real
@pytest.mark.parametrize("chat", [True, False])
@quick
@given(before=TEXT, subject=SUBJECTS, after=TEXT)
@example(before="What is the capital of ", subject="S\u00e3o Tom\u00e9", after="?")
@example(before="Where is ", subject="\N{TOKYO TOWER}", after="\N{SILHOUETTE OF JAPAN} now?")
@example(before="Near ", subject="Pari", after="s")
def test_the_packaged_tokenizer_too(packaged, chat, before, subject, after):
    question = before + subject + after
    assume(packaged.decode(packaged(question)["input_ids"]) == question)  # some bytes are not in its vocabulary
    check_places(PromptFormat(packaged, chat=chat), before, subject, after)


@pytest.mark.real
@pytest.mark.parametrize("chat", [True, False])
@quick
@given(answer=ANSWERS)
@example(answer="\n\n Paris")
@example(answer="1990")
def test_the_packaged_tokenizers_answers_are_those_of_the_tokenizer_alone(packaged, chat, answer):
    text = answer.lstrip() if chat else " " + answer.lstrip()
    assert (
        list(PromptFormat(packaged, chat=chat).answer_ids(answer))
        == packaged(text, add_special_tokens=False)["input_ids"]
    )


@each("wordpiece", "composing", "unigram unknown")
@quick
@given(before=TEXT, subject=SUBJECTS, after=TEXT)
@example(before="In ", subject="Caf\u00e9", after="s")
@example(before="In ", subject="cafe\u0301", after="")  # the accent is dropped: no token has the last character
@example(before="", subject="東京", after="")
@example(before="Is ", subject="e", after="\u0301?")  # the end of the subject is in the middle of a character
@example(before="Is e", subject="\u0301a", after="?")
@example(before="Is ", subject="한국", after="?")  # one character becomes three
def test_lossy_tokenizers_agree_with_their_own_offsets(form, before, subject, after):
    question = before + subject + after
    asked(question, subject, form)
    encoded = form.tok(question)
    start = occurrences(question, subject)[0]
    spans = {i: encoded.token_to_chars(i) for i, word in enumerate(encoded.word_ids()) if word is not None}
    tokens = form.tok.convert_ids_to_tokens(encoded["input_ids"])
    holding = [
        [i for i, span in spans.items() if span.start <= at < span.end and (tokens[i] != "▁" or question[at] == " ")]
        for at in range(start, start + len(subject))
    ]
    held = [indices for indices in holding if indices]
    if not held:
        with pytest.raises(RequestError, match="drops all of the subject"):
            form.encode(question, subject)
        return
    assert form.encode(question, subject).lookup == held[-1][-1]
    assert form.encode(question, subject, place="subject_first").lookup == held[0][0]


@each("slow words")
@quick
@given(before=TEXT, subject=SUBJECTS, after=TEXT)
@example(before="Is ", subject="Paris", after="ian")
@example(before="", subject="Rome", after="")
def test_slow_words_are_counted(form, before, subject, after):
    """Nothing but the letters of the pieces says where a token of this one ends."""
    question = before + subject + after
    asked(question, subject, form)
    start = occurrences(question, subject)[0]
    letters = [len("".join(text.lower().split())) for text in (question[:start], question[: start + len(subject)])]
    assume(letters[1] > letters[0])
    row = form.encode(question, subject)
    where = [i for i, token in enumerate(form.tok.convert_ids_to_tokens(list(row.ids))) if i for _ in token.strip("#")]
    assume("#" not in question)
    assert row.lookup == where[letters[1] - 1]
    assert form.encode(question, subject, place="subject_first").lookup == where[letters[0]]


@each(*BYTE_LEVEL, *SENTENCEPIECE, *LOSSY)
@quick
@given(question=TEXT.filter(str.strip))
def test_ids_are_the_tokenizers_own_without_what_it_puts_at_the_end(form, question):
    own = form.tok(form.render(question), add_special_tokens=not form.uses_chat)["input_ids"]
    ids = list(form.encode(question).ids)
    assert own[: len(ids)] == ids
    behind = own[len(ids) :]
    bare = form.tok(form.render(question), add_special_tokens=False)["input_ids"]
    assert behind in ([], [form.tok.convert_tokens_to_ids("</s>")])
    assert ids[-1:] == bare[-1:] or not bare


@each(*BYTE_LEVEL, *SENTENCEPIECE, *LOSSY)
@quick
@given(question=TEXT.filter(str.strip), answer=TEXT.map(str.strip).filter(bool))
@example(question="The capital of France is", answer="Paris")
@example(question="Where is 東京?", answer="東 Japan")
@example(question="Is it?", answer='"s"')
def test_an_answer_behind_its_prompt_is_running_text(form, question, answer):
    assume(answer[0] not in CLOSING)
    asked(question + " " + answer, question + " " + answer, form)
    prompt, ids = form.encode(question).ids, form.answer_ids(answer)
    shown = question + " " + answer
    if form.uses_chat:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": MARK}]
        shown = form.tok.apply_chat_template(messages, tokenize=False).rpartition(MARK)[0] + answer
    whole = tuple(form.tok(shown, add_special_tokens=False)["input_ids"])
    bare = prompt[len(prompt) - len(form.tok(form.render(question), add_special_tokens=False)["input_ids"]) :]
    if whole[: len(bare)] == bare:
        assert whole[len(bare) :] == ids
    assert form.tok.decode([*bare, *ids]).split() == form.tok.decode(list(whole)).split()


@each("gpt2", "bos", "chatml", "roberta")
@quick
@given(answer=ANSWERS)
def test_byte_level_answers_are_those_of_the_tokenizer_alone(form, answer):
    text = answer.lstrip() if form.uses_chat else " " + answer.lstrip()
    assert list(form.answer_ids(answer)) == form.tok(text, add_special_tokens=False)["input_ids"]


@each(*BYTE_LEVEL, *SENTENCEPIECE)
@quick
@given(front=TEXT, end=TEXT, subject=SUBJECTS)
@example(front="Paris is a city. ", end=" Paris!", subject="Paris")
@example(front='{"a": {}} {} ', end="}{", subject="a")
def test_the_subject_may_stand_in_the_template_too(form, front, end, subject):
    question = f"Who is in {subject} now?"
    asked(question, subject, form)
    asked(front + "Who" + end, "Who", form)
    assume("{}" not in end)
    whole = front + question + end
    text = form.render(whole)
    assume(text.count(whole.strip()) == 1)
    row = form.encode(question, subject, template=front + "{}" + end)
    where = owners(form, row, text)
    last = text.index(whole.strip()) + whole.strip().index(question) + len("Who is in ") + len(subject)
    assert row.lookup == where[len(text[:last].encode()) - 1]
    assert row.ids == form.encode(whole).ids


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_padding_either_side_keeps_the_position(lengths, seed):
    rows = [TokenRow(tuple(range(1, n + 1)), (seed + n) % n) for n in lengths]
    for side in ("left", "right"):
        batch = pad(rows, side=side)
        assert batch.input_ids.gather(1, batch.lookup[:, None])[:, 0].tolist() == [row.lookup + 1 for row in rows]
        assert batch.position_ids.gather(1, batch.lookup[:, None])[:, 0].tolist() == [row.lookup for row in rows]
        assert batch.input_ids.gather(1, batch.last[:, None])[:, 0].tolist() == lengths
