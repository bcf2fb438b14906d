"""Define forget sets of TOFU: some of the authors on which a model was trained, scored by TOFU's metrics."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from editlib.errors import MetricError
from editlib.evaluation.answer_cache import AnswerCache
from editlib.evaluation.forget_set import Base, Benchmark, ForgetSet, Scores, SetSettings, Task
from editlib.evaluation.metrics import MetricResult, read_results, write_results
from editlib.models.generation import Forced
from editlib.models.loaded import LoadedModel
from editlib.models.loading import load
from editlib.models.weights import weights_sha256
from editlib.requests.reading import requests_hash
from editlib.settings import setting
from editlib.shelf import JsonStore, digest, from_json
from editlib.tofu.scores import (
    ANSWER_TOKENS,
    RATIOS,
    Judges,
    TofuReading,
    check_scoring,
    check_wrong_answers,
    read,
    reference_results,
    retain_only_results,
    score,
)
from editlib.tofu.sets import FORGET, Asked, TofuSets, questions_in, read_tofu

EFFICACY, KEPT = "forget_efficacy", ("model_utility", "retain_ability")
SUMMARY = (EFFICACY, "retain_ability", "balance", "model_utility", "wide_model_utility", "forget_quality")
SHOWN = ("rouge_l_recall", "probability", "truth_ratio", "extraction_strength")


@dataclass(frozen=True, kw_only=True)
class TofuSettings(SetSettings):
    """Sets which TOFU sets are used, and how many questions."""

    source: str | None = setting(None, "a folder of TOFU's files, or a data set on the Hub; none: TOFU's own")
    forget: str = setting("forget01", "the set to forget", choices=tuple(FORGET))
    learned: str | None = setting(None, "file of the questions that the model was trained on; none: all")
    reference: str | None = setting(
        None, "a model trained without the set to forget, or its results (edited.json); forget quality needs it"
    )
    skip_bad: bool = setting(False, "leave out unusable rows of these files, and count them")
    limit: int | None = setting(None, "questions of each probe set; none: all", min=1)
    seed: int = setting(0, "seed of the draw", min=0)
    max_new_tokens: int = setting(ANSWER_TOKENS, "most tokens of an answer", min=1)
    encoder: str | None = setting(None, "a sentence encoder, for cosine similarity")
    classifier: str | None = setting(None, "a classifier of entailment")


class Tofu(Benchmark):
    """Asks questions about fictitious authors (2401.06121)."""

    Settings, protocol = TofuSettings, "tofu"
    axes = ("1 − what is still known of it", "model utility")
    kinds: ClassVar = {
        "forget": "questions to forget",
        "forget_paraphrased": "paraphrases of them",
        "retain": "questions about authors to keep",
        "real_authors": "real authors",
        "world_facts": "world facts",
    }
    to_forget = ("forget", "forget_paraphrased")
    settings: TofuSettings

    def __init__(self, settings: SetSettings, where: str, **loading: Any) -> None:
        super().__init__(settings, where, **loading)
        config = self.settings
        check_scoring(Judges(config.encoder, config.classifier), config.reference)
        learned = None if config.learned is None else questions_in(config.learned, skip_bad=config.skip_bad)
        sets = read_tofu(config.source, config.forget, learned=learned, skip_bad=config.skip_bad)
        self.left_out = {name: list(rows) for name, rows in sets.left_out.items()}
        self.sets = apart(sets.limited(config.limit, config.seed), config.seed)
        self._only: Mapping[str, MetricResult] | None = None
        if config.reference is not None:
            check_wrong_answers(self.sets)
        if config.reference is not None and Path(config.reference).is_file():
            self._only = reference_results(Path(config.reference), self.sets)

    @property
    def planned(self) -> Task | None:
        return Task(self.sets.forget, self.sets.retain)

    @property
    def reference(self) -> str | None:
        return self.settings.reference if self._only is None else None

    def make(self, base: Base) -> TofuSet:
        base.folder.mkdir(parents=True, exist_ok=True)
        config = self.settings
        judges = Judges(config.encoder, config.classifier)
        known = KeptReadings(base.folder, self.sets)
        label = "before" if base.bench.progress else None
        read(
            base.loaded,
            self.sets,
            known.found,
            max_new_tokens=config.max_new_tokens,
            how=base.bench.prompts,
            progress=label,
        )
        known.save()
        answers = {probe.question: reading.tokens for probe, reading in known.found.items()}
        before = AnswerCache(base.bench.sha256, answers)
        return TofuSet(
            base, self.sets.forget, self.sets.retain, before, self.sets, known.found, config, judges,
            self._reference(base), fewshot_pool=self.sets.retain,
        )  # fmt: skip

    def _reference(self, base: Base) -> Mapping[str, MetricResult] | None:
        """Returns the retain-only model's results on the questions to forget: measured once, and saved."""
        config = self.settings
        if self._only is not None or config.reference is None:
            return self._only
        model, tok = load(config.reference, dtype=self.dtype, device_map=self.device_map)
        path = base.folder / f"reference-{weights_sha256(model)[:24]}.json"
        try:
            self._only = read_results(path)
        except MetricError:  # not measured yet, or a damaged file
            write_results(path, retain_only_results(model, tok, self.sets, how=base.bench.prompts).values())
            self._only = read_results(path)
        return self._only


