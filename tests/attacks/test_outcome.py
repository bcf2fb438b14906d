"""Shares and their intervals."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editlib.attacks.outcome import AttackResult, Completion, LeakRate, Trial, share_of
from editlib.evaluation.intervals import bootstrap


def quantile(n, k, q):
    """Of the mean of n draws from n values of which k are 1: the smallest mean that a share `q` of draws is at or
    below."""
    total = 0.0
    for hits in range(n + 1):
        total += math.comb(n, hits) * (k / n) ** hits * (1 - k / n) ** (n - hits)
        if total >= q:
            return hits / n
    return 1.0


@pytest.mark.parametrize(("n", "k"), [(2, 1), (10, 5), (10, 1), (32, 7)])
def test_bootstrap_against_the_binomial(n, k):
    wanted = (quantile(n, k, 0.025), quantile(n, k, 0.975))
    assert bootstrap([1] * k + [0] * (n - k), resamples=40_000, seed=1) == pytest.approx(wanted)


def test_bootstrap_by_hand():
    # Of two values, one of them 1, a quarter of the draws has mean 0 and a quarter mean 1.
    assert bootstrap([True, False]) == (0.0, 1.0)
    assert bootstrap([1, 1, 1]) == (1.0, 1.0)
    assert bootstrap([]) == (0.0, 1.0)


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(0, 100))
def test_bootstrap_properties(values, seed):
    low, high = bootstrap(values, resamples=200, seed=seed)
    assert 0 <= low <= high <= 1
    assert bootstrap(values, resamples=200, seed=seed) == (low, high)
    reached = {hits / len(values) for hits in range(len(values) + 1)}
    assert {low, high} <= reached


def trial(*leaks, skipped=None):
    outputs = tuple(Completion("q", "a", leaked) for leaked in leaks)
    return Trial("id", "q", ("a",), outputs, skipped)


def test_facts_are_counted_and_not_texts():
    trials = [trial(False, True, True), trial(False, False), trial(skipped="why"), trial(skipped="why")]
    share = share_of(trials, resamples=100, seed=0)
    assert (share.leaked, share.n, share.rate, share.skipped) == (1, 2, 0.5, {"why": 2})
    empty = share_of([trial(skipped="why")], resamples=100, seed=0)
    assert (empty.rate, empty.interval, empty.wilson) == (None, (0.0, 1.0), (0.0, 1.0))
    none = share_of([trial(False)] * 8, resamples=100, seed=0)
    assert none.interval == (0.0, 0.0) and none.wilson[1] == pytest.approx(0.324, abs=1e-3)  # 3.84 / (8 + 3.84)


def test_a_result_comes_back_from_json():
    trials = {"edited": (trial(True), trial(skipped="why"))}
    shares = {"edited": share_of(trials["edited"], resamples=100, seed=0)}
    result = AttackResult("a", "b", shares, trials, {"edited": {"loss": 1.5}}, 2.0)
    assert AttackResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_a_leak_rate_is_a_measured_number_that_keeps_its_fields_in_the_file():
    share = share_of([trial(True), trial(False), trial(skipped="why")], resamples=100, seed=0)
    assert (share.agg_value, share.higher_is_better, share.n, share.summary()["value"]) == (0.5, False, 2, 0.5)
    row = json.loads(json.dumps(share.to_row()))
    assert row == {
        "leaked": 1, "n": 2, "rate": 0.5, "interval": [0.0, 1.0], "wilson": list(share.wilson), "skipped": {"why": 1}
    }  # fmt: skip
    assert LeakRate.from_row(row) == share
    for name in row:
        with pytest.raises(KeyError, match=name):
            LeakRate.from_row({key: value for key, value in row.items() if key != name})
