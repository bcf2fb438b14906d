"""Score a model on TOFU's sets: every metric of `docs/reference/metrics.md`, set by set, and summary numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib.errors import MetricError
from editlib.evaluation import metrics
from editlib.evaluation.answer_cache import ask
from editlib.evaluation.metrics import MetricResult, Split, read_results
from editlib.evaluation.metrics.generated import Classifier, Encoder, check_judges
from editlib.evaluation.metrics.tofu import SETS as UTILITY_SETS
from editlib.evaluation.metrics.tofu import require_scipy
from editlib.models.anatomy import Anatomy, anatomy
from editlib.models.generation import Forced
from editlib.models.loaded import LoadedModel, ModelPair
from editlib.models.prompts import Asking, PromptFormat
from editlib.models.source import check_model
from editlib.models.thinking import answer_texts
from editlib.tofu.sets import SIDE, Asked, TofuSets

ANSWER_TOKENS = 128  # the longest answers of TOFU have about 100
RATIOS = "forget_teacher_forced_truth_ratio"
SHARED = ("rouge_l_recall", "probability", "truth_ratio")

Results = dict[str, MetricResult]


@dataclass(frozen=True)
class Judges:
    """Holds models that score generated text: a sentence encoder and a classifier of entailment (see
    `evaluation.metrics`).

    Without a model its metric is not measured.
    """

    encoder: str | Path | Encoder | None = None
    classifier: str | Path | Classifier | None = None


def check_scoring(judges: Judges | None, reference: str | None) -> None:
    """Checks the judges and the reference of scores; call it before the two models are loaded.

    Raises:
        MetricError: a package is missing, or there is no such judge.
        ModelError: the reference is not a model.
    """
    judges = judges or Judges()
    check_judges(judges.encoder, judges.classifier)
    if reference is not None:
        require_scipy()
        if not Path(reference).is_file():
            check_model(reference)


def check_wrong_answers(sets: TofuSets, *, whole: bool = True) -> None:
    """Checks that forget quality can be computed: it compares truth ratios, which need wrong answers.

    Args:
        whole: every question to forget must have some; otherwise one question with some is enough.

    Raises:
        MetricError: there are too few wrong answers.
    """
    asked = sets.probes["forget"]
    bare = [probe.id for probe in asked if not probe.wrong]
    if bare and (whole or len(bare) == len(asked)):
        raise MetricError(
            f"a reference was given, but {len(bare)} of {len(asked)} questions to forget have no wrong answers "
            f"({bare[0]}); expected them in {sets.name}_perturbed: add that file, or leave the reference out"
        )


@dataclass(frozen=True)
class TofuReading:
    """Holds one question under one model: its generated answer, and the scores of given answers; NLL in nats per
    token."""

    tokens: tuple[int, ...]
    text: str
    answer: Forced
    paraphrase: float
    wrong: tuple[float, ...]


Readings = MutableMapping[Asked, TofuReading]


@dataclass(frozen=True)
class TofuScores:
    """Holds the results of two models side by side, by name, and the readings from which they are computed."""

    base: Results
    edited: Results
    sets: TofuSets
    before: Mapping[Asked, TofuReading]
    after: Mapping[Asked, TofuReading]


def tofu_scores(
    anat: Anatomy,
    tok: PreTrainedTokenizerBase,
    sets: TofuSets,
    *,
    retain_only: Mapping[str, MetricResult] | None = None,
    judges: Judges | None = None,
    max_new_tokens: int = ANSWER_TOKENS,
    how: Asking = None,
    progress: str | None = None,
) -> Results:
    """Asks one model all questions of `sets`, and scores generated and given answers.

    Args:
        retain_only: the results of a model that never saw the forget set, on the same questions; forget quality needs
            them.
        progress: a label for progress bars on stderr; none without it.

    Returns:
        Results by name: `<set>_<kind>_<metric>` for every set, and the summary numbers that these allow.

    Raises:
        MetricError: a package is missing, or `retain_only` has other questions.
    """
    readings: dict[Asked, TofuReading] = {}
    read(LoadedModel(anat, tok), sets, readings, max_new_tokens=max_new_tokens, how=how, progress=progress)
    return score(sets, readings, retain_only=retain_only, judges=judges)


def retain_only_results(
    model: PreTrainedModel, tok: PreTrainedTokenizerBase, sets: TofuSets, *, how: Asking, progress: str | None = None
) -> Results:
    """Measures a model that never saw the forget set on the set's questions; see `tofu_scores`.

    Forget quality needs teacher-forced scores alone, so the model generates only one token.
    """
    only = sets.only("forget")
    return tofu_scores(anatomy(model), tok, only, max_new_tokens=1, how=how, progress=progress)


def compare_tofu(
    base: LoadedModel | ModelPair,
    edited: LoadedModel | ModelPair,
    sets: TofuSets,
    *,
    retain_only: Mapping[str, MetricResult] | None = None,
    judges: Judges | None = None,
    max_new_tokens: int = ANSWER_TOKENS,
    how: Asking = None,
    before: Readings | None = None,
    progress: bool = False,
) -> TofuScores:
    """Runs `tofu_scores` on two models; the base's answers are drafts for the edited model, which only saves time.

    Args:
        base, edited: loaded models, or pairs of a model (or its anatomy) and its tokenizer.
        how: how both models are asked; `None`: the edited model's prompt settings.
        before: known readings of the base model; the missing ones are added.
    """
    known: Readings = {} if before is None else before
    base, edited = LoadedModel.given(base), LoadedModel.given(edited)
    how = edited.prompts if how is None else how
    read(base, sets, known, max_new_tokens=max_new_tokens, how=how, progress="before" if progress else None)
    drafts = {probe.question: known[probe].tokens for asked in sets.probes.values() for probe in asked}
    after: dict[Asked, TofuReading] = {}
    label = "after" if progress else None
    read(edited, sets, after, drafts=drafts, max_new_tokens=max_new_tokens, how=how, progress=label)
    base_results, edited_results = (
        score(sets, readings, retain_only=retain_only, judges=judges) for readings in (known, after)
    )
    return TofuScores(base_results, edited_results, sets, known, after)


def read(
    model: LoadedModel,
    sets: TofuSets,
    known: Readings,
    *,
    drafts: Mapping[str, Sequence[int]] | None = None,
    max_new_tokens: int = ANSWER_TOKENS,
    how: Asking = None,
    progress: str | None = None,
) -> None:
    """Adds the readings of all questions of `sets` that are not in `known`.

    Args:
        drafts: likely answers by question, as token ids.
    """
    anat, tok = model.anat, model.tok
    asked = [probe for probes in sets.probes.values() for probe in probes if probe not in known]
    asked = list(dict.fromkeys(asked))
    questions = [one.question for one in asked]
    said = ask(anat, tok, questions, drafts=drafts, max_new_tokens=max_new_tokens, how=how, progress=progress)
    given = [(one.question, text) for one in asked for text in _given(one)]
    form = PromptFormat.of(tok, how)
    label = None if progress is None else f"{progress}, reading"
    forced = iter(metrics.read_answers(anat, form, [q for q, _ in given], [text for _, text in given], progress=label))
    texts = answer_texts(form, [said[question] for question in questions])
    for one, text in zip(asked, texts, strict=True):
        answer, *others = [next(forced) for _ in _given(one)]
        paraphrase = answer if one.paraphrase is None else others.pop(0)
        known[one] = TofuReading(
            said[one.question], text, answer, paraphrase.mean, tuple(other.mean for other in others)
        )


def _given(probe: Asked) -> list[str]:
    """Lists the given answers to score: the true one, a paraphrase if there is one, wrong ones."""
    return [probe.answer, *([] if probe.paraphrase is None else [probe.paraphrase]), *probe.wrong]


def score(
    sets: TofuSets,
    readings: Mapping[Asked, TofuReading],
    *,
    retain_only: Mapping[str, MetricResult] | None = None,
    judges: Judges | None = None,
) -> Results:
    """Computes the results of one model from its `readings` of all questions of `sets`; see `tofu_scores`."""
    results: Results = {}
    by_set: dict[str, Results] = {}
    for name, probes in sets.probes.items():
        by_set[name] = _of_set(name, probes, [readings[probe] for probe in probes], judges or Judges())
        for result in by_set[name].values():
            results[result.name] = result
    for result in _summary(by_set, retain_only):
        results[result.name] = result
    return results


def _of_set(name: str, probes: Sequence[Asked], said: Sequence[TofuReading], judges: Judges) -> Results:
    """Computes the metrics of one set by their bare names; each item has the question's id."""
    on: Split = "forget" if name.startswith("forget") else "retain"
    texts, answers = [reading.text for reading in said], [probe.answer for probe in probes]
    hits = [reading.answer.hits for reading in said]
    nll, wrong = [reading.answer.mean for reading in said], [reading.wrong for reading in said]
    options = name in SIDE
    results = {
        "rouge_l_recall": metrics.rouge_l_recall(texts, answers, on=on),
        "probability": metrics.probability_with_options(nll, wrong, on=on)
        if options
        else metrics.probability(nll, on=on),
        # Without a paraphrase TOFU uses the answer itself, and so does `read`.
        "truth_ratio": metrics.truth_ratio([reading.paraphrase for reading in said], wrong, on=on),
        "token_entropy": metrics.token_entropy([reading.tokens for reading in said], on=on),
        "exact_memorisation": metrics.exact_memorisation(hits, on=on),
        "extraction_strength": metrics.extraction_strength(hits, on=on),
    }
    if judges.encoder is not None:
        results["cosine_similarity"] = metrics.cosine_similarity(texts, answers, judges.encoder, on=on)
    if judges.classifier is not None:
        results["entailment_score"] = metrics.entailment_score(texts, answers, judges.classifier, on=on)
    return {
        metric: replace(
            result,
            name=name + result.name.removeprefix(on),
            value_by_index={
                index: {"id": probe.id, **item}
                for probe, (index, item) in zip(probes, result.value_by_index.items(), strict=True)
            },
        )
        for metric, result in results.items()
    }