def apart(sets: TofuSets, seed: int) -> TofuSets:
    """Makes sets in which no question of the probe set `retain` is among the requests that a method may train on.

    If the probes are most of the questions to keep, half of them are used for training instead of being asked.
    """
    probes = sets.probes.get("retain", ())
    if len(sets.retain) < 2 * len(probes):
        drawn = set(random.Random(seed).sample(range(len(probes)), len(probes) // 2))
        probes = tuple(question for number, question in enumerate(probes) if number in drawn)
    asked = {probe.id for probe in probes}
    kept = tuple(request for request in sets.retain if request.id not in asked)
    others = {name: questions for name, questions in sets.probes.items() if name != "retain"}
    return replace(sets, retain=kept, probes={**others, **({"retain": probes} if probes else {})})


class KeptReadings:
    """Keeps the base model's readings in a file; a damaged file, and readings of other questions, are ignored."""

    def __init__(self, folder: Path, sets: TofuSets) -> None:
        self.found: dict[Asked, TofuReading] = {}
        self._shelf, self._sets = JsonStore(folder), sets
        kept = self._shelf.get("readings") or {}
        for probe in self._asked():
            if (value := kept.get(_key(probe))) is not None:
                with contextlib.suppress(LookupError, TypeError):  # damaged: the question is asked again
                    self.found[probe] = _reading(value)

    def save(self) -> None:
        self._shelf.put("readings", {_key(probe): asdict(self.found[probe]) for probe in self._asked()})

    def _asked(self) -> Sequence[Asked]:
        return [probe for probes in self._sets.probes.values() for probe in probes]


def _key(probe: Asked) -> str:
    return digest(asdict(probe))[:24]


def _reading(value: Mapping[str, Any]) -> TofuReading:
    answer = Forced(tuple(value["answer"]["nll"]), tuple(value["answer"]["hits"]))
    fields = {**value, "tokens": tuple(value["tokens"]), "answer": answer, "wrong": tuple(value["wrong"])}
    return from_json(TofuReading, fields)


@dataclass(frozen=True)
class TofuSet(ForgetSet):
    """Holds TOFU's probes with the base model's readings of them."""

    sets: TofuSets
    readings: Mapping[Asked, TofuReading]
    settings: TofuSettings
    judges: Judges
    only: Mapping[str, MetricResult] | None

    def identity(self) -> dict[str, Any]:
        config, only = self.settings, None
        if self.only is not None:
            only = digest({"ratios": [dict(item) for item in self.only[RATIOS].value_by_index.values()]})
        return {
            "protocol": "tofu",
            **self.hashes(),
            "told": requests_hash(self.fewshot_pool),
            "probes": digest({name: [asdict(probe) for probe in probes] for name, probes in self.sets.probes.items()}),
            "reference": only,
            "asked": [config.max_new_tokens, config.encoder, config.classifier],
        }

    def score(self, edited: LoadedModel, *, progress: bool = False) -> Scores:
        after: dict[Asked, TofuReading] = {}
        drafts = {probe.question: reading.tokens for probe, reading in self.readings.items()}
        label = "after" if progress else None
        read(
            edited,
            self.sets,
            after,
            drafts=drafts,
            max_new_tokens=self.settings.max_new_tokens,
            how=edited.prompts,
            progress=label,
        )
        results = score(self.sets, after, retain_only=self.only, judges=self.judges)
        before = score(self.sets, self.readings, judges=Judges())
        measures = {name: results[name] for name in _names(results)}
        unknown = MetricResult("not measured", None, meaning="not measured")
        efficacy = next((m for name, m in measures.items() if name.startswith(EFFICACY)), unknown)
        kept = next((measures[n] for n in KEPT if n in measures), None) or next(
            (m for name, m in measures.items() if name.startswith(KEPT)), unknown
        )
        return Scores(efficacy, kept, measures, list(self._items(after, before, results)))

    def _items(
        self,
        after: Mapping[Asked, TofuReading],
        before: Mapping[str, MetricResult],
        results: Mapping[str, MetricResult],
    ) -> Sequence[dict[str, Any]]:
        items = []
        for name, probes in self.sets.probes.items():
            metric = f"{name}_generated_rouge_l_recall"
            for i, probe in enumerate(probes):
                then, now = (side[metric].value_by_index[str(i)]["rougeL_recall"] for side in (before, results))
                item: dict[str, Any] = {
                    "id": probe.id,
                    "kind": name,
                    "question": probe.question,
                    "answer": probe.answer,
                }
                item |= {
                    "before": self.readings[probe].text,
                    "after": after[probe].text,
                    "passed": None,
                    "counted": True,
                }
                item["note"] = "" if None in (then, now) else f"ROUGE-L {then:.2f} → {now:.2f}"
                items.append(item)
        return items


def _names(results: Mapping[str, MetricResult]) -> list[str]:
    """Lists the numbers to show: the summary numbers, then some metrics of the sets to forget and to keep."""
    summary = [name for start in SUMMARY for name in results if name.startswith(start)]
    sets = [
        name
        for part in ("forget", "forget_paraphrased", "retain")
        for metric in SHOWN
        for name in (f"{part}_generated_{metric}", f"{part}_teacher_forced_{metric}")
        if name in results
    ]
    return list(dict.fromkeys([*summary, *sets]))
