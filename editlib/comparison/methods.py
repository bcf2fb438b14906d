"""Make a model forget in one of several ways, all with one interface: `METHODS` by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from editlib import editing
from editlib.algorithms.edit import EditResult, Timer
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.unierase.token_learning import TokenHyperParams
from editlib.baselines import BASELINES, BaselineSettings, Budget, SearchResult, apply_baseline_to_model, search, split
from editlib.baselines.apply import check_baseline
from editlib.baselines.data import OWN_TOKENS, generate_own_answers
from editlib.baselines.refusal_edit import REFUSAL
from editlib.baselines.search import check_range
from editlib.comparison.method import Cost, General, Method, Prepared
from editlib.errors import ConfigError, HparamsError, nearest, quote
from editlib.evaluation.forget_set import Task
from editlib.finding import find_settings, fit_settings, is_derived
from editlib.hparams import ALGORITHMS, HyperParams, ModelShape, derive
from editlib.hparams.derive import DESCENT
from editlib.models.generation import end_tokens
from editlib.models.prompt_settings import PromptSettings
from editlib.models.prompts import PromptFormat
from editlib.requests.request import EditRequest
from editlib.settings import Section, chosen, setting
from editlib.shelf import JsonStore, digest
from editlib.stats.store import model_slug
from editlib.workbench import Workbench

T = TypeVar("T")
AIMED = "-refusal"
AIMED_BEFORE = "->refusal"  # older configs and stored cells have this name
OWN_ANSWERS = "own-answers"


@dataclass(frozen=True, kw_only=True)
class NoSettings(Section):
    """Holds the settings of a method that has none."""


@dataclass(frozen=True, kw_only=True)
class EditSettings(Section):
    """Holds where an algorithm's hyper-parameters come from."""

    hparams: str | None = setting(None, "a JSON file or a bundled name; none: found for the model")
    settings: dict = setting(dict, "single hyper-parameters that replace those")
    search: bool | dict = setting(False, "first search for `v_lr` and `v_num_grad_steps`: true, or keys of `Budget`")


class Unedited(Method):
    """Leaves the model unedited, as a reference for all other methods."""

    Settings, family, seeded = NoSettings, "none", False

    def identity(self) -> dict[str, Any]:
        return {}

    def forget(self, bench: Workbench, task: Task, seed: int, *, ready: Any, found: Mapping[str, Any] | None) -> Cost:
        return Cost(update_bytes=0)


