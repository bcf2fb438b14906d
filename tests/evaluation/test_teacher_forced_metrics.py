"""Metrics of answers that the model reads: by hand, by plain transformers, and by generating what they predict."""

import math
from statistics import geometric_mean

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from editlib.errors import MetricError
from editlib.evaluation.metrics import (
    exact_memorisation,
    extraction_strength,
    probability,
    probability_with_options,
    read_answers,
    truth_ratio,
)
from editlib.models.anatomy import anatomy
from editlib.models.generation import teacher_forced
from editlib.models.prompts import PromptFormat

NAN = float("nan")
losses = st.floats(0, 5000)
hit_rows = st.lists(st.booleans(), min_size=1, max_size=8)


def log(*probabilities):
    """NLLs of probabilities."""
    return [-math.log(p) for p in probabilities]


def of_each(result, key="score"):
    return [item[key] for item in result.value_by_index.values()]


def test_probability_by_hand():
    result = probability([*log(0.5, 0.25), NAN], on="forget")
    assert of_each(result, "prob") == pytest.approx([0.5, 0.25, None])
    assert (result.agg_value, result.n) == (pytest.approx(0.375), 2)


@torch.no_grad()
@pytest.mark.parametrize("chat", [False, True])
def test_reading_is_the_model_as_transformers_runs_it(tiny_llama, tok_chat, chat):
    """The geometric mean of the probabilities of the answer's tokens, which stand behind the rendered question."""
    form = PromptFormat(tok_chat, chat=chat)
    questions, answers = ["What is the capital of Peru?", "Who?"], ["Lima, the city", "the president"]
    found = probability([one.mean for one in read_answers(anatomy(tiny_llama), form, questions, answers)], on="forget")
    for question, answer, got in zip(questions, answers, of_each(found, "prob"), strict=True):
        front, gap = form.render(question), "" if chat else " "
        ids = tok_chat(front + gap + answer, add_special_tokens=False)["input_ids"]
        start = len(tok_chat(front, add_special_tokens=False)["input_ids"])
        chances = tiny_llama(torch.tensor([ids])).logits[0].softmax(-1)
        each = [float(chances[t - 1, ids[t]]) for t in range(start, len(ids))]
        assert got == pytest.approx(geometric_mean(each), rel=1e-4)


def test_as_many_answers_as_questions(tiny_llama, tok):
    with pytest.raises(MetricError, match="2 questions, 1 answers; expected one of each"):
        read_answers(anatomy(tiny_llama), PromptFormat(tok), ["a", "b"], ["c"])


def test_options_by_hand():
    result = probability_with_options([*log(0.5, 0.1), NAN, 1.0, 1.0], [log(0.25, 0.25), log(0.3), [1.0], [NAN], []])
    assert of_each(result, "prob") == pytest.approx([0.5, 0.25, None, None, None])
    assert result.agg_value == pytest.approx(0.375)
    assert result.name == "retain_teacher_forced_probability_with_options"


@given(losses, st.lists(losses, min_size=1, max_size=4))
def test_options_share_out_one(right, wrong):
    """The shares that each answer gets as the true one make up 1."""
    every = [right, *wrong]
    shares = [probability_with_options([one], [every[:i] + every[i + 1 :]]).agg_value for i, one in enumerate(every)]
    assert sum(shares) == pytest.approx(1.0)


def test_truth_ratio_by_hand():
    paraphrased = [*log(0.5, 0.125, 0.5), NAN, 1.0]
    perturbed = [log(0.25, 0.125), log(0.5, 0.25), log(0.5, 1 / 32), [1.0], []]
    # (1/4 + 1/8) / 2 over 1/2; (1/2 + 1/4) / 2 over 1/8; the arithmetic mean, 17/64, and not the geometric one, 1/8
    ratios = [0.375, 3.0, 17 / 32, None, None]
    forget = truth_ratio(paraphrased, perturbed, on="forget")
    assert of_each(forget) == pytest.approx(ratios)
    assert forget.agg_value == pytest.approx((0.375 + 1 / 3 + 17 / 32) / 3)
    assert forget.n == 3
    retain = truth_ratio(paraphrased, perturbed, on="retain")
    assert of_each(retain) == pytest.approx(ratios)
    assert retain.agg_value == pytest.approx((0.625 + 0 + 15 / 32) / 3)


