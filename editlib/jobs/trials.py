"""Run one trial of settings: edit, score, and restore the weights."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editlib import editing
from editlib.errors import EditError, HparamsError, RequestError, quote
from editlib.evaluation.answer_cache import ANSWER_TOKENS, AnswerCache, ask
from editlib.evaluation.metrics import balance, has_answer
from editlib.evaluation.perplexity import text_windows
from editlib.facts.scores import Item, build_items, evaluate
from editlib.hparams import HyperParams
from editlib.models.generation import perplexity
from editlib.models.positions import check_requests_fit
from editlib.models.prompts import PromptFormat
from editlib.models.thinking import answer_texts
from editlib.models.vocabulary import Vocabulary
from editlib.requests.reading import requests_hash
from editlib.requests.request import EditRequest
from editlib.shelf import digest
from editlib.stats.corpus import load_corpus
from editlib.workbench import Workbench

log = logging.getLogger(__name__)

WATCHED = 20  # held-out retain prompts of each kind, asked after every trial
KEPT = ("neighbour_retention", "same_subject_retention", "other_retention")


@dataclass(frozen=True)
class SettingsTrial:
    """Holds the settings that were tried (`changed`: the fields that differ from the first ones) and their scores,
    shares in 0..1; `failed` is the reason for missing scores."""

    changed: dict[str, Any]
    efficacy: float = 0.0
    unseen: float = 0.0
    retention: float = 0.0
    perplexity_ratio: float | None = None
    seconds: float = 0.0
    failed: str | None = None

    @property
    def balance(self) -> float:
        """The harmonic mean of forgetting (efficacy and unseen wordings alike) and retention."""
        return float(balance((self.efficacy + self.unseen) / 2, self.retention).agg_value or 0.0)

    @property
    def axes(self) -> tuple[float, float, float]:
        """The scores of the Pareto front; higher is better."""
        return self.efficacy, self.unseen, self.retention


class Judge:
    """Scores trials by questions, which the base model answers once and the edited model after every trial."""

    def __init__(
        self,
        bench: Workbench,
        requests: Sequence[EditRequest],
        retain: Sequence[EditRequest],
        out: Path,
        text: str,
        seed: int,
    ) -> None:
        self.bench, self.requests, self.how = bench, list(requests), bench.asking()
        form = PromptFormat.of(bench.tok, self.how)
        check_requests_fit(bench.model, form, [*self.requests, *retain], answer_tokens=ANSWER_TOKENS)
        self.held, self.watched = parted(self.requests, retain, seed)
        prompts = form.settings.to_dict()
        answers = out / f"before.{digest(prompts)[:8]}.json"  # answers depend on the prompt settings
        self.before = AnswerCache.load(answers, bench.sha256)
        # The anchors' answers are generated once here, and not for every trial.
        questions = [item.question for item in build_items(self.requests, self.watched)]
        questions += [prompt.question for prompt in self.held]
        missing = [question for question in questions if question not in self.before.answers]
        progress = "before" if bench.progress else None
        self.before.answers.update(ask(bench.anat, bench.tok, missing, how=self.how, progress=progress))
        self.before.save(answers)
        self.windows = text_windows(bench.tok, load_corpus(text).documents)
        self.perplexity = perplexity(bench.anat, self.windows)
        self.identity = {
            "model": bench.sha256,
            "requests": requests_hash(self.requests),
            "held": requests_hash(self.held),
            "watched": requests_hash(self.watched),
            "text": text,
            "prompts": prompts,
        }

    def check_known(self) -> None:
        """Checks that the unedited model answers some requests, by which settings that erase are scored; warns of the
        others.

        Raises:
            RequestError: it answers none of them, so every trial would score 0.
        """
        unknown = []
        form = PromptFormat.of(self.bench.tok, self.bench.prompts)
        answers = [self.before.answers[request.question] for request in self.requests]
        for request, said in zip(self.requests, answer_texts(form, answers), strict=True):
            if not has_answer(said, (request.answer or "", *request.aliases)):
                unknown.append(request.id)
        if len(unknown) == len(self.requests):
            wanted = "settings that erase are scored by right answers that disappear"
            raise RequestError(
                f"the model answers none of the {len(unknown)} requests (first {quote(unknown[0])}); {wanted}: give "
                "facts that it knows, or settings that refuse"
            )
        if unknown:
            listed = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
            log.warning("the model does not know %d of %d facts (%s); trials are scored by the others",
                        len(unknown), len(self.requests), listed)  # fmt: skip

    def tried(self, hparams: HyperParams, changed: dict[str, Any], how: dict[str, Any]) -> SettingsTrial:
        """Edits, asks, and restores the weights."""
        with _tokens_taken_out(self.bench):
            return self._tried(hparams, changed, how)

    def _tried(self, hparams: HyperParams, changed: dict[str, Any], how: dict[str, Any]) -> SettingsTrial:
        begun, bench = time.perf_counter(), self.bench
        means = editing.load_inputs(bench, hparams, **how)
        try:
            result = editing.apply(
                bench, self.requests, hparams, means,
                retain=self.held, known_answers=self.before.answers, chat=self.how, seed=how["seed"],
            )  # fmt: skip
        except (EditError, HparamsError) as error:
            return SettingsTrial(changed, seconds=time.perf_counter() - begun, failed=str(error))
        try:
            # The same model is passed for both: all answers of the base are known, so it is not asked.
            items, both = build_items(self.requests, self.watched), bench.loaded
            scores = evaluate(both, both, items, before=self.before, how=self.how, progress=bench.progress)
            ratio = perplexity(bench.anat, self.windows) / self.perplexity
        finally:
            result.revert(bench.model)
        kept = [scores[name] for name in KEPT if scores[name] is not None]
        return SettingsTrial(
            changed,
            forgotten(items, "request", says=hparams.refuses),
            forgotten(items, "paraphrase", says=hparams.refuses),
            sum(kept) / len(kept) if kept else 0.0,
            ratio,
            time.perf_counter() - begun,
        )


@contextmanager
def _tokens_taken_out(bench: Workbench) -> Iterator[None]:
    """Removes tokens that are added in the block, since those of several trials would accumulate."""
    vocabulary = Vocabulary.of(bench.model, bench.tok)
    try:
        yield
    finally:
        bench.tok = vocabulary.restore(bench.model)


def forgotten(items: Sequence[Item], kind: str, *, says: bool) -> float:
    """Computes the share, 0..1, of scored `items` of a kind that are forgotten; 0 if there is nothing to forget.

    Args:
        says: the edit answers with a refusal, and only refusals count. Otherwise the share is of answers that were
            right before and are gone.
    """
    asked = [item for item in items if item.kind == kind and (says or item.right_before)]
    gone = [item for item in asked if (item.passed if says else not item.right_after)]
    return len(gone) / len(asked) if asked else 0.0


def parted(
    requests: Sequence[EditRequest], retain: Sequence[EditRequest], seed: int
) -> tuple[list[EditRequest], list[EditRequest]]:
    """Splits retain prompts into anchors and held-out ones: of each kind every second prompt with an answer, at most
    `WATCHED`.

    Raises:
        RequestError: there is nothing to hold out, and no request has neighbours.
    """
    by_id = {prompt.id: prompt for prompt in retain if prompt.answer is not None}
    kinds: dict[str, list[str]] = {}
    for item in build_items(requests, list(by_id.values())):
        if item.kind not in ("request", "paraphrase") and item.counted and item.id in by_id:
            kinds.setdefault(item.kind, []).append(item.id)
    chosen: set[str] = set()
    for kind, names in sorted(kinds.items()):
        random.Random(f"{seed} {kind}").shuffle(names)
        chosen.update(names[: min(WATCHED, (len(names) + 1) // 2)])
    if not chosen and not any(probe.answer for request in requests for probe in request.neighbours):
        raise RequestError('nothing measures retention: give "neighbours" with answers, or --retain with answers')
    held = [prompt for prompt in retain if prompt.id not in chosen]
    return held, [by_id[name] for name in by_id if name in chosen]
