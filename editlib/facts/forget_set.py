"""Define forget sets of real facts: bundled ones that the model knows, or the user's; scored on generated answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from editlib import data
from editlib.errors import ConfigError, RequestError
from editlib.evaluation.answer_cache import ANSWER_TOKENS, AnswerCache, ask
from editlib.evaluation.forget_set import Base, Benchmark, ForgetSet, Scores, SetSettings, Task
from editlib.evaluation.metrics import MetricResult, wilson_interval
from editlib.facts.sampling import ANCHORED, HELD_OUT, RELATIONS, FactSplit, split_in_proportion
from editlib.facts.scores import KINDS, Item, build_items, evaluate
from editlib.models.loaded import LoadedModel
from editlib.models.positions import check_prompts
from editlib.models.prompts import PromptFormat
from editlib.requests.reading import read_requests, requests_hash, write_requests
from editlib.requests.request import EditRequest
from editlib.settings import setting

KEPT = ("neighbour_retention", "same_subject_retention", "other_retention")


@dataclass(frozen=True, kw_only=True)
class FactsSettings(SetSettings):
    """Sets which facts are used: `forget` bundled ones, or the user's files."""

    forget: int | None = setting(None, "number of bundled facts to forget", min=1)
    relations: list[str] | None = setting(None, "relations of these facts; none: six usual ones")
    seed: int = setting(0, "seed of the draw", min=0)
    requests: str | None = setting(None, "file of facts to forget, in place of bundled ones")
    retain: str | None = setting(None, "file of prompts to keep; without `watch` every second one is held out")
    watch: str | None = setting(None, "file of held-out prompts, which are only asked afterwards")
    skip_bad: bool = setting(False, "leave out unusable rows of these files, and count them")


class Facts(Benchmark):
    """Asks direct questions, paraphrases, neighbours, other questions about the same subjects, general prompts."""

    Settings, protocol = FactsSettings, "facts"
    axes = ("share of right answers that are gone", "share of right answers that are kept")
    kinds: ClassVar = {
        "request": "questions to forget",
        "paraphrase": "paraphrases of them",
        "neighbour": "neighbours: same relation, other subject",
        "same_subject": "same subject, other relation",
        "same_subject_anchored": "same subject, relation anchored for others",
        "crossed": "crossed: same subject, relation that others lose",
        "other_question": "general questions",
        "other_instruction": "open instructions",
    }
    to_forget = ("request", "paraphrase")
    settings: FactsSettings

    def __init__(self, settings: SetSettings, where: str, **loading: Any) -> None:
        super().__init__(settings, where, **loading)
        config = self.settings
        if (config.forget is None) == (config.requests is None):
            raise ConfigError(f'{where}: expected "forget", a number, or "requests", a file; give one of the two')
        if config.requests is None and (config.retain or config.watch):
            raise ConfigError(f'{where}: "retain" and "watch" go with "requests", not with "forget"; remove them')
        if config.requests is not None and config.relations is not None:
            raise ConfigError(f'{where}: "relations" goes with "forget", not with "requests"; remove it')
        known = sorted({fact.relation or "" for fact in data.facts()} - {*ANCHORED, *HELD_OUT})
        for relation in config.relations or ():
            if relation not in known:
                raise ConfigError(f'{where}: relation "{relation}": expected some of {", ".join(known)}')
        chosen = config.relations or RELATIONS
        count = sum(fact.relation in chosen for fact in data.facts())
        if config.forget is not None and 2 * config.forget > count:
            raise ConfigError(
                f'{where}: key "forget": {config.forget}; expected at most {count // 2}, half of the {count} facts of '
                "these relations, so that others remain to be held out; forget fewer"
            )
        self._given = None if config.requests is None else self._files(config)

    @property
    def planned(self) -> Task | None:
        if self._given is None:
            return None
        return Task([_tuned(request) for request in self._given.forget], self._given.anchors)

    def make(self, base: Base) -> FactsSet:
        base.folder.mkdir(parents=True, exist_ok=True)
        before = AnswerCache.load(base.folder / "before.json", base.bench.sha256)
        parts = self._given or self._split(base, before)
        for name, part in parts.by_file().items():
            write_requests(base.folder / f"{name}.jsonl", part)
        forget = [_scored(request) for request in parts.forget]
        made = FactsSet(base, forget, parts.anchors, before, parts.held_out, parts.forget, fewshot_pool=data.facts())
        made.complete()
        return made

    def _files(self, config: FactsSettings) -> FactSplit:
        forget = read_requests(config.requests or "", skip_bad=config.skip_bad, left_out=self.left_out)
        for request in forget:
            if request.answer is None:
                raise RequestError(
                    f'{config.requests}: request {request.id} has no "answer"; scoring needs it; add one'
                )
        if config.retain is None:
            kept = data.retain_prompts(forget)
            held, held_out = kept[::2], [*kept[1::2], *data.general("test")]
        else:
            kept = read_requests(config.retain, skip_bad=config.skip_bad, left_out=self.left_out)
            random.Random(config.seed).shuffle(kept)
            held, held_out = (kept, []) if config.watch else (kept[::2], kept[1::2])
        if config.watch is not None:
            held_out = read_requests(config.watch, skip_bad=config.skip_bad, left_out=self.left_out)
        return FactSplit(forget, held, held_out)

    def _split(self, base: Base, before: AnswerCache) -> FactSplit:
        """Picks `forget` facts over all relations, each in proportion to its number of facts that the model knows."""
        config = self.settings
        try:
            return split_in_proportion(
                base.bench, before, config.forget or 0, config.seed, config.relations or RELATIONS
            )
        except RequestError as error:
            raise RequestError(f"{self.where}: {error}") from None
        finally:
            before.save(base.folder / "before.json")


