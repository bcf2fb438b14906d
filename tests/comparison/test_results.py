"""From cells to a summary: the front, and attacks over seeds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editlib.comparison.results import _pooled, mark_front, pareto

SHARES = st.integers(0, 8).map(lambda eighth: eighth / 8)
POINTS = st.lists(st.tuples(SHARES, SHARES), max_size=12)


def beats(one, other):
    return one != other and one[0] >= other[0] and one[1] >= other[1]


@given(POINTS)
def test_the_front_is_what_nothing_beats(points):
    front = pareto(points)
    for point, on in zip(points, front, strict=True):
        assert on != any(beats(other, point) for other in points)
    if points:
        on_front = [point for point, on in zip(points, front, strict=True) if on]
        assert max(points) in on_front
        for point in points:  # whatever is not on the front is beaten by something that is
            assert point in on_front or any(beats(other, point) for other in on_front)


@given(POINTS, st.randoms())
def test_the_front_does_not_depend_on_the_order(points, random):
    shuffled = random.sample(points, len(points))
    told = {point for point, on in zip(points, pareto(points), strict=True) if on}
    assert told == {point for point, on in zip(shuffled, pareto(shuffled), strict=True) if on}


def test_a_method_without_both_axes_is_not_on_the_front():
    summaries = [{"forget": 1.0, "retain": None}, {"forget": 0.5, "retain": 0.5}]
    mark_front(summaries)
    assert [one["front"] for one in summaries] == [False, True]


def attack(**leaks):
    return {"meaning": "m", "leaks": {"edited": leaks, "base": dict.fromkeys(leaks, True), "control": {}}}


def test_seeds_count_a_fact_by_the_share_in_which_it_leaked():
    pooled = _pooled([attack(a=True, b=False, c=None), attack(a=True, b=True, c=None)])
    assert pooled["edited"]["rate"] == pytest.approx((1.0 + 0.5) / 2) and pooled["edited"]["n"] == 2
    assert pooled["edited"]["interval"] == [0.5, 1.0]  # of two facts: both the one or both the other
    assert pooled["base"]["rate"] == 1.0 and pooled["base"]["interval"][0] < 0.7  # Wilson's, not a point
    assert pooled["control"] == {"rate": None, "n": 0, "interval": [0.0, 1.0]}
