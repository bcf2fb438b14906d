"""Greedy answers against `model.generate` on each row by itself."""

import copy
import math

import pytest
import torch
from tiny_models import make_llama, row_maker

from editlib.models import generation
from editlib.models.anatomy import anatomy
from editlib.models.generation import continuation_nll, end_tokens, greedy, perplexity, sample, teacher_forced
from editlib.models.prompts import TokenRow
from editlib.models.tracing import record_inputs

NEW = 10


@torch.no_grad()
def generated(model, row, limit=NEW):
    """Plain `generate` for one row, without its end token."""
    ids = torch.tensor([row.ids])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, pad_token_id=0
    )
    tokens = out[0, ids.shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    return tuple(tokens[:-1] if tokens and tokens[-1] in ends else tokens)


@pytest.fixture(scope="module", params=["llama", "untied", "gpt2"])
def case(request, pristine):
    """A model, rows of mixed lengths and their answers, one of which ends at once, one later and one never.

    The end tokens are two that the model says of its own accord.
    """
    draw = row_maker()
    rows = [*draw(9, 4, 7), TokenRow((50,), 0), *draw(12, 10, same=6)]
    model = copy.deepcopy(pristine[request.param])
    model.generation_config.eos_token_id = None
    free = [generated(model, row) for row in rows]
    ends = next(
        [at_once, later]
        for at_once in (answer[0] for answer in free)
        for later in {token for answer in free for token in answer}
        if later != at_once and 1 < sum({at_once, later}.isdisjoint(answer) for answer in free) < len(free) - 1
    )
    model.generation_config.eos_token_id = ends
    wanted = [generated(model, row) for row in rows]
    assert {0, NEW} < {len(answer) for answer in wanted}
    return anatomy(model), rows, wanted


@pytest.fixture
def anat(case):
    return case[0]


@pytest.fixture
def rows(case):
    return case[1]


@pytest.fixture
def wanted(case):
    return case[2]


@pytest.mark.parametrize("batch_rows", [1, 2, 4, 64])
def test_equals_generate_row_by_row(anat, rows, wanted, batch_rows):
    assert greedy(anat, rows, max_new_tokens=NEW, batch_rows=batch_rows) == wanted


@pytest.mark.parametrize("batch_rows", [3, 64])
@pytest.mark.parametrize(
    "change",
    {
        "right": lambda answer: answer,
        "wrong at once": lambda answer: ((answer[0] + 1) % 300, *answer[1:]) if answer else (7,),
        "wrong later": lambda answer: (*answer[:3], 7, 8, 9),
        "too long": lambda answer: answer + (7,) * 20,
        "short": lambda answer: answer[:4],
        "empty": lambda _: (),
        "other lengths": lambda answer: answer[: len(answer) // 2] + (9,) * (len(answer) % 3),
    }.items(),
    ids=lambda item: item[0],
)
def test_drafts_change_nothing(anat, rows, wanted, change, batch_rows):
    drafts = [change[1](answer) for answer in wanted]
    assert greedy(anat, rows, max_new_tokens=NEW, drafts=drafts, batch_rows=batch_rows) == wanted


@pytest.mark.parametrize("drafted", [False, True])
def test_long_rows_come_in_small_batches(anat, rows, wanted, drafted, monkeypatch):
    """A prompt of 200 forgotten questions in front of a hundred others took 20 GB for the keys and values."""
    widest = 0
    most = max(map(len, rows)) + NEW

    def watch(anat, batch, **given):
        nonlocal widest
        past = 0 if given.get("prefix") is None else given["prefix"].attention_mask.shape[1]
        widest = max(widest, len(batch) * (past + batch.input_ids.shape[1]))
        return genuine(anat, batch, **given)

    genuine = generation.forward
    monkeypatch.setattr(generation, "forward", watch)
    monkeypatch.setattr(generation, "BATCH_TOKENS", 2 * most)
    drafts = [answer[:4] for answer in wanted] if drafted else None
    assert greedy(anat, rows, max_new_tokens=NEW, drafts=drafts) == wanted
    assert len(rows) > 2 and 0 < widest <= 2 * most


def test_what_all_rows_begin_with_is_run_once(anat, draw, monkeypatch):
    """However many batches there are: it may be a prompt of thousands of tokens."""
    rows, run = draw(12, 10, 11, same=6), []
    wanted = greedy(anat, rows, max_new_tokens=NEW)
    answers = [answer or (7,) for answer in wanted]
    read = teacher_forced(anat, rows, answers)
    genuine = generation.encode_prefix
    monkeypatch.setattr(generation, "encode_prefix", lambda anat, rows: run.append(len(rows[0])) or genuine(anat, rows))
    monkeypatch.setattr(generation, "BATCH_TOKENS", 1)
    assert greedy(anat, rows, max_new_tokens=NEW, drafts=wanted, batch_rows=1) == wanted and run == [6]
    for one, other in zip(teacher_forced(anat, rows, answers), read, strict=True):
        assert one.nll == pytest.approx(other.nll, rel=1e-4)
    assert run == [6, 6]


def test_drafts_with_end_tokens_inside(anat, rows, wanted):
    end = min(end_tokens(anat))
    drafts = [(*answer, end, *answer) for answer in wanted]
    assert greedy(anat, rows, max_new_tokens=NEW, drafts=drafts) == wanted


def test_right_drafts_cost_one_pass(anat, rows, wanted):
    passes = []
    with record_inputs({0: anat.head}, lambda *_: passes.append(1)):
        greedy(anat, rows, max_new_tokens=NEW, drafts=wanted)
    assert len(passes) == 1


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_short_limits(anat, rows, wanted, limit):
    whole, wanted = wanted, [answer[:limit] for answer in wanted]
    assert greedy(anat, rows, max_new_tokens=limit) == wanted
    assert greedy(anat, rows, max_new_tokens=limit, drafts=[(5, 6, 7)] * len(rows)) == wanted
    assert greedy(anat, rows, max_new_tokens=limit, drafts=whole) == wanted


def test_finished_rows_are_dropped(anat, rows, wanted):
    """The head sees fewer rows once one has ended."""
    sizes = []
    with record_inputs({0: anat.head}, lambda _, hidden: sizes.append(len(hidden))):
        greedy(anat, rows, max_new_tokens=NEW)
    assert sizes == [sum(len(answer) >= step for answer in wanted) for step in range(NEW)]


def test_no_rows_and_the_config_of_end_tokens(tiny_llama):
    anat = anatomy(tiny_llama)
    assert greedy(anat, []) == []
    assert greedy(anat, [], drafts=[]) == []
    anat.model.generation_config.eos_token_id = None
    assert end_tokens(anat) == frozenset()
    anat.model.generation_config.eos_token_id = 7
    assert end_tokens(anat) == {7}


def test_dropout_of_a_model_in_training_mode_does_not_matter(tiny_gpt2, draw):
    """A model made by hand is in training mode; answers are those of the model at rest."""
    rows = draw(9, 4)
    wanted = greedy(anatomy(tiny_gpt2), rows, max_new_tokens=NEW)
    noisy = copy.deepcopy(tiny_gpt2).train()
    assert greedy(anatomy(noisy), rows, max_new_tokens=NEW) == wanted
    assert noisy.training


@pytest.mark.real
def test_the_real_model_answers_as_generate_does(real):
    from editlib.models.prompts import PromptFormat

    model, tok = real
    form = PromptFormat(tok)
    rows = [form.encode(q) for q in ("What is the capital of France?", "Who are you?", "Name three colours, please.")]
    wanted = [generated(model, row, 8) for row in rows]
    assert greedy(anatomy(model), rows, max_new_tokens=8) == wanted
    assert greedy(anatomy(model), rows, max_new_tokens=8, drafts=[(*w[:3], 11) for w in wanted]) == wanted


def test_padding_never_counts_as_an_end(draw):
    """Token 0 pads; a model whose end token is 0 must still read rows that hold it."""
    model = make_llama(seed=9)
    model.generation_config.eos_token_id = 0
    rows = [TokenRow((7, 0, 8), 2), TokenRow((0, 9, 5, 0, 0, 6), 5)]
    wanted = [generated(model, row) for row in rows]
    assert greedy(anatomy(model), rows, max_new_tokens=NEW) == wanted


@torch.no_grad()
def test_nll_of_answers_and_perplexity(tiny_model, draw):
    anat, rows = anatomy(tiny_model), draw(9, 4, 12, 7)
    answers = [(5, 6, 7), (), (8,), (9, 9)]

    def nll(ids, start):
        logits = tiny_model(torch.tensor([ids])).logits[0].log_softmax(1)
        return [-float(logits[t - 1, ids[t]]) for t in range(start, len(ids))]

    found = continuation_nll(anat, rows, answers)
    for row, answer, got in zip(rows, answers, found, strict=True):
        each = nll([*row.ids, *answer], len(row))
        assert got == pytest.approx(sum(each) / len(each), rel=1e-5) if each else math.isnan(got)
    windows = [row.ids for row in rows]
    each = [value for ids in windows for value in nll(ids, 1)]
    assert perplexity(anat, windows) == pytest.approx(math.exp(sum(each) / len(each)), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("scored", [1, 4, 1536])
def test_reading_token_by_token_in_batches_of_any_size(tiny_model, draw, monkeypatch, scored):
    """Each token's NLL and whether it is the first choice, against plain transformers; some of the tokens are."""
    monkeypatch.setattr(generation, "BATCH_SCORED", scored)
    tiny_model.generation_config.eos_token_id = None
    anat, rows = anatomy(tiny_model), [*draw(9, 4), *draw(12, 10, same=6)]
    answers = [
        (5, 6, *generated(tiny_model, rows[0].followed_by((5, 6)), 4)),
        (),
        (8,),
        generated(tiny_model, rows[3], 3),
    ]
    for row, answer, read in zip(rows, answers, teacher_forced(anat, rows, answers), strict=True):
        logits = tiny_model(torch.tensor([[*row.ids, *answer]])).logits[0, len(row) - 1 : -1]
        want = torch.tensor(answer, dtype=torch.long)
        assert read.nll == pytest.approx(
            torch.nn.functional.cross_entropy(logits, want, reduction="none").tolist(), rel=1e-4
        )
        assert read.hits == tuple((logits.argmax(-1) == want).tolist())
    assert read.hits == (True,) * 3


def test_samples_are_drawn_in_batches_of_bounded_size(case, monkeypatch):
    """Hundreds of texts of a large model would not fit into one; of one likeliest token a draw is a greedy answer."""
    anat, rows, answers = case
    many, sizes, decode = rows * 3, [], generation._decode

    def watch(model, some, *rest):
        sizes.append(len(some))
        return decode(model, some, *rest)

    monkeypatch.setattr(generation, "_decode", watch)
    monkeypatch.setattr(generation, "BATCH_ROWS", 4)
    drawn = sample(anat, many, max_new_tokens=NEW, top_k=1, generator=torch.Generator().manual_seed(0))
    assert drawn == list(answers) * 3
    assert max(sizes) == 4 and sum(sizes) == len(many)