def _summary(by_set: Mapping[str, Results], retain_only: Mapping[str, MetricResult] | None) -> list[MetricResult]:
    """Computes the summary numbers whose parts were all measured."""
    results = []
    forget, retain = by_set.get("forget", {}), by_set.get("retain", {})
    judged = ("cosine_similarity", "entailment_score")
    if retain_only is not None:
        results.append(metrics.forget_quality(*_paired_ratios(forget["truth_ratio"], retain_only)))
    if _measured(forget, SHARED) and _measured(retain, SHARED):
        parts = {name: forget[name] for name in (*SHARED, *judged) if name in forget}
        efficacy = metrics.forget_efficacy(**parts)
        parts = {name: retain[name] for name in (*SHARED, "token_entropy", *judged) if name in retain}
        ability = metrics.retain_ability(**parts)
        results += [efficacy, ability, metrics.balance(efficacy, ability)]
    kept = {name: by_set.get(name, {}) for name in UTILITY_SETS}
    for names, summarise in (
        (SHARED, metrics.model_utility),
        ((*SHARED, "token_entropy", *judged), metrics.wide_model_utility),
    ):
        if all(_measured(scores, names) for scores in kept.values()):
            results.append(summarise({part: {name: scores[name] for name in names} for part, scores in kept.items()}))
    return results