@dataclass(frozen=True)
class FactsSet(ForgetSet):
    """Holds facts with the held-out prompts."""

    held_out: Sequence[EditRequest] = ()
    whole: Sequence[EditRequest] = ()  # `forget` with all paraphrases

    def identity(self) -> dict[str, Any]:
        return {"protocol": "facts", **self.hashes(), "watch": requests_hash(self.held_out)}

    @property
    def task(self) -> Task:
        return Task([_tuned(request) for request in self.whole], self.retain, self.before.answers)

    def items(self) -> list[Item]:
        return build_items(self.forget, self.held_out, {request.id for request in self.retain})

    def complete(self) -> None:
        """Generates the base's missing answers, and saves them."""
        bench, items = self.base.bench, self.items()
        form = PromptFormat.of(bench.tok, bench.prompts)
        check_prompts(bench.model, form, [(item.id, item.question) for item in items], answer_tokens=ANSWER_TOKENS)
        missing = [item.question for item in items if item.question not in self.before.answers]
        if missing:
            label = "answers before" if bench.progress else None
            self.before.answers.update(ask(bench.anat, bench.tok, missing, how=bench.prompts, progress=label))
        self.before.save(self.base.folder / "before.json")

    def score(self, edited: LoadedModel, *, progress: bool = False) -> Scores:
        items = self.items()
        metrics = evaluate(self.base.loaded, edited, items, before=self.before, how=edited.prompts, progress=progress)
        gone = [_gone("gone", items, "request"), _gone("paraphrases_gone", items, "paraphrase")]
        measures = {
            **{result.name: result for result in gone},
            **{
                name: MetricResult.from_dict({name: metrics["scores"]["edited"][name]})
                for name in (*KINDS, "refusal_quality")
            },
        }
        meaning = "the mean of `gone` and `paraphrases_gone`: the answer does not occur, whatever does"
        retain = "the mean of the three shares that are kept: neighbours, same subject, general prompts"
        return Scores(
            _mean("forget", gone, meaning),
            _mean("retain", [measures[name] for name in KEPT], retain),
            measures,
            [_told(item) for item in items],
        )


def _scored(request: EditRequest) -> EditRequest:
    """Makes the request with the scored paraphrases: all except the first, if there are several."""
    return replace(request, paraphrases=request.paraphrases[1:] or request.paraphrases)


def _tuned(request: EditRequest) -> EditRequest:
    """Makes the request with the paraphrase for the validation of a search, which is never scored."""
    return replace(request, paraphrases=request.paraphrases[:1] if len(request.paraphrases) > 1 else ())


def _gone(name: str, items: Sequence[Item], kind: str) -> MetricResult:
    """Computes the share of questions whose right answer is no longer in the text."""
    counted = [item for item in items if item.kind == kind and item.right_before]
    gone, n = sum(not item.right_after for item in counted), len(counted)
    asked = "direct question" if kind == "request" else "other wordings, which no method saw"
    meaning = f"{asked}: the right answer is gone, of those right before; any other text counts"
    value = gone / n if n else None
    return MetricResult(name, value, {}, "generated", True, n, meaning, wilson_interval(gone, n))


def _mean(name: str, parts: Sequence[MetricResult], meaning: str) -> MetricResult:
    values = [part.agg_value for part in parts if part.agg_value is not None]
    return MetricResult(
        name, sum(values) / len(values) if values else None, kind="combined", higher_is_better=True, meaning=meaning
    )


def _told(item: Item) -> dict[str, Any]:
    """Picks the fields of an item for the page and the results."""
    passed = item.passed
    if item.kind in ("request", "paraphrase"):
        passed = not item.right_after
        counted = bool(item.right_before)
    else:
        counted = item.counted
    note = "refused" if item.refused_after else ""
    if item.nats_change is not None:
        note = ", ".join(filter(None, [note, f"{item.nats_change:+.2f} nats per token"]))
    return {
        "id": item.id,
        "kind": item.kind,
        "question": item.question,
        "answer": item.answer,
        "before": item.before,
        "after": item.after,
        "passed": passed,
        "counted": counted,
        "note": note,
    }
