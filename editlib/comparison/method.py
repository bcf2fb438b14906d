"""Define the interface of a method: its settings, shared preparation, a search, and the edit of a model in place."""

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
    dtype: str | None = setting(None, "dtype of the model; none: as stored", choices=(*DTYPES, None))
    device_map: str | None = setting(
        None, "auto, or a device; none: the CPU, or under torchrun one accelerator per process"
    )
    stats_dir: str = setting("stats", "folder of statistics, tokens and a model's own answers")
    corpus: str = setting("wiki-sample", "text for missing statistics")
    stats_tokens: int = setting(100_000, "tokens of missing statistics", min=1)
    seeds: list[int] = setting(lambda: [0], "every method runs once per seed", min=0)
    perplexity: str | None = setting("wiki-sample:heldout", "text for perplexity; none: not measured")


@dataclass(frozen=True)
class Cost:
    """Holds the cost that a method reports itself. The comparison measures its time, memory and changed weights.

    Args:
        update_bytes: size of the stored update; `None`: that of the changed weights.
        notes: further texts and numbers for the report, JSON-ready.
    """

    update_bytes: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """Holds the results of `Method.prepare`, and the `seconds` that it took by name (statistics, a token, ...)."""

    made: Any = None
    seconds: Mapping[str, float] = field(default_factory=dict)


class Method(ABC):
    """Makes a model forget in one way; the base class of all methods.

    A subclass defines its settings and edits a model in place. `prepare` and `search` run before, if a method needs
    them, and their time is measured separately.
    """

    Settings: ClassVar[type[Section]]
    family: str
    seeded: bool = True  # false: the result is the same for every seed, so it runs only once

    def __init__(self, name: str, label: str, settings: Section, where: str, general: General) -> None:
        """Raises `EditlibError` for settings that cannot be used with any weights."""
        self.name, self.label, self.settings, self.where, self.general = name, label, settings, where, general

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Returns all settings that determine the method's result, JSON-ready."""

    def fit(self, bench: Workbench) -> None:  # noqa: B027
        """Adopts the settings that depend on the loaded base model; called before anything else."""

    def check_draft(self, draft: Workbench, task: Task | None) -> None:  # noqa: B027
        """Raises `EditlibError` for faults that need no weights: `draft`'s model is on the meta device. `task` is
        `None` if the base model decides which facts are to be forgotten."""

    def check(self, bench: Workbench, task: Task) -> None:  # noqa: B027
        """Raises `EditlibError` if the method cannot handle the model or the requests; called before long work."""

    @property
    def stored_name(self) -> str:
        """The name under which finished cells are stored, which later versions keep."""
        return self.name

    @property
    def searches(self) -> bool:
        """Whether `search` runs before `forget`."""
        return False

    @property
    def prepares(self) -> bool:
        """Whether `prepare` has work to do."""
        return False

    def search(self, bench: Workbench, task: Task, seed: int, folder: Path, *, ready: Any) -> dict[str, Any]:
        """Returns the best settings (`best`) and all trials, JSON-ready; runs once per set, for all seeds.

        By default there is nothing to search for.

        Args:
            bench: the base model; it is loaded again afterwards.
            ready: the result of `prepare`.
            folder: keeps the trials of an interrupted search.
        """
        return {"best": {}, "trials": []}

    def prepare(self, bench: Workbench, task: Task, seed: int) -> Prepared:
        """Finds, or computes and stores, inputs that a model needs once (statistics, a token); one process at a
        time."""
        return Prepared()

    @abstractmethod
    def forget(self, bench: Workbench, task: Task, seed: int, *, ready: Any, found: Mapping[str, Any] | None) -> Cost:
        """Changes `bench.model` (and `bench.tok`) in place.

        Args:
            ready: the result of `prepare`.
            found: the result of `search`, from now or an earlier run; `None` without one.
        """
