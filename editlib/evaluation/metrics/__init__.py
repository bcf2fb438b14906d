"""One function per metric; `docs/reference/metrics.md` has a table of them. The names of modules and results
distinguish generated from teacher-forced metrics."""

from editlib.answers import has_answer, is_fluent, is_fluent_refusal, is_refusal, refusal_verdict
from editlib.evaluation.intervals import wilson_interval
from editlib.evaluation.metrics.generated import cosine_similarity, entailment_score, rouge_l_recall, token_entropy
from editlib.evaluation.metrics.memorisation import exact_memorisation, extraction_strength
from editlib.evaluation.metrics.result import Kind, MetricResult, Split, read_results, write_results
from editlib.evaluation.metrics.teacher_forced import probability, probability_with_options, read_answers, truth_ratio
from editlib.evaluation.metrics.tofu import forget_quality, model_utility
from editlib.evaluation.metrics.unierase import balance, forget_efficacy, retain_ability, wide_model_utility

__all__ = [
    "Kind",
    "MetricResult",
    "Split",
    "balance",
    "cosine_similarity",
    "entailment_score",
    "exact_memorisation",
    "extraction_strength",
    "forget_efficacy",
    "forget_quality",
    "has_answer",
    "is_fluent",
    "is_fluent_refusal",
    "is_refusal",
    "model_utility",
    "probability",
    "probability_with_options",
    "read_answers",
    "read_results",
    "refusal_verdict",
    "retain_ability",
    "rouge_l_recall",
    "token_entropy",
    "truth_ratio",
    "wide_model_utility",
    "wilson_interval",
    "write_results",
]
