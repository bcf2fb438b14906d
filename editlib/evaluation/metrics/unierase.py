"""Compute the summary numbers of UniErase (2505.15674): forget efficacy, retain ability and the balance of the two.

Forget efficacy and the wide model utility are those of "A Closer Look at Machine Unlearning" (2410.08109), whose code
UniErase evaluates with.
"""

from __future__ import annotations

from collections.abc import Mapping

from editlib.evaluation.metrics.result import MetricResult, unit_value
from editlib.evaluation.metrics.tofu import METRICS, SETS, MetricValue, ValuesBySet, harmonic_mean, utility

OPTIONAL = ("cosine_similarity", "entailment_score")
"""The measures that need another model, which may not be available."""

ALL_METRICS = (*METRICS, "token_entropy", *OPTIONAL)


def forget_efficacy(
    *,
    rouge_l_recall: MetricValue,
    probability: MetricValue,
    truth_ratio: MetricValue,
    cosine_similarity: MetricValue = None,
    entailment_score: MetricValue = None,
) -> MetricResult:
    """Computes forget efficacy, FE: 1 - the mean of five numbers of the forget set (2410.08109), 0..1.

    `1 - mean(ROUGE, P, 1 - TR, CS, ES)`. Higher is better. A number of the forget set; a retain set has none. ROUGE, CS
    and ES are generated, P and TR teacher-forced. Token entropy is not part of it, since it does not measure knowledge.

    Args:
        truth_ratio: as `truth_ratio(..., on="forget")` gives it, the mean of `min(r, 1/r)`, where higher is better; the
            mean uses `1 - TR`, as in the paper. The paper's code also uses the geometric mean of the wrong answers'
            probabilities in r, while TOFU's text has the arithmetic one.
        cosine_similarity, entailment_score: without one of them the mean is over the others, and the result's name says
            which is missing: do not compare it with an FE of five numbers.

    Raises:
        MetricError: one of the first three is missing, or a number lies outside 0..1.
    """
    given = {
        "rouge_l_recall": rouge_l_recall,
        "probability": probability,
        "truth_ratio": truth_ratio,
        "cosine_similarity": cosine_similarity,
        "entailment_score": entailment_score,
    }
    missing = _missing(given)
    known = {name: unit_value(f"forget/{name}", value) for name, value in given.items() if name not in missing}
    known["truth_ratio"] = 1.0 - known["truth_ratio"]
    return MetricResult(
        name="_without_".join(["forget_efficacy", *missing]),
        agg_value=1.0 - sum(known.values()) / len(known),
        value_by_index={name: {"score": value} for name, value in known.items()},
        kind="combined",
        higher_is_better=True,
        n=len(known),
        meaning=f"1 - the mean of the {len(known)} numbers of the forget set in value_by_index, the truth "
        "ratio turned round",
    )


def retain_ability(
    *,
    rouge_l_recall: MetricValue,
    probability: MetricValue,
    truth_ratio: MetricValue,
    token_entropy: MetricValue,
    cosine_similarity: MetricValue = None,
    entailment_score: MetricValue = None,
) -> MetricResult:
    """Computes retain ability, RA: harmonic mean of the six numbers of the retain set, 0..1.

    Higher is better; one number at 0 makes it 0. A number of the retain set; a forget set has none. ROUGE, entropy, CS
    and ES are generated, P and TR teacher-forced.

    The formula of RA in the UniErase paper could not be verified. This one is "Model Utility Retain" of the code with
    which it evaluates (2410.08109); do not compare it with published values of RA.

    Args:
        truth_ratio: with `on="retain"`, as all of them.
        cosine_similarity, entailment_score: as in `forget_efficacy`.

    Raises:
        MetricError: one of the first four is missing, or a number lies outside 0..1.
    """
    given = {
        "rouge_l_recall": rouge_l_recall,
        "probability": probability,
        "truth_ratio": truth_ratio,
        "token_entropy": token_entropy,
        "cosine_similarity": cosine_similarity,
        "entailment_score": entailment_score,
    }
    missing = _missing(given)
    known = {name: value for name, value in given.items() if name not in missing}
    return utility(
        "_without_".join(["retain_ability", *missing]),
        {"retain": known},
        ("retain",),
        tuple(known),
        f"harmonic mean of the {len(known)} numbers of the retain set in value_by_index",
    )


def wide_model_utility(scores: ValuesBySet) -> MetricResult:
    """Computes the harmonic mean of eighteen numbers: six metrics on three sets to keep (2410.08109), 0..1.

    The "Model Utility" of the code that UniErase evaluates with; TOFU's own has nine numbers (`tofu.model_utility`).
    Higher is better; one number at 0 makes it 0.

    Args:
        scores: for each of the sets `retain`, `real_authors` and `world_facts` TOFU's three metrics and
            `token_entropy`, `cosine_similarity` and `entailment_score`.

    Raises:
        MetricError: a number is missing, is not one of these eighteen, or lies outside 0..1.
    """
    return utility(
        "wide_model_utility",
        scores,
        SETS,
        ALL_METRICS,
        "harmonic mean of six metrics on the sets retain, real authors and world facts",
    )


def balance(efficacy: float | MetricResult, ability: float | MetricResult) -> MetricResult:
    """Computes the balance of forgetting and keeping, RB: the harmonic mean of forget efficacy and retain ability,
    0..1.

    `2 FE RA / (FE + RA)`. Higher is better; destroying all knowledge, and forgetting nothing, both give 0. A number of
    both sets together. The formula of RB in the UniErase paper could not be verified: this one is ours; do not compare
    it with published values.

    Args:
        efficacy, ability: `forget_efficacy` and `retain_ability`, or a model utility in place of the latter. The items
            of the result have the names of the given numbers.

    Raises:
        MetricError: a number is missing or lies outside 0..1.
    """
    parts = {
        value.name if isinstance(value, MetricResult) else name: unit_value(name, value)
        for name, value in (("forget_efficacy", efficacy), ("retain_ability", ability))
    }
    return MetricResult(
        name="balance",
        agg_value=harmonic_mean(list(parts.values())),
        value_by_index={name: {"score": value} for name, value in parts.items()},
        kind="combined",
        higher_is_better=True,
        n=len(parts),
        meaning=f"harmonic mean of {' and '.join(parts)}: high only where both are",
    )


def _missing(given: Mapping[str, MetricValue]) -> list[str]:
    return [name for name in OPTIONAL if given[name] is None]
