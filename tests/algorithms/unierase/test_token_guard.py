"""The guard over ordinary text, against plain forward passes and generation by transformers."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_models import VOCAB

from editlib.algorithms.unierase.token_guard import LogitGapGuard, answer_guard, ordinary_states
from editlib.models.forward import new_cache, shared_prefix
from editlib.models.prefix import Prefix
from editlib.models.prompts import PromptFormat, pad

QUESTIONS = ["What is the capital of France?", "Which river flows through Basel and Bonn?", "Who are you?"]
NUMBER = VOCAB - 1


@pytest.fixture
def rows(tok):
    form = PromptFormat(tok)
    return [form.encode(text) for text in QUESTIONS]


@torch.no_grad()
def gaps_of(model, row, length):
    """Per position from the prompt's end on: logit of `NUMBER` less the log-sum of the others; plain generation."""
    ids = torch.tensor([row.ids])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False)
    ends = model.generation_config.eos_token_id
    answer = [token for token in out[0, len(row) :].tolist() if token != ends]
    logits = model(torch.tensor([[*row.ids, *answer]])).logits[0, len(row) - 1 :]
    others = torch.cat([logits[:, :NUMBER], logits[:, NUMBER + 1 :]], dim=1)
    return (logits[:, NUMBER] - others.logsumexp(1)).tolist()


def test_gaps_are_those_of_plain_generation(anat, rows):
    guard = answer_guard(anat, rows, NUMBER, answer_tokens=6)
    wanted = [gaps_of(anat.model, row, 6) for row in rows]
    found = guard.gaps(anat.head.weight[NUMBER].detach()).tolist()
    assert sorted(found) == pytest.approx(sorted(gap for gaps in wanted for gap in gaps), abs=1e-4)
    starts = [gap for gap, start in zip(found, guard.starts.tolist(), strict=True) if start]
    assert sorted(starts) == pytest.approx(sorted(gaps[0] for gaps in wanted), abs=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_states_are_those_of_the_named_places(anat, rows, side):
    """Behind a cache a pass moves left padding out of the way; the states must still be found."""
    front, rests = shared_prefix(anat, rows)
    batch = pad(rests, side=side)
    prefix = front or Prefix((), torch.zeros(len(rows), 0, dtype=torch.long))
    mask = torch.cat([prefix.attention_mask, batch.attention_mask], dim=1)
    cache = front.cache() if front else new_cache(anat, len(rows))
    places = batch.attention_mask.nonzero(as_tuple=True)
    with torch.no_grad():
        states, sums = ordinary_states(anat, replace(batch, attention_mask=mask), NUMBER, places, cache=cache)
        wanted = [anat.model(torch.tensor([row.ids]), output_hidden_states=True) for row in rows]
    last = [out.hidden_states[-1][0, -len(rest) :] for out, rest in zip(wanted, rests, strict=True)]
    torch.testing.assert_close(states, torch.cat(last), atol=1e-4, rtol=1e-4)
    logits = torch.cat([out.logits[0, -len(rest) :] for out, rest in zip(wanted, rests, strict=True)])
    logits[:, NUMBER] = -torch.inf
    torch.testing.assert_close(sums, logits.logsumexp(1), atol=1e-4, rtol=1e-4)


def hand_made(gaps, starts):
    """A guard whose gaps for the row (1,) are those given."""
    return LogitGapGuard(torch.tensor(gaps)[:, None], torch.zeros(len(gaps)), torch.tensor(starts))


ROW = torch.ones(1)


def test_the_penalty_is_least_at_the_answer_gap_where_answers_start():
    at, over, under = (float(hand_made([gap], [True]).penalty(ROW, 14.0, 12.0)) for gap in (-14.0, -9.0, -19.0))
    assert at == pytest.approx(0.0, abs=1e-6)
    assert over == pytest.approx(under) and over > 3  # five nats off, either way


def test_the_penalty_presses_one_side_only_elsewhere():
    far, near = (float(hand_made([gap], [False]).penalty(ROW, 14.0, 12.0)) for gap in (-60.0, -2.0))
    assert far < 1e-6
    assert near == pytest.approx(math.log1p(math.exp(10.0)) / 20)  # one breaks the min_gap, divided by at least 20


def test_one_position_that_breaks_the_floor_is_not_lost_among_many():
    lonely = hand_made([-2.0], [False]).penalty(ROW, 14.0, 12.0)
    crowd = hand_made([-2.0] + [-60.0] * 5000, [False] * 5001).penalty(ROW, 14.0, 12.0)
    assert float(crowd) == pytest.approx(float(lonely), rel=1e-3)


@pytest.fixture
def drawn():
    """A guard over random states, of which some break the min_gap."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    return LogitGapGuard(
        states, 4 * torch.rand(60, generator=generator, dtype=torch.float64), torch.arange(60) % 3 == 0
    )


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_the_bound_touches_the_penalty_and_lies_above_it(drawn, size):
    generator = torch.Generator().manual_seed(1)
    answer_gap, min_gap = 1.0, 2.0
    row = size * torch.randn(5, generator=generator, dtype=torch.float64)
    leaf = row.clone().requires_grad_()
    here = drawn.penalty(leaf, answer_gap, min_gap)
    gradient, curvature = drawn.bound(row, answer_gap, min_gap)
    torch.testing.assert_close(gradient, torch.autograd.grad(here, leaf)[0])
    breaking = lambda r: max(int((drawn.gaps(r)[~drawn.starts] > -min_gap).sum()), 20)  # noqa: E731
    for _ in range(50):
        step = size * torch.randn(5, generator=generator, dtype=torch.float64)
        others = drawn.gaps(row + step)[~drawn.starts]
        # The number of positions that break the min_gap is that at `row`.
        apart = torch.nn.functional.softplus(others + min_gap).sum()
        there = drawn.penalty(row + step, answer_gap, min_gap) - apart / breaking(row + step) + apart / breaking(row)
        assert float(there) <= float(here + gradient @ step + step @ curvature @ step / 2) + 1e-9


def test_the_summary_tells_starts_from_the_rest():
    summary = hand_made([-10.0, -12.0, -3.0], [True, True, False]).summary(ROW)
    assert summary["mean_gap_at_answers"] == pytest.approx(-11.0)
    assert summary["largest_probability_at_answers"] == pytest.approx(1 / (1 + math.exp(10.0)))
    assert summary["largest_probability_on_ordinary_text"] == pytest.approx(1 / (1 + math.exp(3.0)))


def test_joining_keeps_every_position():
    one, two = hand_made([-1.0], [True]), hand_made([-2.0, -3.0], [False, False])
    both = LogitGapGuard.joined([one, two])
    assert both.gaps(ROW).tolist() == [-1.0, -2.0, -3.0] and both.starts.tolist() == [True, False, False]