@given(losses, st.lists(losses, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_truth_ratio_stays_in_bounds_and_does_not_see_the_order(true, wrong, random):
    mixed = random.sample(wrong, len(wrong))
    for on in ("forget", "retain"):
        one, other = (truth_ratio([true], [some], on=on).agg_value for some in (wrong, mixed))
        assert 0.0 <= one <= 1.0
        assert one == pytest.approx(other, abs=1e-12)


@given(st.floats(0, 600), st.floats(0, 600))
def test_on_a_forget_set_it_does_not_matter_which_of_the_two_is_likelier(a, b):
    one, other = truth_ratio([a], [[b]], on="forget"), truth_ratio([b], [[a]], on="forget")
    assert one.agg_value == pytest.approx(other.agg_value, abs=1e-12)
    assume(abs(a - b) < 600)
    assert of_each(one)[0] * of_each(other)[0] == pytest.approx(1.0)


def test_the_best_truth_ratios():
    """A model that knows nothing of it is best on the forget set and worst on the retain set."""
    assert truth_ratio([2.0], [[2.0, 2.0]], on="forget").agg_value == pytest.approx(1.0)
    assert truth_ratio([2.0], [[2.0, 2.0]], on="retain").agg_value == pytest.approx(0.0)
    assert truth_ratio([0.0], [[1e6]], on="retain").agg_value == pytest.approx(1.0)
    assert truth_ratio([0.0], [[1e6]], on="forget").agg_value == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("hits", "exact", "strength"),
    [
        ([1, 1, 1, 1], 1.0, 1.0),  # nothing has to be given
        ([0, 1, 1, 1], 0.75, 0.75),  # the first token, as behind a refusal
        ([1, 0, 1, 1], 0.75, 0.5),
        ([1, 1, 1, 0], 0.75, 0.0),  # by heart but for the end
        ([0, 0, 0, 0], 0.0, 0.0),
        ([1], 1.0, 1.0),
        ([], None, None),
    ],
)
def test_memorisation_by_hand(hits, exact, strength):
    hits = [[bool(hit) for hit in hits]]
    assert exact_memorisation(hits, on="forget").agg_value == exact
    assert extraction_strength(hits, on="forget").agg_value == strength


def test_memorisation_is_a_mean_over_answers():
    hits = [[True, True], [True, False, False, False], []]
    assert exact_memorisation(hits, on="retain").agg_value == pytest.approx((1 + 0.25) / 2)
    assert extraction_strength(hits, on="retain").agg_value == pytest.approx((1 + 0) / 2)
    assert exact_memorisation(hits, on="retain").n == 2


@given(hit_rows)
def test_what_can_be_extracted_is_memorised(hits):
    strength, exact = (
        extraction_strength([hits], on="forget").agg_value,
        exact_memorisation([hits], on="forget").agg_value,
    )
    assert 0.0 <= strength <= exact <= 1.0
    assert (strength == 1.0) == (exact == 1.0)


@torch.no_grad()
def test_extraction_strength_is_what_greedy_decoding_completes(tiny_llama, draw):
    """By the definition: give k true tokens, generate, compare; answers with greedy endings of every length."""
    tiny_llama.generation_config.eos_token_id = None
    rows = draw(6, 4, 9, 5)

    def say(ids, n):
        return tuple(
            tiny_llama.generate(torch.tensor([ids]), max_new_tokens=n, do_sample=False, pad_token_id=0)[0, -n:].tolist()
        )

    answers = []
    for row, given_tokens in zip(rows, [(), (7,), (7, 8, 9), (9, 9, 9, 9, 9)], strict=True):
        rest = 6 - len(given_tokens)
        answers.append((*given_tokens, *say([*row.ids, *given_tokens], rest)))
    answers[3] = (*answers[3][:-1], (answers[3][-1] + 1) % 300)  # and one whose last token is not said
    hits = [one.hits for one in teacher_forced(anatomy(tiny_llama), rows, answers)]
    scores = of_each(extraction_strength(hits, on="forget"))
    for row, answer, score in zip(rows, answers, scores, strict=True):
        needed = next(
            (k for k in range(6) if say([*row.ids, *answer[:k]], 6 - k) == answer[k:]),
            6,
        )
        assert score == pytest.approx(1 - needed / 6)
    assert (scores[0], scores[3]) == (1.0, 0.0)
    assert 0.0 < scores[2] < 1.0
