"""Compute TOFU's two summary numbers: forget quality and model utility."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from editlib.errors import MetricError
from editlib.evaluation.metrics.result import MetricResult, unit_value
from editlib.version import install_line

SETS = ("retain", "real_authors", "world_facts")
METRICS = ("rouge_l_recall", "probability", "truth_ratio")

MetricValue = float | MetricResult | None
ValuesBySet = Mapping[str, Mapping[str, MetricValue]]
"""`{set: {metric: number or result}}`."""


def require_scipy() -> None:
    """Raises `MetricError` if scipy, which forget quality needs, is missing."""
    try:
        import scipy.stats  # noqa: F401
    except ImportError:
        raise MetricError(f"forget quality needs scipy: {install_line('eval')}") from None


def forget_quality(ratios: Sequence[float], retain_only_ratios: Sequence[float]) -> MetricResult:
    """Computes the p-value of a two-sample Kolmogorov-Smirnov test (TOFU, 2401.06121, sec. 2.2), 0..1.

    Compares the truth ratios of the forget set under the unlearned model with those under a model that was trained on
    the retain set only. Higher is better: above 0.05 the two are not distinguishable. A number of the forget set; a
    retain set has none. Teacher-forced ratios, combined. Without a retain-only model there is no forget quality. The
    p-value falls with the number of questions, so compare only equal numbers of questions.

    Args:
        ratios, retain_only_ratios: `truth_ratio(..., on="forget").values()` of the two models. Any strictly monotonic
            function of both gives the same number, such as 1 / r, which other tools store.

    Raises:
        MetricError: one of them is empty, or scipy is not installed.
    """
    if not ratios or not retain_only_ratios:
        raise MetricError(
            f"{len(ratios)} truth ratios of the model and {len(retain_only_ratios)} of the retain-only model; expected "
            "some of both"
        )
    require_scipy()
    from scipy.stats import ks_2samp

    test = ks_2samp(list(ratios), list(retain_only_ratios))
    return MetricResult(
        name="forget_quality",
        agg_value=float(test.pvalue),
        value_by_index={
            "0": {"statistic": float(test.statistic), "n_model": len(ratios), "n_retain_only": len(retain_only_ratios)}
        },
        kind="combined",
        higher_is_better=True,
        n=len(ratios),
        meaning="p-value of the hypothesis that the forget set's truth ratios are distributed as under a model that "
        "never saw it (two-sample KS test)",
    )


def model_utility(scores: ValuesBySet) -> MetricResult:
    """Computes the harmonic mean of three metrics on three sets to keep (TOFU, 2401.06121, sec. 2.2), 0..1.

    Higher is better; one number at 0 makes it 0. ROUGE-L is generated, the other two are teacher-forced.

    Args:
        scores: for each of the sets `retain`, `real_authors` and `world_facts` its `rouge_l_recall`, `probability` (of
            the latter two sets `probability_with_options`) and `truth_ratio` (all with `on="retain"`).

    Raises:
        MetricError: a number is missing, is not one of these nine, or lies outside 0..1.
    """
    return utility(
        "model_utility",
        scores,
        SETS,
        METRICS,
        "harmonic mean of ROUGE-L recall, probability and truth ratio on the sets retain, real authors and world facts",
    )


def utility(name: str, scores: ValuesBySet, sets: Sequence[str], metrics: Sequence[str], meaning: str) -> MetricResult:
    """Computes the harmonic mean of `metrics` on `sets`, all of them and no others."""
    wanted = {f"{part}/{metric}" for part in sets for metric in metrics}
    given = {f"{part}/{metric}": value for part, by_metric in scores.items() for metric, value in by_metric.items()}
    if missing := sorted(wanted - given.keys()):
        raise MetricError(f"{name} needs {', '.join(missing)} as well; expected {len(wanted)} numbers")
    if strange := sorted(given.keys() - wanted):
        raise MetricError(f"{name} has no place for {', '.join(strange)}; expected {', '.join(sorted(wanted))}")
    values = {key: unit_value(key, given[key]) for key in sorted(wanted)}
    return MetricResult(
        name=name,
        agg_value=harmonic_mean(list(values.values())),
        value_by_index={key: {"score": value} for key, value in values.items()},
        kind="combined",
        higher_is_better=True,
        n=len(values),
        meaning=meaning,
    )


def harmonic_mean(values: Sequence[float]) -> float:
    """Computes `n / Σ 1/x_i`; 0 if one of them is 0."""
    return len(values) / sum(1.0 / value for value in values) if all(value > 0 for value in values) else 0.0
