"""Ways to make a model forget, all of one shape: `METHODS` by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from editlib import jobs
from editlib.algorithms.edit import EditResult, Timer
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.unlearning_token import TokenHyperParams
from editlib.comparison.section import General, Section, chosen
from editlib.errors import ConfigError, HparamsError
from editlib.hparams import ALGORITHMS, HyperParams, UniEraseHyperParams, load_hparams
from editlib.hparams.checks import knob, quote
from editlib.request import EditRequest
from editlib.stats_store import spelling
from editlib.workbench import Workbench

REFUSAL = "I don't know."
AIMED = "->refusal"
FAMILIES = {
    "none": "unedited: the model as it was",
    "closed form": "closed form: an update that is solved for",
    "closed form, refusal": "closed form: an editor aimed at a refusal sentence",
    "fine-tuning": "gradient steps on the weights",
    "prompt": "no weight is changed: the prompt asks for refusals",
}


@dataclass(frozen=True)
class Task:
    """What a method is given: facts to forget, prompts to keep, and what the base answers to some of them (token ids by
    question), which saves generating it."""

    forget: Sequence[EditRequest]
    retain: Sequence[EditRequest]
    known_answers: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """What a method says of its own work. The comparison itself takes its time, its memory and the weights it changed.

    Args:
        update_bytes: what the change takes when it is stored by itself; `None`: the changed weights.
        prepared: seconds of what is made once a model and kept (statistics, a token), by name; not in the method's own.
        notes: other words and numbers worth showing, JSON-ready.
    """

    update_bytes: int | None = None
    prepared: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


class Method(ABC):
    """One way to forget, with its settings.

    A subclass says what its settings are, and changes a model in place. `search` and `prepare` come first, where a
    method needs them, and their time is counted apart.
    """

    Settings: ClassVar[type[Section]]
    family: ClassVar[str]
    seeded: ClassVar[bool] = True  # false: the same for every seed, and run for the first one alone

    def __init__(self, name: str, label: str, settings: Section, where: str, general: General) -> None:
        """Raises `EditlibError` for settings that cannot be used, whatever the model's weights are."""
        self.name, self.label, self.settings, self.where, self.general = name, label, settings, where, general

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All settings that decide what it does, JSON-ready."""

    def check(self, bench: Workbench, task: Task) -> None:  # noqa: B027
        """Raises `EditlibError` where this model or these requests are not for it; called before any long work."""

    def search(self, load: Callable[[], Workbench], task: Task, seed: int) -> dict[str, Any] | None:
        """The best settings and what was tried, JSON-ready; `None` for a method that has nothing to search.

        Args:
            load: gives the base model anew.
        """
        return None

    def prepare(self, bench: Workbench, seed: int) -> Any:
        """Finds or makes what is kept beside the model; one process at a time."""
        return None

    @abstractmethod
    def forget(self, bench: Workbench, task: Task, seed: int, *, ready: Any, found: Mapping[str, Any] | None) -> Cost:
        """Changes `bench.model` (and `bench.tok`) in place.

        Args:
            ready: what `prepare` gave.
            found: what `search` gave, now or in an earlier run.
        """


@dataclass(frozen=True, kw_only=True)
class NoSettings(Section):
    """For a method that has none."""


@dataclass(frozen=True, kw_only=True)
class EditSettings(Section):
    """Where an algorithm's hyper-parameters come from."""

    hparams: str | None = knob(None, "a JSON file or a bundled name; none: those bundled for the model")
    settings: dict = knob(dict, "single hyper-parameters in place of those")


class Unedited(Method):
    """The model as it is: where every other method starts from."""

    Settings, family, seeded = NoSettings, "none", False

    def identity(self) -> dict[str, Any]:
        return {}

    def forget(self, bench: Workbench, task: Task, seed: int, *, ready: Any, found: Mapping[str, Any] | None) -> Cost:
        return Cost(update_bytes=0)