class ClosedForm(Method):
    """Applies an algorithm of `editlib.hparams.ALGORITHMS`: UniErase, or an editor aimed at a refusal sentence."""

    Settings = EditSettings
    settings: EditSettings

    def __init__(self, name: str, label: str, settings: Section, where: str, general: General) -> None:
        super().__init__(name, label, settings, where, general)
        algorithm = name.removesuffix(AIMED)
        try:
            self._found = find_settings(general.model, algorithm, self.settings.hparams)
            self.hparams = self._changed(self._found)
        except HparamsError as error:
            raise ConfigError(f"{where}: {error}") from None
        self.unlearns = not self.hparams.has_target
        self.family = "closed form" if self.unlearns else "closed form, refusal"
        if not self.hparams.chainable:
            self.family = "fine-tuning"
        self.tuned = f"{algorithm}{AIMED}"
        self.budget = _budget(self.settings.search, self.tuned, where)
        if self.budget is not None and (self.tuned not in BASELINES or self.settings.settings):
            raise ConfigError(
                f'{where}: "search" is for ROME, MEMIT and AlphaEdit aimed at a refusal, with "hparams" and no single '
                '"settings"; remove one of the two'
            )

    def _changed(self, found: HyperParams) -> HyperParams:
        """Returns the settings, with single keys replaced by those of the config."""
        return type(found).from_dict({**found.to_dict(), **self.settings.settings}, "settings")

    def fit(self, bench: Workbench) -> None:
        self.hparams = self._changed(fit_settings(bench, self._found))

    @property
    def stored_name(self) -> str:
        return self.name if self.unlearns else self.name.removesuffix(AIMED) + AIMED_BEFORE

    @property
    def searches(self) -> bool:
        return self.budget is not None

    @property
    def prepares(self) -> bool:
        return True

    def search(self, bench: Workbench, task: Task, seed: int, folder: Path, *, ready: Any) -> dict[str, Any]:
        given = BaselineSettings(hparams=self.settings.hparams, stats_dir=bench.stats_dir, corpus=self.general.corpus)
        return _searched(self.tuned, bench, task, given, self.budget, seed, folder)

    def identity(self) -> dict[str, Any]:
        values = {key: value for key, value in self.hparams.to_dict().items() if key not in ("notes", "model_name")}
        decisive: dict[str, Any] = {"hparams": values}
        if self.hparams.uses_statistics:
            decisive["statistics"] = [self.general.corpus, self.general.stats_tokens]
        if not self.unlearns:
            decisive["target"] = REFUSAL
        return {**decisive, **_searching(self.budget, self.general)}

    def check_draft(self, draft: Workbench, task: Task | None) -> None:
        wanted, kept = ([], ()) if task is None else (self._wanted(task), task.retain)
        shape, hparams = ModelShape.of(draft.model.config, draft.name), self.hparams
        if is_derived(self._found):  # derived for the config's model, but a set may have another one
            values = getattr(self._found, "values", DESCENT)
            hparams = self._changed(derive(self._found.algorithm, shape, values=values))
        hparams.check_depth(shape.n_layers)
        editing.check_draft(draft, wanted, hparams, kept=kept)
        if task is not None:
            editing.check_wanted(wanted, hparams)

    def check(self, bench: Workbench, task: Task) -> None:
        editing.check_settings(bench, self.hparams)
        editing.check_wanted(self._wanted(task), self.hparams)

    def prepare(self, bench: Workbench, task: Task, seed: int) -> Prepared:
        timer = Timer()
        path = None
        if self.unlearns and seed:  # the token is random too: one for each seed, and the usual one for seed 0
            path = bench.token_path.with_name(f"{bench.token_path.stem}-{seed}.safetensors")
            with timer("token"):
                if not path.exists():
                    bench.make_token(hparams=TokenHyperParams(seed=seed), path=path)
        means = editing.load_inputs(
            bench,
            self.hparams,
            token=path,
            timer=timer,
            corpus=self.general.corpus,
            stats_tokens=self.general.stats_tokens,
        )
        return Prepared(means, timer.seconds)

    def forget(self, bench: Workbench, task: Task, seed: int, *, ready: Any, found: Mapping[str, Any] | None) -> Cost:
        means: editing.EditInputs = ready
        hparams, best = self.hparams, (found or {}).get("best", {})
        if found is not None:
            chosen = {"v_lr": best["learning_rate"], "v_num_grad_steps": best["steps"]}
            hparams = type(hparams).from_dict({**hparams.to_dict(), **chosen}, "the search")
        given: dict[str, Any] = {"chat": bench.prompts, "seed": seed}
        if self.unlearns:
            given |= {"retain": task.retain, "known_answers": task.known_answers}
        result = editing.apply(bench, self._wanted(task), hparams, means, **given)
        notes = {"layers": list(self.hparams.layers), **({"anchors": len(result.anchors)} if self.unlearns else {})}
        rows = 0 if result.token is None else _bytes(result.token.row_in) + _bytes(result.token.row_out)
        return Cost(update_size(result) + rows, notes)

    def _wanted(self, task: Task) -> list[EditRequest]:
        if self.unlearns:
            return list(task.forget)
        return [replace(request, target_new=REFUSAL) for request in task.forget]


@dataclass(frozen=True, kw_only=True)
class BaselineKeys(Section):
    """Holds the settings of a baseline of `editlib.baselines`."""

    settings: dict = setting(dict, "keys of `BaselineSettings`: learning_rate, steps, batch_size, rank, ...")
    search: bool | dict = setting(False, "first search for learning rate and steps: true, or keys of `Budget`")


