"""Measure the likelihood of given answers after the question: probability and TOFU's truth ratio.

Nothing is generated here. A model can give the truth a low probability and still generate it later, or the reverse: an
edit that changes only the first token of an answer leaves the rest as likely as before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from editlib.evaluation.metrics.result import KNOWN, MORE, Metric, MetricResult, Split, same_number
from editlib.models.anatomy import Anatomy
from editlib.models.generation import Forced, teacher_forced
from editlib.models.prompts import PromptFormat

LARGEST_NLL = 700.0  # `exp` of more overflows

PROBABILITY = Metric(
    "probability",
    "teacher_forced",
    KNOWN,
    "probability of the true answer to the question, per token (geometric mean)",
)
OPTIONS = Metric(
    "probability_with_options",
    "teacher_forced",
    KNOWN,
    "share of the true answer in the probability of all the answers to choose from, each a token (geometric mean)",
)
TRUTH_RATIO_FORGET = Metric(
    "truth_ratio",
    "teacher_forced",
    MORE,
    "how alike wrong answers and a paraphrase of the true one are in probability: 1 they cannot be told apart",
)
TRUTH_RATIO_RETAIN = Metric(
    "truth_ratio",
    "teacher_forced",
    MORE,
    "how far wrong answers lie below a paraphrase of the true one in probability: 0 as likely or likelier",
)


def read_answers(
    anat: Anatomy,
    form: PromptFormat,
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    progress: str | None = None,
) -> list[Forced]:
    """Scores each answer after its question; all teacher-forced metrics are computed from the result.

    `[one.mean for one in read]` goes into `probability` and `truth_ratio`, `[one.hits for one in read]` into
    `exact_memorisation` and `extraction_strength`. The answer counts from its first token to its last. (The code of
    TOFU and open-unlearning includes the end token in the loss, which matters most for short answers.)

    Raises:
        MetricError: the numbers of texts differ.
    """
    same_number(questions=questions, answers=answers)
    rows = [form.encode(question) for question in questions]
    read = [form.answer_ids(answer, question) for question, answer in zip(questions, answers, strict=True)]
    return teacher_forced(anat, rows, read, progress=progress)


def probability(nll: Sequence[float], *, on: Split) -> MetricResult:
    """Computes the length-normalised probability of the true answers (TOFU, 2401.06121, sec. 2.2), 0..1.

    `P(a|q)^(1/|a|) = exp(-mean NLL)`. Mean over the answers. Lower is better on a forget set, where the reference is a
    model that never saw the answers and not 0; higher on a retain set. Teacher-forced.

    Args:
        nll: nats per token of each answer; `nan` (an empty answer, or a model whose numbers are no longer finite) does
            not count.
    """
    items = [
        {"prob": None, "avg_loss": None} if loss is None else {"prob": math.exp(-loss), "avg_loss": loss}
        for loss in map(_loss, nll)
    ]
    return PROBABILITY.averaged(on, items, "prob")


def probability_with_options(
    nll: Sequence[float], wrong_nll: Sequence[Sequence[float]], *, on: Split = "retain"
) -> MetricResult:
    """Computes the probability of the true answer among given ones (TOFU, sec. 2.2, for Real Authors and World Facts),
    0..1.

    `p / (p + Σ_i p_i)`. TOFU's text has `P(a|q)` here; its code and open-unlearning's use `P(a|q)^(1/|a|)`, and so does
    this, since otherwise the shortest answer would win. Mean over the questions. Lower is better on a forget set,
    higher on a retain set. Teacher-forced.

    Args:
        nll: nats per token of each true answer; `nan` does not count.
        wrong_nll: of the wrong answers to the same question, one or more.

    Raises:
        MetricError: the numbers of questions differ.
    """
    same_number(answers=nll, wrong_answers=wrong_nll)
    items: list[dict[str, float | None]] = []
    for right, wrong in _losses(nll, wrong_nll):
        if right is None:
            items.append({"prob": None})
            continue
        least = min(right, *wrong)
        share = math.exp(least - right)
        items.append({"prob": share / math.fsum([share, *(math.exp(least - loss) for loss in wrong)])})
    return OPTIONS.averaged(on, items, "prob")


def truth_ratio(
    paraphrased_nll: Sequence[float], perturbed_nll: Sequence[Sequence[float]], *, on: Split
) -> MetricResult:
    """Computes the truth ratio (TOFU, 2401.06121, eq. 1), aggregated for the kind of set (sec. 2.2), 0..1.

    `r = mean_i P(â_i|q)^(1/|â_i|) / P(ã|q)^(1/|ã|)`, wrong (perturbed) answers `â_i` over a paraphrase `ã` of the true
    one. On a forget set the mean of `min(r, 1/r)`: 1 where the model does not distinguish true from false. On a retain
    set the mean of `max(0, 1 - r)`: 1 where false answers are impossible. **Higher is better on both.** Teacher-forced.

    The mean over wrong answers is that of probabilities, as in the paper. TOFU's aggregation script and open-unlearning
    use the mean of logarithms, which is never larger: such numbers are close but not equal, and the two must not be
    mixed in `forget_quality`.

    Items hold `r` as `score`, and their term in the mean as `contribution`.

    Args:
        paraphrased_nll: nats per token of the paraphrased answer; `nan` does not count.
        perturbed_nll: of the wrong answers to the same question, one or more.

    Raises:
        MetricError: the numbers of questions differ.
    """
    same_number(paraphrased_answers=paraphrased_nll, perturbed_answers=perturbed_nll)
    items: list[dict[str, float | None]] = []
    for true, wrong in _losses(paraphrased_nll, perturbed_nll):
        if true is None:
            items.append({"score": None, "contribution": None})
            continue
        least = min(wrong)  # in logarithms: a destroyed model's probabilities underflow
        log = true - least + math.log(math.fsum(math.exp(least - loss) for loss in wrong) / len(wrong))
        ratio = math.exp(log)
        items.append({"score": ratio, "contribution": math.exp(-abs(log)) if on == "forget" else max(0.0, 1.0 - ratio)})
    metric = TRUTH_RATIO_FORGET if on == "forget" else TRUTH_RATIO_RETAIN
    return metric.averaged(on, items, "contribution")


def _losses(nll: Sequence[float], others: Sequence[Sequence[float]]) -> Iterator[tuple[float | None, list[float]]]:
    """Yields each answer with the others to its question; `None` if one of them could not be scored or there is no
    other."""
    for answer, more in zip(nll, others, strict=True):
        first, rest = _loss(answer), [loss for loss in map(_loss, more) if loss is not None]
        yield (first, rest) if rest and len(rest) == len(more) else (None, [])


def _loss(nll: float) -> float | None:
    return None if math.isnan(nll) else min(float(nll), LARGEST_NLL)
