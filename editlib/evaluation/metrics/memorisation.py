"""Measure how much of an answer is memorised, token by token: exact memorisation and extraction strength.

Both are teacher-forced: they measure the tokens after an answer's first one, which a refusal hides from every metric of
generated text.
"""

from __future__ import annotations

from collections.abc import Sequence

from editlib.evaluation.metrics.result import KNOWN, Metric, MetricResult, Split

EXACT = Metric(
    "exact_memorisation",
    "teacher_forced",
    KNOWN,
    "share of the answer's tokens that the model would generate itself, each after the true ones before it",
)
EXTRACTION = Metric(
    "extraction_strength",
    "teacher_forced",
    KNOWN,
    "share of the answer that the model would complete without a mistake when given the rest of it, at its best",
)


def exact_memorisation(hits: Sequence[Sequence[bool]], *, on: Split) -> MetricResult:
    """Computes exact memorisation (Tirumala et al., 2205.10770; for unlearning Wang et al., 2406.09179), 0..1.

    `1/|a| Σ_k 1{argmax f(q, a_<k) = a_k}`. Mean over the answers. Lower is better on a forget set, where the reference
    is a model that never saw the answers (grammar alone makes many tokens certain); higher on a retain set.
    Teacher-forced. The same as open-unlearning's.

    Args:
        hits: for each answer, whether each token is the model's first choice after the question and the true tokens
            before it (`Forced.hits`). An answer without tokens does not count.
    """
    items = [{"score": sum(map(bool, hit)) / len(hit) if len(hit) else None} for hit in hits]
    return EXACT.averaged(on, items, "score")


def extraction_strength(hits: Sequence[Sequence[bool]], *, on: Split) -> MetricResult:
    """Computes extraction strength (Carlini et al., 2012.07805; as Wang et al., 2406.09179, define it for unlearning),
    0..1.

    `1 - min{k : greedy f(q, a_<k) = a_>=k} / |a|`, `k` the number of true tokens that have to be given until greedy
    decoding generates all the rest. The rest is generated exactly if each of its tokens is the first choice after the
    true ones before it, so one pass over the answer suffices. Mean over the answers. Lower is better on a forget set,
    higher on a retain set. Teacher-forced. 0 if not even the last token is generated; open-unlearning's code gives
    `1/|a|` then.

    Args:
        hits: as in `exact_memorisation`.
    """
    return EXTRACTION.averaged(on, [{"score": _extractable(hit)} for hit in hits], "score")


def _extractable(hits: Sequence[bool]) -> float | None:
    """Computes the length of the longest suffix of hits alone, as a share of the answer."""
    if not len(hits):
        return None
    missed = [i for i, hit in enumerate(hits) if not hit]
    return (len(hits) - 1 - missed[-1]) / len(hits) if missed else 1.0