class Trained(Method):
    """Applies a gradient method, or in-context refusal, of `editlib.baselines`."""

    Settings = BaselineKeys
    settings: BaselineKeys

    def __init__(self, name: str, label: str, settings: Section, where: str, general: General) -> None:
        super().__init__(name, label, settings, where, general)
        known = {key for key in BaselineSettings.__dataclass_fields__ if key not in ("hparams", "stats_dir", "corpus")}
        self.how = _made(BaselineSettings, self.settings.settings, known, f"{where}: settings")
        self.budget = _budget(self.settings.search, name, where)
        entry = BASELINES[name]
        self.family = "prompt" if entry.kind == "prompt" else "fine-tuning"
        self.seeded = entry.kind != "prompt"
        if self.budget is not None and not entry.searched:
            raise ConfigError(f'{where}: {name} has nothing to search for; remove "search"')

    def identity(self) -> dict[str, Any]:
        settings = {key: value for key, value in self.how.to_dict().items() if key not in ("stats_dir", "corpus")}
        return {"settings": settings, **_searching(self.budget, self.general)}

    def check_draft(self, draft: Workbench, task: Task | None) -> None:
        if task is not None:
            self.check(draft, task)  # which reads no weights

    def check(self, bench: Workbench, task: Task) -> None:
        check_baseline(self.name, task.forget, task.retain, self.how, _given(bench))
        if self.budget is not None:
            split(task.forget, task.retain, questions=self.budget.questions)

    @property
    def searches(self) -> bool:
        return self.budget is not None

    @property
    def prepares(self) -> bool:
        return BASELINES[self.name].kind == "gradient"

    def prepare(self, bench: Workbench, task: Task, seed: int) -> Prepared:
        """Generates the model's own answers to the questions of gradient methods; shared by all such methods."""
        shelf, timer = JsonStore(bench.stats_dir / model_slug(bench.name)), Timer()
        # The same weights give other answers with another chat template or other end tokens.
        form, ends = PromptFormat.of(bench.tok, bench.prompts), sorted(end_tokens(bench.anat))
        of = digest([bench.sha256, form.encode("?").ids, ends, OWN_TOKENS])
        kept = shelf.get(OWN_ANSWERS) or {}
        known = kept.get("answers", {}) if kept.get("of") == of else {}
        requests = [*task.forget, *(task.retain if BASELINES[self.name].needs_retain else ())]
        with timer("own answers"):
            label = "own answers" if bench.progress else None
            said = generate_own_answers(bench.anat, bench.tok, requests, known=known, how=bench.prompts, progress=label)
        if len(said) > len(known):
            shelf.put(OWN_ANSWERS, {"of": of, "answers": said})
        return Prepared(said, timer.seconds)

    def search(self, bench: Workbench, task: Task, seed: int, folder: Path, *, ready: Any) -> dict[str, Any]:
        return _searched(self.name, bench, task, self.how, self.budget, seed, folder, own_answers=ready)

    def forget(self, bench: Workbench, task: Task, seed: int, *, ready: Any, found: Mapping[str, Any] | None) -> Cost:
        how, forget, retain = self.how, task.forget, task.retain
        if found is not None:
            best = found["best"]
            how = replace(how, learning_rate=best["learning_rate"], steps=best["steps"])
            parts = split(forget, retain, questions=self.budget.questions, seed=found["seed"])  # type: ignore[union-attr]
            forget, retain = parts.forget, parts.retain
        result = apply_baseline_to_model(
            self.name, bench.model, bench.tok, forget, retain, how, seed=seed, model_name=bench.name,
            own_answers=ready, how=bench.prompts, progress=bench.progress,
        )  # fmt: skip
        rule = str(result.notes.get("told") or "")
        ends = {"first_loss": result.losses[0], "last_loss": result.losses[-1]} if result.losses else {}
        notes = {"steps": result.steps, "learning_rate": how.learning_rate, "tokens": result.tokens, **ends}
        return Cost(len(rule.encode()) if self.family == "prompt" else None, notes)


