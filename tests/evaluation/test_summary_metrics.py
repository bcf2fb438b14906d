"""TOFU's and UniErase's summary numbers, on cases worked by hand."""

import re
import statistics
import sys
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editlib.errors import MetricError
from editlib.evaluation.metrics import (
    MetricResult,
    balance,
    forget_efficacy,
    forget_quality,
    model_utility,
    retain_ability,
    truth_ratio,
    wide_model_utility,
)
from editlib.version import install_line

shares = st.floats(0.001, 1.0)
ratios = st.lists(st.integers(1, 1000), min_size=2, max_size=8, unique=True)


def nine(values):
    names = [(part, metric) for part in ("retain", "real_authors", "world_facts") for metric in TOFU]
    scores = {}
    for (part, metric), value in zip(names, values, strict=True):
        scores.setdefault(part, {})[metric] = value
    return scores


TOFU = ("rouge_l_recall", "probability", "truth_ratio")
SIX = (*TOFU, "token_entropy", "cosine_similarity", "entailment_score")


def test_forget_quality_by_hand():
    """Two samples of three, one wholly below the other: of 20 ways to mix them, two are as far apart."""
    result = forget_quality([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert result.agg_value == pytest.approx(2 / comb(6, 3))
    assert result.value_by_index["0"] == {"statistic": 1.0, "n_model": 3, "n_retain_only": 3}
    assert (result.name, result.higher_is_better, result.kind) == ("forget_quality", True, "combined")
    assert forget_quality([1.0, 2.0, 3.0], [3.0, 1.0, 2.0]).agg_value == 1.0


@given(ratios, ratios, st.randoms(use_true_random=False))
def test_forget_quality_sees_neither_order_nor_scale(model, retain, random):
    quality = forget_quality(model, retain).agg_value
    assert 0.0 <= quality <= 1.0
    mixed = forget_quality(random.sample(model, len(model)), random.sample(retain, len(retain)))
    assert mixed.agg_value == pytest.approx(quality)
    turned = forget_quality([1 / r for r in model], [1 / r for r in retain])  # as open-unlearning's ratios are
    assert turned.agg_value == pytest.approx(quality)


def test_forget_quality_out_of_truth_ratios():
    model = truth_ratio([1.0, 2.0, 3.0], [[2.0], [1.0], [0.5]], on="forget")
    assert forget_quality(model.values(), model.values()).agg_value == 1.0


def test_forget_quality_needs_both_models_and_scipy(monkeypatch):
    with pytest.raises(MetricError, match="2 truth ratios of the model and 0 of the retain-only model"):
        forget_quality([1.0, 2.0], [])
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(MetricError, match=re.escape(install_line("eval"))):
        forget_quality([1.0], [1.0])


def test_model_utility_by_hand():
    # 9 / (6 * 2 + 3 * 4)
    assert model_utility(nine([0.5] * 6 + [0.25] * 3)).agg_value == pytest.approx(9 / 24)
    assert model_utility(nine([1.0] * 9)).agg_value == 1.0
    assert model_utility(nine([1.0] * 8 + [0.0])).agg_value == 0.0


@given(st.lists(shares, min_size=9, max_size=9), st.randoms(use_true_random=False))
def test_model_utility_is_a_harmonic_mean(values, random):
    result = model_utility(nine(values))
    assert result.agg_value == pytest.approx(statistics.harmonic_mean(values))
    assert min(values) - 1e-9 <= result.agg_value <= statistics.mean(values) + 1e-9
    assert model_utility(nine(random.sample(values, 9))).agg_value == pytest.approx(result.agg_value)


def test_model_utility_takes_results_and_keeps_its_parts():
    scores = nine([0.5] * 9)
    scores["retain"]["truth_ratio"] = MetricResult("any", 0.25)
    result = model_utility(scores)
    assert result.agg_value == pytest.approx(9 / (8 * 2 + 4))
    assert result.value_by_index["retain/truth_ratio"] == {"score": 0.25}
    assert result.value_by_index.keys() == {f"{part}/{metric}" for part in scores for metric in TOFU}


def test_model_utility_is_of_exactly_nine_numbers():
    scores = nine([0.5] * 9)
    with pytest.raises(MetricError, match="needs world_facts/probability as well; expected 9 numbers"):
        model_utility(scores | {"world_facts": {"rouge_l_recall": 0.5, "truth_ratio": 0.5}})
    with pytest.raises(MetricError, match="has no place for forget/probability"):
        model_utility(scores | {"forget": {"probability": 0.5}})
    for bad in (None, -0.5, 1.5, float("nan"), MetricResult("any", None)):
        with pytest.raises(MetricError, match=r"retain/probability is .*; expected a number from 0 to 1"):
            model_utility(scores | {"retain": scores["retain"] | {"probability": bad}})


def test_wide_model_utility_is_of_eighteen():
    sets = {part: dict.fromkeys(SIX, 0.5) for part in ("retain", "real_authors", "world_facts")}
    sets["retain"]["token_entropy"] = 0.25
    assert wide_model_utility(sets).agg_value == pytest.approx(18 / (17 * 2 + 4))
    with pytest.raises(MetricError, match="has no place for"):
        model_utility(sets)


@pytest.mark.parametrize(
    ("rouge", "prob", "turned_truth_ratio", "cosine", "entailment", "published"),
    [(0.986, 0.987, 0.522, 0.995, 0.970, 0.108), (0.023, 0.433, 0.475, 0.051, 0.003, 0.803)],
)
def test_forget_efficacy_of_logged_runs(rouge, prob, turned_truth_ratio, cosine, entailment, published):
    """What the published evaluation code logged before and after an edit of TOFU's forget10, to three digits."""
    result = forget_efficacy(
        rouge_l_recall=rouge,
        probability=prob,
        truth_ratio=1 - turned_truth_ratio,
        cosine_similarity=cosine,
        entailment_score=entailment,
    )
    assert result.agg_value == pytest.approx(published, abs=6e-4)
    assert (result.name, result.n, result.higher_is_better) == ("forget_efficacy", 5, True)


def test_forget_efficacy_at_its_ends():
    gone = {"rouge_l_recall": 0.0, "probability": 0.0, "cosine_similarity": 0.0, "entailment_score": 0.0}
    known = dict.fromkeys(gone, 1.0)
    assert forget_efficacy(**gone, truth_ratio=1.0).agg_value == 1.0
    assert forget_efficacy(**known, truth_ratio=0.0).agg_value == 0.0
    assert forget_efficacy(**gone, truth_ratio=0.0).agg_value == pytest.approx(0.8)  # still tells true from false


def test_what_is_missing_is_said():
    three = {"rouge_l_recall": 0.1, "probability": 0.3, "truth_ratio": 0.8}
    result = forget_efficacy(**three)
    assert result.agg_value == pytest.approx(1 - (0.1 + 0.3 + 0.2) / 3)
    assert result.name == "forget_efficacy_without_cosine_similarity_without_entailment_score"
    assert result.value_by_index.keys() == three.keys()
    assert "3 numbers" in result.meaning
    kept = retain_ability(**three, token_entropy=0.5, cosine_similarity=0.25)
    assert kept.name == "retain_ability_without_entailment_score"
    assert kept.agg_value == pytest.approx(5 / (10 + 1 / 0.3 + 1.25 + 2 + 4))
    assert set(balance(result, kept).value_by_index) == {result.name, kept.name}
    with pytest.raises(MetricError, match="forget/probability is None"):
        forget_efficacy(**three | {"probability": None})


def test_retain_ability_by_hand():
    values = [0.5, 0.25, 0.5, 1.0, 0.5, 0.5]
    assert retain_ability(**dict(zip(SIX, values, strict=True))).agg_value == pytest.approx(6 / (2 + 4 + 2 + 1 + 2 + 2))


def test_balance_by_hand():
    assert balance(0.8, 0.4).agg_value == pytest.approx(2 * 0.8 * 0.4 / 1.2)
    assert balance(1.0, 0.0).agg_value == balance(0.0, 1.0).agg_value == 0.0
    assert balance(0.8, 0.4).value_by_index == {"forget_efficacy": {"score": 0.8}, "retain_ability": {"score": 0.4}}
    assert balance(0.8, 0.4).name == "balance"


@given(shares, shares)
def test_balance_prefers_neither_side_and_lies_between(a, b):
    found = balance(a, b).agg_value
    assert found == pytest.approx(balance(b, a).agg_value)
    assert min(a, b) - 1e-9 <= found <= max(a, b) + 1e-9
