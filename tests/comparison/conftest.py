"""Methods that count how often they run, and a set that is scored by one weight of the model."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest

from editlib.comparison.config import PROTOCOLS, Config, parse_config
from editlib.comparison.method import Cost, Method, Prepared
from editlib.comparison.methods import METHODS
from editlib.comparison.run import compare
from editlib.errors import EditError
from editlib.evaluation.answer_cache import AnswerCache
from editlib.evaluation.forget_set import Benchmark, ForgetSet, Scores, SetSettings
from editlib.evaluation.metrics import MetricResult
from editlib.requests.request import EditRequest
from editlib.settings import Section, setting
from editlib.workbench import Workbench


def weight(model):
    """The weight that methods write and sets read."""
    return model.lm_head.weight.data[0, 0]


@dataclass(frozen=True, kw_only=True)
class Knobs(Section):
    strength: float | None = setting(None, "what is written")


class Forgets(Method):
    """Writes its `strength`. Runs are listed in `runs`; `fault` is raised where there is one."""

    Settings, family = Knobs, "closed form"
    strength = 1.0
    fault: BaseException | None = None

    def identity(self):
        return self.settings.to_dict()

    def forget(self, bench, task, seed, *, ready, found):
        self.runs.append((self.label, seed))
        if self.fault is not None:
            raise self.fault
        weight(bench.model).fill_(self.settings.strength or self.strength)
        return Cost(notes={"found": found})


class Half(Forgets):
    """Half of it, and what it searched for is kept."""

    strength = 0.5

    searches = True

    prepares = True

    def prepare(self, bench, task, seed):
        return Prepared(made="sieve", seconds={"sieve": 0.25})

    def search(self, bench, task, seed, folder, *, ready):
        assert ready == "sieve"
        self.looked.append(seed)
        weight(bench.model).fill_(9.0)  # the model comes anew afterwards
        return {"rate": 0.5, "trials": [{"seconds": 2.0}, {"seconds": 1.0}]}


class Breaks(Forgets):
    """Fails."""

    fault = EditError("no finite solution\nin any layer")


@dataclass(frozen=True, kw_only=True)
class WrittenSettings(SetSettings):
    facts: int = setting(3, "how many")


class Written(Benchmark):
    Settings, protocol, axes, kinds, to_forget = WrittenSettings, "written", ("gone", "kept"), {}, ()

    def make(self, base):
        facts = [EditRequest(id=f"f{i}", prompt=f"Fact {i}", answer="yes") for i in range(self.settings.facts)]
        return WrittenSet(base, facts, [], AnswerCache(base.bench.sha256, {}))


class WrittenSet(ForgetSet):
    def identity(self):
        return self.hashes()

    def score(self, edited, *, progress=False):
        value = float(weight(edited.anat.model))
        item = {"id": "f0", "kind": "request", "question": "Fact 0", "before": "yes", "after": str(value)}
        gone = MetricResult("gone", value, meaning="gone")
        return Scores(gone, MetricResult("kept", 1 - value, meaning="kept"), {"gone": gone}, [item])


class Bench:
    """`bench.compare(**changes)` runs the config with some keys changed."""

    def __init__(self, model, tok, tmp_path, kinds) -> None:
        self.model, self.tok, self.kinds = model, tok, kinds
        self.out, self.stats = tmp_path / "out", tmp_path / "stats"
        methods = ["none", "forgets", "half"]
        self.values = {"model": "m", "seeds": [0, 1], "perplexity": None, "sets": ["written"], "methods": methods}

    def config(self, **changes) -> Config:
        return parse_config({**self.values, **changes})

    def load(self, name: str) -> Workbench:
        return Workbench.of(copy.deepcopy(self.model), copy.deepcopy(self.tok), self.stats, name=name)

    def compare(self, config: Config | None = None, **changes):
        return compare(config or self.config(**changes), self.out, load=self.load, progress=False)

    def runs(self) -> list[tuple[str, int]]:
        """Since the last look."""
        found = [run for kind in self.kinds for run in kind.runs]
        for kind in self.kinds:
            kind.runs.clear()
        return sorted(found)


@pytest.fixture
def bench(tiny_llama_untied, tok, tmp_path, monkeypatch):
    weight(tiny_llama_untied).fill_(0.0)
    kinds = [type(kind.__name__, (kind,), {"runs": [], "looked": []}) for kind in (Forgets, Half, Breaks)]
    for kind in kinds:
        monkeypatch.setitem(METHODS, kind.__name__.lower(), kind)
    monkeypatch.setitem(PROTOCOLS, "written", Written)
    return Bench(tiny_llama_untied, tok, tmp_path, kinds)
