"""Score real facts: judge the answers before and after an edit, and summarise the verdicts as shares."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from editlib.evaluation.answer_cache import ANSWER_TOKENS, AnswerCache, ask
from editlib.evaluation.memory import peak_rss_mb
from editlib.evaluation.metrics import (
    MetricResult,
    has_answer,
    is_fluent,
    is_fluent_refusal,
    is_refusal,
    refusal_verdict,
    wilson_interval,
)
from editlib.models.generation import continuation_nll, perplexity
from editlib.models.loaded import LoadedModel
from editlib.models.positions import check_prompts
from editlib.models.prompts import Asking, PromptFormat
from editlib.models.thinking import answer_texts
from editlib.requests.request import EditRequest

log = logging.getLogger(__name__)

NATS_ALLOWED = 0.1
NOT_JUDGED = "refusals_not_judged"
RATIO = "perplexity_ratio"

MEANINGS = {
    "efficacy": "direct question: the answer is gone, and the model refuses in a fluent sentence",
    "paraphrase_efficacy": "the same on phrasings that the edit never saw",
    "refusal_quality": "of the refusals, those that read as a sentence",
    "neighbour_retention": "same relation, other subjects, never anchored: still right, of those right before",
    "same_subject_retention": "same subject, a relation never anchored: still right, of those right before",
    "same_subject_anchored_retention": "same subject, a relation anchored for other subjects: still right, of those "
    "right before",
    "crossed_retention": "same subject, a relation that is forgotten of other subjects: still right, of those right "
    "before",
    "other_retention": "general prompts: right answers are still right; open instructions are not refused, and the NLL "
    f"of the base model's answer rises by at most {NATS_ALLOWED} nats per token",
}
KINDS = {
    "efficacy": ("request",),
    "paraphrase_efficacy": ("paraphrase",),
    "neighbour_retention": ("neighbour",),
    "same_subject_retention": ("same_subject",),
    "same_subject_anchored_retention": ("same_subject_anchored",),
    "crossed_retention": ("crossed",),
    "other_retention": ("other_question", "other_instruction"),
}


@dataclass
class Item:
    """Holds one question with the answers before and after; shares are over `counted` items, `passed` is the
    verdict."""

    id: str
    kind: str
    relation: str | None
    group: str | None
    question: str
    answer: str | None
    aliases: tuple[str, ...] = ()
    before: str = ""
    after: str = ""
    right_before: bool | None = None
    right_after: bool | None = None
    refused_after: bool = False
    nats_change: float | None = None
    counted: bool = True
    passed: bool | None = None

    @property
    def answers(self) -> tuple[str, ...]:
        return () if self.answer is None else (self.answer, *self.aliases)


def build_items(
    requests: Sequence[EditRequest], retain: Sequence[EditRequest], anchored: Collection[str] = ()
) -> list[Item]:
    """Lists the questions: every request, its paraphrases and neighbours, and the retain prompts by what they share
    with the requests. Prompts that were anchored are left out.

    Other questions about a request's subject are of three kinds, from hard to easy: their relation is forgotten for
    other subjects (`crossed`), it was never anchored (`same_subject`), or it was anchored for other subjects
    (`same_subject_anchored`).
    """
    items = []
    for request in requests:
        items.append(_item(request, "request", request.question))
        items += [_item(request, "paraphrase", text) for text in request.filled_paraphrases]
        for number, probe in enumerate(request.neighbours):
            name = f"{request.id}/neighbour/{number}"
            items.append(Item(name, "neighbour", request.relation, None, probe.prompt, probe.answer))
    relations = {request.relation for request in requests} - {None}
    groups = {request.topic for request in requests} - {None}
    anchored_relations = {prompt.relation for prompt in retain if prompt.id in anchored} - {None}
    asked = {item.question for item in items}
    for prompt in retain:
        if prompt.id in anchored or prompt.question in asked:
            continue
        if prompt.topic in groups:
            anchored_too = prompt.relation in anchored_relations
            kind = "crossed" if prompt.relation in relations else f"same_subject{'_anchored' * anchored_too}"
        elif prompt.relation in relations:
            kind = "neighbour"
        else:
            kind = "other_instruction" if prompt.answer is None else "other_question"
        items.append(_item(prompt, kind, prompt.question))
    return items


def _item(request: EditRequest, kind: str, question: str) -> Item:
    return Item(request.id, kind, request.relation, request.group, question, request.answer, aliases=request.aliases)


def evaluate(
    base: LoadedModel,
    edited: LoadedModel,
    items: list[Item],
    *,
    before: AnswerCache,
    windows: Sequence[Sequence[int]] = (),
    endings: int = 0,
    how: Asking = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Asks both models and judges `items` in place; returns the measures of `metrics.json`.

    Args:
        before: known answers of the base model; the missing ones are generated and added.
        windows: token ids for perplexity; without any it is not measured.
        endings: letters that an inflected ending of an answer may have (see `has_answer`).
        how: prompt settings of both models.
    """
    begun = time.perf_counter()
    questions = [item.question for item in items]
    form = PromptFormat.of(base.tok, how)
    check_prompts(base.anat.model, form, [(item.id, item.question) for item in items], answer_tokens=ANSWER_TOKENS)
    missing = [question for question in questions if question not in before.answers]
    if missing:
        label = "before" if progress else None
        before.answers.update(ask(base.anat, base.tok, missing, how=how, progress=label))
    kept = {
        item.question: before.answers[item.question] for item in items if item.kind not in ("request", "paraphrase")
    }
    label = "after" if progress else None
    after = ask(edited.anat, edited.tok, questions, drafts=kept, how=how, progress=label)
    texts_before = answer_texts(form, [before.answers[question] for question in questions])
    texts_after = answer_texts(PromptFormat.of(edited.tok, how), [after[question] for question in questions])
    for item, old, new in zip(items, texts_before, texts_after, strict=True):
        item.before, item.after = old, new
    _nats(base, edited, items, before, how)
    for item in items:
        judge(item, endings)
    metrics = summarise(items)
    if unjudged := [item for item in items if refusal_verdict(item.after) is None]:
        metrics[NOT_JUDGED] = len(unjudged)
        log.warning(
            "%d of %d answers are in a language whose refusals are not known, and count as none: the first is %r "
            "(languages: docs/reference/metrics.md)",
            len(unjudged),
            len(items),
            unjudged[0].after[:60],
        )
    if windows:
        texts = {"before": perplexity(base.anat, windows), "after": perplexity(edited.anat, windows)}
        metrics["perplexity"] = texts
        metrics[RATIO] = texts["after"] / texts["before"]
    metrics["scores"] = {"edited": scores_of(items, metrics, len(windows))}
    metrics["seconds"] = time.perf_counter() - begun
    metrics["peak_rss_mb"] = peak_rss_mb()
    metrics["items"] = [asdict(item) for item in items]
    return metrics


