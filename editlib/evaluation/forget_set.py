"""Define a forget set: questions to forget and to keep, and the scores of an edited model on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from editlib.evaluation.answer_cache import AnswerCache
from editlib.evaluation.metrics import MetricResult
from editlib.models.loaded import LoadedModel
from editlib.requests.reading import requests_hash
from editlib.requests.request import EditRequest
from editlib.settings import Section, setting
from editlib.workbench import Workbench


@dataclass(frozen=True)
class Scores:
    """Scores of a model on a set.

    Args:
        forget, retain: the two axes of the plane, 0..1, higher is better.
        measures: all that was measured, in the order to show it.
        items: one object per question: `id`, `kind`, `question`, `answer`, `before`, `after`, `passed` (`None`: no
            verdict), `counted`, and `note` (some words, or none).
    """

    forget: MetricResult
    retain: MetricResult
    measures: Mapping[str, MetricResult]
    items: Sequence[Mapping[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Gives the scores JSON-ready, each number as `MetricResult.summary` tells it."""
        return {
            "forget": self.forget.summary(),
            "retain": self.retain.summary(),
            "measures": {name: result.summary() for name, result in self.measures.items()},
            "items": [dict(item) for item in self.items],
        }


@dataclass(frozen=True)
class Task:
    """Holds what a method is given: facts to forget, prompts to keep, and what the base answers to some of them (token
    ids by question), which saves UniErase generating it."""

    forget: Sequence[EditRequest]
    retain: Sequence[EditRequest]
    known_answers: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def all(self) -> list[EditRequest]:
        """Everything that a model will be asked: the facts to forget, then the prompts to keep."""
        return [*self.forget, *self.retain]


class Base(NamedTuple):
    """Holds the model before any method, with what is computed once for it."""

    bench: Workbench
    folder: Path  # where the set keeps files of its own

    @property
    def loaded(self) -> LoadedModel:
        """The model with its tokenizer and prompt settings, as attacks and scores take it."""
        return self.bench.loaded


@dataclass(frozen=True)
class ForgetSet(ABC):
    """Holds a set made for one base model, and scores edited models on it.

    Args:
        forget: what every method is to forget.
        retain: what a method may hold or train on; never scored.
        before: the base model's answers, completed as they are needed.
        fewshot_pool: facts that an attack may put before a question, with their answers.
    """

    base: Base
    forget: Sequence[EditRequest]
    retain: Sequence[EditRequest]
    before: AnswerCache
    fewshot_pool: Sequence[EditRequest] = field(default=(), kw_only=True)

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Gives hashes of all that decides the scores, JSON-ready."""

    @abstractmethod
    def score(self, edited: LoadedModel, *, progress: bool = False) -> Scores:
        """Scores a model on the set; the base's answers are taken from `before`."""

    @property
    def task(self) -> Task:
        """The facts to forget and the prompts to keep that a method is given."""
        return Task(self.forget, self.retain, self.before.answers)

    def hashes(self) -> dict[str, str]:
        """Computes the SHA-256 (hex) of the model's weights and of what methods are given."""
        return {
            "model": self.base.bench.sha256,
            "forget": requests_hash(self.forget),
            "retain": requests_hash(self.retain),
        }


class Benchmark(ABC):
    """Defines a benchmark of `editlib compare`: its settings, checked before a model is loaded, and the making of its
    sets."""

    Settings: ClassVar[type[SetSettings]]
    protocol: ClassVar[str]
    axes: ClassVar[tuple[str, str]]
    """The names of the plane's axes: forgetting, keeping."""
    kinds: ClassVar[Mapping[str, str]]
    """Kinds of items in words."""
    to_forget: ClassVar[tuple[str, ...]]
    """The kinds that ask for what is to be forgotten."""

    def __init__(
        self, settings: SetSettings, where: str, *, model: str, dtype: str | None = None, device_map: str | None = None
    ) -> None:
        """Reads the files that `settings` name.

        Args:
            where: what errors call the place that the settings come from.
            model: the model that is to forget, unless `settings` name another.
            dtype, device_map: how models are loaded.

        Raises:
            EditlibError: one cannot be used.
        """
        self.settings, self.where = settings, where
        self.model = settings.model or model
        self.dtype, self.device_map = dtype, device_map
        self.left_out: dict[str, list[str]] = {}  # rows of its files that could not be used, for the results

    @property
    def name(self) -> str:
        return self.settings.name or self.protocol

    @property
    def planned(self) -> Task | None:
        """What methods will be given, as far as files say it; `None` where the base model decides it."""
        return None

    @property
    def reference(self) -> str | None:
        """A further model that the scores need; `None` where there is none, or its results are given."""
        return None

    @abstractmethod
    def make(self, base: Base) -> ForgetSet:
        """Makes the set for a base model; the base's answers are kept in its folder and read again next time.

        Raises:
            EditlibError: the model does not know enough, or is not for this set.
        """


@dataclass(frozen=True, kw_only=True)
class SetSettings(Section):
    """Holds the keys of every set."""

    name: str | None = setting(None, "what it is called in the results; none: its protocol")
    model: str | None = setting(None, "the model that is to forget, where it is another than the config's")