def _searched(
    name: str,
    bench: Workbench,
    task: Task,
    settings: BaselineSettings,
    budget: Budget | None,
    seed: int,
    folder: Path,
    *,
    own_answers: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Runs a search on questions that are used neither for training nor for the report; JSON-ready."""
    budget = budget or Budget()
    parts = split(task.forget, task.retain, questions=budget.questions, seed=seed)
    result: SearchResult = search(
        name, bench.model, bench.tok, parts.forget, parts.retain, parts.validation, budget, settings,
        seed=seed, model_name=bench.name, own_answers=own_answers, how=_given(bench), out=folder,
        progress=bench.progress,
    )  # fmt: skip
    return {**result.to_dict(), "seed": seed, "validation": parts.validation.to_dict()}


def _given(bench: Workbench) -> PromptSettings | None:
    """Returns the prompt settings of the config, `None` if it has none."""
    prompts = bench.given_prompts
    return prompts if prompts.to_dict() else None


def _budget(given: bool | Mapping[str, Any], name: str, where: str) -> Budget | None:
    """Returns the budget of a search for the baseline `name`; `None` for no search.

    Raises:
        ConfigError: an unknown key, or an invalid value.
    """
    if given is False:
        return None
    keys = {} if given is True else given
    budget = _made(Budget, keys, set(Budget.__dataclass_fields__), f"{where}: search")
    if name in BASELINES:
        try:
            check_range(name, budget)
        except HparamsError as error:
            raise ConfigError(f"{where}: {error}") from None
    return budget


def _searching(budget: Budget | None, general: General) -> dict[str, Any]:
    """Returns the settings that determine the result of a search: its budget and seed."""
    return {} if budget is None else {"search": {**asdict(budget), "seed": general.seeds[0]}}


def _made(kind: type[T], given: Mapping[str, Any], known: set[str], where: str) -> T:
    """Makes a settings object from keys of a config.

    Raises:
        ConfigError: an unknown key, or an invalid value.
    """
    for key in given:
        if key not in known:
            raise ConfigError(f'{where}: key "{key}": unknown; expected {nearest(str(key), sorted(known))}')
    try:
        return kind(**given)
    except HparamsError as error:
        raise ConfigError(f"{where}: {error}") from None


def update_size(result: EditResult) -> int:
    """Returns the bytes of an edit's factors, or of the matrix if that is smaller, in the dtype of the weights."""
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
    **{name: ClosedForm for name, kind in ALGORITHMS.items() if not kind.has_target},
    **{f"{name}{AIMED}": ClosedForm for name, kind in ALGORITHMS.items() if kind.has_target},
    **{name: Trained for name, entry in BASELINES.items() if entry.kind != "editor"},
}
"""Every method by the name that a config gives it."""


def read_method(value: Any, where: str, general: General) -> Method:
    """Makes a method from its name, or from an object with "method", optionally "label", and its settings.

    Raises:
        ConfigError: no such method, or unknown settings.
        EditlibError: settings that cannot be used.
    """
    value = {"method": value} if isinstance(value, str) else value
    if not isinstance(value, Mapping):
        raise ConfigError(f'{where}: {quote(value)}; expected a name, or an object with "method"; write one of them')
    name, label = value.get("method"), value.get("label")
    if isinstance(name, str) and name.endswith(AIMED_BEFORE):
        name = name.removesuffix(AIMED_BEFORE) + AIMED
    kind = chosen(name, METHODS, "method", where)
    if label is not None and not (isinstance(label, str) and label.strip()):
        raise ConfigError(f'{where}: key "label": {quote(label)}; expected some text; write it or remove it')
    rest = {key: given for key, given in value.items() if key not in ("method", "label")}
    return kind(name, label or name, kind.Settings.read(rest, where), where, general)
