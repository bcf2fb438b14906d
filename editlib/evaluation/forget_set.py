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
    """Holds the scores of a model on a set.

    Args:
        forget, retain: the two axes of the plane, 0..1, higher is better.
        measures: all measured numbers, in the order in which they are shown.
        items: one object per question: `id`, `kind`, `question`, `answer`, `before`, `after`, `passed` (`None`: no
            verdict), `counted`, and `note` (some words, or none).
    """

    forget: MetricResult
    retain: MetricResult
    measures: Mapping[str, MetricResult]
    items: Sequence[Mapping[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Returns the scores JSON-ready, each number as `MetricResult.summary`."""
        return {
            "forget": self.forget.summary(),
            "retain": self.retain.summary(),
            "measures": {name: result.summary() for name, result in self.measures.items()},
            "items": [dict(item) for item in self.items],
        }


@dataclass(frozen=True)
class Task:
    """Holds the inputs of a method: facts to forget, prompts to keep, and the base model's answers to some of them
    (token ids by question), which UniErase then need not generate."""

    forget: Sequence[EditRequest]
    retain: Sequence[EditRequest]
    known_answers: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def all(self) -> list[EditRequest]:
        """Everything that a model will be asked: the facts to forget, then the prompts to keep."""
        return [*self.forget, *self.retain]


class Base(NamedTuple):
    """Holds the model before any method, with everything computed once for it."""

    bench: Workbench
    folder: Path  # where the set keeps its own files

    @property
    def loaded(self) -> LoadedModel:
        """The model with its tokenizer and prompt settings, the input of attacks and scores."""
        return self.bench.loaded


@dataclass(frozen=True)
class ForgetSet(ABC):
    """Holds a set made for one base model, and scores edited models on it.

    Args:
        forget: the facts that every method is to forget.
        retain: prompts that a method may use as constraints or for training; never scored.
        before: the base model's answers, completed as they are needed.
        fewshot_pool: facts that an attack may use as few-shot examples, with their answers.
    """

    base: Base
    forget: Sequence[EditRequest]
    retain: Sequence[EditRequest]
    before: AnswerCache
    fewshot_pool: Sequence[EditRequest] = field(default=(), kw_only=True)

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Returns hashes of everything that determines the scores, JSON-ready."""

    @abstractmethod
    def score(self, edited: LoadedModel, *, progress: bool = False) -> Scores:
        """Scores a model on the set; the base's answers are taken from `before`."""

    @property
    def task(self) -> Task:
        """The inputs of a method: the facts to forget and the prompts to keep."""
        return Task(self.forget, self.retain, self.before.answers)

    def hashes(self) -> dict[str, str]:
        """Computes the SHA-256 (hex) of the model's weights and of the inputs of methods."""
        return {
            "model": self.base.bench.sha256,
            "forget": requests_hash(self.forget),
            "retain": requests_hash(self.retain),
        }


class Benchmark(ABC):
    """Defines a benchmark of `editlib compare`: its settings, checked before a model is loaded, and how its sets are
    made."""

    Settings: ClassVar[type[SetSettings]]
    protocol: ClassVar[str]
    axes: ClassVar[tuple[str, str]]
    """The names of the plane's axes: forgetting, keeping."""
    kinds: ClassVar[Mapping[str, str]]
    """Kinds of items in words."""
    to_forget: ClassVar[tuple[str, ...]]
    """The kinds of items that ask for a fact to be forgotten."""

    def __init__(
        self, settings: SetSettings, where: str, *, model: str, dtype: str | None = None, device_map: str | None = None
    ) -> None:
        """Reads the files that `settings` name.

        Args:
            where: the place of the settings in error messages.
            model: the model to edit, unless `settings` name another.
            dtype, device_map: how models are loaded.

        Raises:
            EditlibError: a file cannot be used.
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
        """The inputs of methods, as far as files determine them; `None` if the base model does."""
        return None

    @property
    def reference(self) -> str | None:
        """Another model that the scores need; `None` if there is none, or its results are given."""
        return None

    @abstractmethod
    def make(self, base: Base) -> ForgetSet:
        """Makes the set for a base model; the base's answers are kept in its folder and reused.

        Raises:
            EditlibError: the model knows too few of the facts, or does not belong to this set.
        """


@dataclass(frozen=True, kw_only=True)
class SetSettings(Section):
    """Holds the keys of every set."""

    name: str | None = setting(None, "its name in the results; none: its protocol")
    model: str | None = setting(None, "the model that is to forget, where it is another than the config's")