class ClosedForm(Method):
    """An algorithm of `editlib.hparams.ALGORITHMS`: UniErase, or an editor aimed at a refusal sentence."""

    Settings = EditSettings
    settings: EditSettings

    def __init__(self, name: str, label: str, settings: Section, where: str, general: General) -> None:
        super().__init__(name, label, settings, where, general)
        algorithm = name.removesuffix(AIMED)
        try:
            found = load_hparams(self.settings.hparams or spelling(general.model), algorithm)
            self.hparams: HyperParams = type(found).from_dict({**found.to_dict(), **self.settings.settings}, "settings")
        except HparamsError as error:
            raise ConfigError(f"{where}: {error}") from None
        self.unlearns = isinstance(self.hparams, UniEraseHyperParams)
        self.family = "closed form" if self.unlearns else "closed form, refusal"
        if algorithm == "FT":
            self.family = "fine-tuning"

    def identity(self) -> dict[str, Any]:
        values = {key: value for key, value in self.hparams.to_dict().items() if key not in ("notes", "model_name")}
        found: dict[str, Any] = {"hparams": values}
        if jobs.needs_statistics(self.hparams):
            found["statistics"] = [self.general.corpus, self.general.stats_tokens]
        if not self.unlearns:
            found["target"] = REFUSAL
        return found

    def check(self, bench: Workbench, task: Task) -> None:
        jobs.check_settings(bench, self.hparams)
        jobs.check_wanted(self._wanted(task), self.hparams)

    def prepare(self, bench: Workbench, seed: int) -> tuple[jobs.Means, dict[str, float]]:
        timer = Timer()
        path = None
        if self.unlearns and seed:  # the token is random, too: one for each seed, and the usual one for seed 0
            path = bench.token_path.with_name(f"{bench.token_path.stem}-{seed}.safetensors")
            with timer("token"):
                if not path.exists():
                    bench.make_token(hparams=TokenHyperParams(seed=seed), path=path)
        made_from = {"corpus": self.general.corpus, "stats_tokens": self.general.stats_tokens}
        means = jobs.gather(bench, self.hparams, token=path, timer=timer, **made_from)
        return means, timer.seconds

    def forget(self, bench: Workbench, task: Task, seed: int, *, ready: Any, found: Mapping[str, Any] | None) -> Cost:
        means, prepared = ready
        given: dict[str, Any] = {"chat": None, "seed": seed}
        if self.unlearns:
            given |= {"retain": task.retain, "known_answers": task.known_answers}
        result = jobs.apply(bench, self._wanted(task), self.hparams, means, **given)
        notes = {"layers": list(self.hparams.layers), **({"anchors": len(result.anchors)} if self.unlearns else {})}
        rows = 0 if means.token is None else _bytes(means.token.row_in) + _bytes(means.token.row_out)
        return Cost(update_size(result) + rows, prepared, notes)

    def _wanted(self, task: Task) -> list[EditRequest]:
        if self.unlearns:
            return list(task.forget)
        return [replace(request, target_new=REFUSAL) for request in task.forget]


def update_size(result: EditResult) -> int:
    """Bytes of an edit's factors, or of the matrix where that is smaller, in the dtype of the weights."""
    total = 0
    for layer, delta in result.deltas.items():
        numbers = min(delta.left.numel() + delta.right.numel(), _dense(delta))
        total += numbers * result.originals[layer].element_size()
    return total


def _dense(delta: LowRank) -> int:
    return delta.shape[0] * delta.shape[1]


def _bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()


METHODS: dict[str, type[Method]] = {
    "none": Unedited,
    "UniErase": ClosedForm,
    **{f"{name}{AIMED}": ClosedForm for name in ALGORITHMS if name != "UniErase"},
}
"""Every method by the name that a config gives it."""


def read_method(value: Any, where: str, general: General) -> Method:
    """A method from its name, or from an object with "method", maybe "label", and its settings.

    Raises:
        ConfigError: no such method, or settings that it does not have.
        EditlibError: settings that cannot be used.
    """
    value = {"method": value} if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise ConfigError(f'{where}: {quote(value)}; expected a name, or an object with "method"; write one of them')
    name, label = value.get("method"), value.get("label")
    kind = chosen(name, METHODS, "method", where)
    if label is not None and not (isinstance(label, str) and label.strip()):
        raise ConfigError(f'{where}: key "label": {quote(label)}; expected some text; write it or take it out')
    rest = {key: given for key, given in value.items() if key not in ("method", "label")}
    return kind(name, label or name, kind.Settings.read(rest, where), where, general)