def _measured(results: Results, names: Sequence[str]) -> bool:
    return all(name in results and results[name].agg_value is not None for name in names)


def _paired_ratios(
    own: MetricResult, retain_only: Mapping[str, MetricResult]
) -> tuple[Sequence[float], Sequence[float]]:
    """Pairs the forget set's truth ratios of both models by question.

    Raises:
        MetricError: the retain-only model's ratios are for other questions.
    """
    items = list(own.value_by_index.values())
    other = _ratios_of(retain_only, [item["id"] for item in items], "the retain-only model's results")
    pairs = [(item["score"], other[item["id"]]) for item in items if item["score"] is not None]
    return [one for one, _ in pairs], [two for _, two in pairs]


def reference_results(path: Path, sets: TofuSets, *, whole: bool = True) -> dict[str, MetricResult]:
    """Reads a retain-only model's results of an earlier run (`edited.json`), and checks that they fit the forget set.

    Args:
        whole: every question of the set must be among them; otherwise one is enough.

    Raises:
        MetricError: no results, no truth ratios among them (open-unlearning's have no ids of questions), or those of
            other questions.
    """
    results = read_results(path)
    ids = [probe.id for probe in sets.probes["forget"]]
    held = [name for name in ids if name in _ids(results)]
    _ratios_of(results, ids if whole or not held else held, str(path))
    return results


