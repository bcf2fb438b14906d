"""Evaluate methods on one set and its base model; measurements shared by all methods are made once."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from editlib import data
from editlib.ability import run_ability
from editlib.attacks.asking import AttackContext
from editlib.attacks.control import bundled_control, usable
from editlib.attacks.outcome import AttackResult, Trial
from editlib.attacks.registry import ATTACKS, choose
from editlib.comparison.config import AttackPlan, Config
from editlib.comparison.store import try_lock
from editlib.evaluation.forget_set import Base, ForgetSet
from editlib.evaluation.perplexity import WINDOW, WINDOWS, text_windows
from editlib.models.generation import perplexity
from editlib.models.weights import save_model
from editlib.requests.reading import requests_hash
from editlib.requests.request import EditRequest
from editlib.shelf import JsonStore, digest
from editlib.stats.corpus import load_corpus
from editlib.workbench import Workbench


@dataclass(frozen=True)
class Measurement:
    """Describes a measurement of an edited model; `key` names its file and changes with everything that determines
    it."""

    name: str
    key: str
    measure: Callable[[Workbench], dict[str, Any]]


class SetEvaluator:
    """Measures methods on a `ForgetSet`. The base's answers are generated once and stored on `shelf`."""

    def __init__(self, config: Config, name: str, made: ForgetSet, shelf: JsonStore, *, progress: bool) -> None:
        self.config, self.name, self.set, self.shelf, self.progress = config, name, made, shelf, progress
        self.identity = made.identity()

    @property
    def base(self) -> Base:
        return self.set.base

    def parts(self) -> Iterator[Measurement]:
        """Yields the measurements of every method, in this order."""
        yield Measurement("scores", "scores", self._scores)
        if self.config.general.perplexity is not None:
            yield Measurement("perplexity", self._perplexity_key, self._perplexity)
        plan = self.config.attacks
        if plan is not None and self.attacked:
            for name in choose(plan.names):
                yield Measurement(f"attack {name}", self._attack_key(name, plan), self._attack(name))
        tasks = self.config.ability
        if tasks is not None:
            for name in tasks.tasks:
                key = f"ability-{self._short([name, _content(name), tasks.limit, tasks.seed])}"
                yield Measurement(f"ability {name}", key, partial(self._ability, name))

    def _scores(self, bench: Workbench) -> dict[str, Any]:
        return self.set.score(bench.loaded, progress=self.progress).to_dict()

    # --- ability -----------------------------------------------------------------------------------------------

    def _ability(self, task: str, bench: Workbench) -> dict[str, Any]:
        """Runs one task of lm-eval on the edited model and the base; the edited model is saved for it, and removed
        afterwards."""
        plan, root = self.config.ability, self.shelf.path.parent.parent
        how: dict[str, Any] = {
            "text": None,
            "limit": plan and plan.limit,
            "seed": plan and plan.seed,
            "dtype": self.config.general.dtype,
            "device_map": self.config.general.device_map,
        }
        base = {"base": self.base.bench.name}
        with try_lock(self.shelf, wait=True):  # the base is measured by one process
            run_ability(base, [task], out=root / "ability", **how)
        with TemporaryDirectory(dir=root, prefix=".edited-") as folder:
            save_model(bench.model, bench.tok, Path(folder))
            report = run_ability({**base, "edited": folder}, [task], out=root / "ability", **how)
        before = {(row.task, row.metric): row.value for row in report.rows if row.model == "base"}
        rows = [
            asdict(row) | {"base": before.get((row.task, row.metric))} for row in report.rows if row.model == "edited"
        ]
        return {"rows": rows}

    # --- perplexity --------------------------------------------------------------------------------------------

    @cached_property
    def _text(self) -> Any:
        return load_corpus(self.config.general.perplexity or "")

    @property
    def _perplexity_key(self) -> str:
        return f"perplexity-{self._short([self._text.sha256, WINDOW, WINDOWS])}"

    @cached_property
    def _windows(self) -> list[list[int]]:
        return text_windows(self.base.bench.tok, self._text.documents)

    def _perplexity(self, bench: Workbench) -> dict[str, Any]:
        key = self._perplexity_key
        with try_lock(self.shelf, wait=True):
            before = self.shelf.get(key)
            if before is None:
                before = {"perplexity": perplexity(self.base.bench.anat, self._windows)}
                self.shelf.put(key, before)
        after = perplexity(bench.anat, self._windows)
        return {"before": before["perplexity"], "after": after, "ratio": after / before["perplexity"]}

    # --- attacks -----------------------------------------------------------------------------------------------

    @cached_property
    def attacked(self) -> list[EditRequest]:
        """The forgotten facts to attack: those whose leaking can be detected, or a sample of them."""
        plan = self.config.attacks or AttackPlan()
        facts, _ = usable(self.set.forget)
        if plan.facts is None or plan.facts >= len(facts):
            return facts
        drawn = set(random.Random(plan.seed).sample(range(len(facts)), plan.facts))
        return [fact for number, fact in enumerate(facts) if number in drawn]

    @cached_property
    def _context(self) -> AttackContext:
        plan, forget = self.config.attacks or AttackPlan(), self.set.forget
        unrelated = data.without_overlap(data.general("anchor") + data.general("test"), forget)
        facts, _ = usable(forget)
        return AttackContext(self.base.loaded, facts, self.set.fewshot_pool, unrelated, plan.how, plan.seed)

    @cached_property
    def _control(self) -> list[EditRequest]:
        """Facts that the base does not know: any that seem to leak do so by chance."""
        plan = self.config.attacks or AttackPlan()
        key = f"control-{self._short([requests_hash(self.attacked), plan.seed, plan.how.max_new_tokens])}"
        with try_lock(self.shelf, wait=True):
            kept = self.shelf.get(key)
            by_id = {fact.id: fact for fact in data.facts()}
            if kept is None or not by_id.keys() >= set(kept["ids"]):
                kept = {"ids": [fact.id for fact in bundled_control(self.base.loaded, self.attacked, self._context)]}
                self.shelf.put(key, kept)
        return [by_id[name] for name in kept["ids"]]

    def _attack_key(self, name: str, plan: AttackPlan) -> str:
        parts = [requests_hash(self.attacked), requests_hash(self.set.fewshot_pool), plan.seed, plan.how.to_dict()]
        return f"attack-{name}-{self._short(parts)}"

    def _attack(self, name: str) -> Callable[[Workbench], dict[str, Any]]:
        def measure(bench: Workbench) -> dict[str, Any]:
            begun, count = time.perf_counter(), len(self.attacked)
            facts = [*self.attacked, *self._control]
            outcome = ATTACKS[name].run(bench.loaded, facts, self._context)
            trials = {"edited": outcome.trials[:count], "base": self._base(name), "control": outcome.trials[count:]}
            meaning, seconds = ATTACKS[name].meaning, time.perf_counter() - begun
            how = {"resamples": self._context.settings.resamples, "seed": self._context.seed}
            return AttackResult.of(name, meaning, trials, {"edited": outcome.notes}, seconds, **how).to_dict()

        return measure

    def _base(self, name: str) -> tuple[Trial, ...]:
        """Returns the attack's trials on the base model; the same for every method."""
        key = self._attack_key(name, self.config.attacks or AttackPlan())
        with try_lock(self.shelf, wait=True):
            kept = self.shelf.get(key)
            if kept is None:
                outcome = ATTACKS[name].run(self.base.loaded, self.attacked, self._context)
                kept = {"trials": [asdict(trial) for trial in outcome.trials]}
                self.shelf.put(key, kept)
        return tuple(Trial.from_dict(trial) for trial in kept["trials"])

    @staticmethod
    def _short(value: Sequence[Any] | Mapping[str, Any]) -> str:
        return digest(value)[:12]


def _content(task: str) -> str:
    """Returns the hash of a task's file; "" for a name of lm-eval's."""
    path = Path(task)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
