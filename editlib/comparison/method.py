"""Define a method: settings that decide it, work that is shared, a search, and a change of a model in place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from editlib.evaluation.forget_set import Task
from editlib.models.loading import DTYPES
from editlib.settings import Section, setting
from editlib.workbench import Workbench

FAMILIES = {
    "none": "unedited: the model as it was",
    "closed form": "closed form: an update that is solved for",
    "closed form, refusal": "closed form: an editor aimed at a refusal sentence",
    "fine-tuning": "gradient steps on the weights",
    "prompt": "no weight is changed: the prompt asks for refusals",
}


@dataclass(frozen=True, kw_only=True)
class General(Section):
    """Holds the single values of a config."""

    model: str = setting(help="a packaged model, a local folder or a Hugging Face id")
    dtype: str | None = setting(None, "what the model is loaded in; none: as stored", choices=(*DTYPES, None))
    device_map: str | None = setting(None, "auto, or a device; none: the CPU, under torchrun an accelerator each")
    stats_dir: str = setting("stats", "where statistics, tokens and a model's own answers are kept")
    corpus: str = setting("wiki-sample", "what missing statistics are made from")
    stats_tokens: int = setting(100_000, "tokens that they are made from", min=1)
    seeds: list[int] = setting(lambda: [0], "one run of every method for each", min=0)
    perplexity: str | None = setting("wiki-sample:heldout", "text whose perplexity is taken; none: not taken")


@dataclass(frozen=True)
class Cost:
    """Holds what a method says of its own work. The comparison itself takes its time, its memory and the weights it
    changed.

    Args:
        update_bytes: what the change takes when it is stored by itself; `None`: the changed weights.
        notes: other words and numbers worth showing, JSON-ready.
    """

    update_bytes: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """Holds what `Method.prepare` found or made, and the `seconds` that making it took by name (statistics, a token,
    ...)."""

    made: Any = None
    seconds: Mapping[str, float] = field(default_factory=dict)


class Method(ABC):
    """Forgets in one way, with its settings.

    A subclass says what its settings are, and changes a model in place. `search` and `prepare` come first, where a
    method needs them, and their time is counted apart.
    """

    Settings: ClassVar[type[Section]]
    family: str
    seeded: bool = True  # false: the same for every seed, and run for the first one alone

    def __init__(self, name: str, label: str, settings: Section, where: str, general: General) -> None:
        """Raises `EditlibError` for settings that cannot be used, whatever the model's weights are."""
        self.name, self.label, self.settings, self.where, self.general = name, label, settings, where, general

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Returns all settings that decide what it does, JSON-ready."""

    def fit(self, bench: Workbench) -> None:  # noqa: B027
        """Adopts what the loaded base model determines of the settings; called before anything else."""

    def check_draft(self, draft: Workbench, task: Task | None) -> None:  # noqa: B027
        """Raises `EditlibError` for what can be known without weights: `draft`'s model is on the meta device. `task` is
        `None` where the base model decides what is to be forgotten."""

    def check(self, bench: Workbench, task: Task) -> None:  # noqa: B027
        """Raises `EditlibError` where the method cannot serve the model or the requests; called before long work."""

    @property
    def stored_name(self) -> str:
        """The name that finished cells are found by: the one of the version that kept the first of them."""
        return self.name

    @property
    def searches(self) -> bool:
        """Whether `search` comes before `forget`."""
        return False

    @property
    def prepares(self) -> bool:
        """Whether `prepare` has anything to do."""
        return False

    def search(self, bench: Workbench, task: Task, seed: int, folder: Path, *, ready: Any) -> dict[str, Any]:
        """Returns the best settings (`best`) and what was tried, JSON-ready: once a set, for all seeds.

        Args:
            bench: the base model; it is loaded again afterwards.
            ready: what `prepare` made.
            folder: keeps what is done of a search that is stopped.
        """
        raise NotImplementedError

    def prepare(self, bench: Workbench, task: Task, seed: int) -> Prepared:
        """Finds, or computes and keeps, what a model needs once (statistics, a token); one process at a time."""
        return Prepared()

    @abstractmethod
    def forget(self, bench: Workbench, task: Task, seed: int, *, ready: Any, found: Mapping[str, Any] | None) -> Cost:
        """Changes `bench.model` (and `bench.tok`) in place.

        Args:
            ready: what `prepare` made.
            found: what `search` gave, now or in an earlier run; `None` without one.
        """