def _ids(results: Mapping[str, MetricResult]) -> set[str]:
    return {str(item.get("id")) for item in results[RATIOS].value_by_index.values()} if RATIOS in results else set()


def _ratios_of(results: Mapping[str, MetricResult], ids: Sequence[str], what: str) -> dict[str, float]:
    """Returns a retain-only model's truth ratios for all `ids`, by id; `what` names their source in messages."""
    if RATIOS not in results:
        theirs = "forget_truth_ratio" in results
        near = " (open-unlearning's results do not name their questions)" if theirs else ""
        raise MetricError(
            f"{what}: no {RATIOS}{near}; expected the edited.json of `editlib eval --protocol tofu` for the "
            "retain-only model, or that model itself"
        )
    ratios = {str(item.get("id")): item.get("score") for item in results[RATIOS].value_by_index.values()}
    if missing := [name for name in ids if ratios.get(name) is None]:
        raise MetricError(
            f"{what}: lacks {len(missing)} of {len(ids)} questions ({missing[0]}); measure the retain-only model with "
            "the same --forget, --limit and --seed"
        )
    return {name: float(ratio) for name in ids if (ratio := ratios[name]) is not None}


def document(scores: TofuScores) -> dict[str, Any]:
    """Returns both models' results by name, and every question with both answers, JSON-ready."""
    sides = {"base": (scores.base, scores.before), "edited": (scores.edited, scores.after)}
    items = []
    for name, probes in scores.sets.probes.items():
        rouge = {
            side: results[f"{name}_generated_rouge_l_recall"].value_by_index for side, (results, _) in sides.items()
        }
        for i, probe in enumerate(probes):
            item: dict[str, Any] = {"id": probe.id, "set": name, "question": probe.question, "answer": probe.answer}
            for side, (_, readings) in sides.items():
                when = {"base": "before", "edited": "after"}[side]
                item[when] = readings[probe].text
                item[f"rouge_{when}"] = rouge[side][str(i)]["rougeL_recall"]
                item[f"probability_{when}"] = _probability(readings[probe].answer.mean)
            items.append(item)
    rules = [None if subject is None else subject.rule for subject in scores.sets.subjects]
    return {
        "forget": scores.sets.name,
        "sets": {name: len(probes) for name, probes in scores.sets.probes.items()},
        "missing": list(scores.sets.missing),
        "unlearned": dict(scores.sets.unlearned or {}),
        "subjects": {rule or "none": rules.count(rule) for rule in dict.fromkeys(rules)},
        "scores": {
            side: {name: body for result in results.values() for name, body in result.to_dict().items()}
            for side, (results, _) in sides.items()
        },
        "items": items,
    }


def _probability(nll: float) -> float | None:
    return None if math.isnan(nll) else math.exp(-nll)