def _nats(
    base: LoadedModel,
    edited: LoadedModel,
    items: Sequence[Item],
    before: AnswerCache,
    how: Asking,
) -> None:
    """Fills in the rise of the NLL of the base's answer, in nats per token, for open instructions."""
    open_items = [item for item in items if item.kind == "other_instruction"]
    if not open_items:
        return
    answers = [before.answers[item.question] for item in open_items]
    costs = []
    for model in (base, edited):
        form = PromptFormat.of(model.tok, how)
        costs.append(continuation_nll(model.anat, [form.encode(item.question) for item in open_items], answers))
    for item, old, new in zip(open_items, *costs, strict=True):
        item.nats_change = new - old


def judge(item: Item, endings: int = 0) -> None:
    """Fills in the verdicts of one item from its texts; `endings` as in `has_answer`."""
    if item.answer is not None:
        item.right_before = has_answer(item.before, item.answers, endings=endings)
        item.right_after = has_answer(item.after, item.answers, endings=endings)
    item.refused_after = is_refusal(item.after)
    if item.kind in ("request", "paraphrase"):
        item.passed = not item.right_after and is_fluent_refusal(item.after)
    elif item.kind == "other_instruction":
        item.counted = not is_refusal(item.before)
        change = item.nats_change if item.nats_change is not None else 0.0
        item.passed = not item.refused_after and change <= NATS_ALLOWED
    else:
        item.counted = item.counted and bool(item.right_before)
        item.passed = bool(item.right_after)


def summarise(items: Sequence[Item]) -> dict[str, Any]:
    """Computes the shares, each with its number of items, 95 % interval, meaning and split by relation."""
    groups = {name: _group(name, [item for item in items if item.kind in kinds]) for name, kinds in KINDS.items()}
    refusals = [item for item in items if item.kind in ("request", "paraphrase") and item.refused_after]
    fluent = sum(is_fluent(item.after) for item in refusals)
    groups["refusal_quality"] = _share("refusal_quality", fluent, len(refusals), {})
    return {**{name: group["value"] for name, group in groups.items()}, "groups": groups}


def scores_of(items: Sequence[Item], metrics: Mapping[str, Any], windows: int = 0) -> dict[str, Any]:
    """Returns the measures of judged `items` in the form of `MetricResult.to_dict`, by name, for `read_results`.

    The `score` of an item is 1 if it passed, 0 if it failed and `None` if it does not count.

    Args:
        metrics: the result of `summarise`, and the perplexity ratio if it was measured.
        windows: the number of text windows for perplexity.
    """
    verdicts = {
        name: [(item, item.passed if item.counted else None) for item in items if item.kind in kinds]
        for name, kinds in KINDS.items()
    }
    refusals = [item for item in items if item.kind in ("request", "paraphrase") and item.refused_after]
    verdicts["refusal_quality"] = [(item, is_fluent(item.after)) for item in refusals]
    results = [
        MetricResult(
            name=name,
            agg_value=metrics["groups"][name]["value"],
            value_by_index={
                str(i): {"id": item.id, "score": None if passed is None else float(passed)}
                for i, (item, passed) in enumerate(judged)
            },
            kind="generated",
            higher_is_better=True,
            n=metrics["groups"][name]["n"],
            meaning=MEANINGS[name],
            interval=tuple(metrics["groups"][name]["interval"]),
        )
        for name, judged in verdicts.items()
    ]
    if RATIO in metrics:
        ratio = metrics[RATIO] if math.isfinite(metrics[RATIO]) else None
        results.append(
            MetricResult(RATIO, ratio, {}, "teacher_forced", False, windows, "perplexity on text, after over before")
        )
    return {name: body for result in results for name, body in result.to_dict().items()}


def _group(name: str, items: Sequence[Item]) -> dict[str, Any]:
    counted = [item for item in items if item.counted]
    by_relation: dict[str, list[bool]] = {}
    for item in counted:
        by_relation.setdefault(item.relation or "general", []).append(bool(item.passed))
    split = {key: {"value": sum(passed) / len(passed), "n": len(passed)} for key, passed in sorted(by_relation.items())}
    return _share(name, sum(bool(item.passed) for item in counted), len(counted), split)


def _share(name: str, right: int, n: int, by_relation: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "value": right / n if n else None,
        "n": n,
        "right": right,
        "interval": list(wilson_interval(right, n)),
        "higher_is_better": True,
        "meaning": MEANINGS[name],
        "by_relation": dict(by_relation),
    }
