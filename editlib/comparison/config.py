"""Read the config of a comparison from a JSON or TOML file, strictly: a typo is reported before a model loads."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from editlib.ability.tasks import load_tasks
from editlib.attacks.registry import choose
from editlib.attacks.settings import AttackSettings
from editlib.comparison.method import General, Method
from editlib.comparison.methods import read_method
from editlib.errors import AttackError, ConfigError, RequestError, nearest, quote
from editlib.evaluation.forget_set import Benchmark
from editlib.facts.forget_set import Facts
from editlib.models.prompt_settings import PromptSettings
from editlib.requests.json_text import loads_checked
from editlib.settings import Section, chosen, setting
from editlib.stats.corpus import load_corpus
from editlib.tofu.forget_set import Tofu

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class AttackPlan(Section):
    """Holds the attacks, the number of forgotten facts that they try, and their settings."""

    names: list[str] | None = setting(None, "names of attacks; none: all")
    facts: int | None = setting(None, "forgotten facts that are attacked, drawn by the seed; none: all", min=1)
    seed: int = setting(0, "seed of the draw and of the attacks, the same for all methods", min=0)
    settings: dict = setting(dict, "keys of `AttackSettings`: samples, shots, relearn_steps, ...")

    @property
    def how(self) -> AttackSettings:
        return AttackSettings(**self.settings)


@dataclass(frozen=True, kw_only=True)
class AbilityPlan(Section):
    """Holds the tasks of lm-eval to run."""

    tasks: list[str] = setting(help="names of tasks, or task files")
    limit: int | None = setting(None, "questions per task; none: all", min=1)
    seed: int | None = setting(None, "seed of a random sample of `limit` questions; none: the first ones", min=0)


@dataclass(frozen=True)
class Config:
    """Holds a checked comparison. `attacks` and `ability` are `None` if they are not wanted; `source` is the content of
    the file, stored in the results; `prompts` is how models are asked, `None`: the default prompt settings."""

    general: General
    sets: tuple[Benchmark, ...]
    methods: tuple[Method, ...]
    attacks: AttackPlan | None
    ability: AbilityPlan | None
    source: Mapping[str, Any]
    prompts: PromptSettings | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the config with every default filled in; JSON-ready."""
        return {
            **self.general.to_dict(),
            "sets": [{"protocol": benchmark.protocol, **benchmark.settings.to_dict()} for benchmark in self.sets],
            "methods": [{"method": method.name, "label": method.label, **method.identity()} for method in self.methods],
            "attacks": None if self.attacks is None else asdict(self.attacks),
            "ability": None if self.ability is None else asdict(self.ability),
            **({} if self.prompts is None else {"prompts": self.prompts.to_dict()}),
        }


def read_config(path: str | Path) -> Config:
    """Reads a config and checks everything that needs no model: keys, names, files, settings, texts.

    Raises:
        ConfigError: names the file, the place in it and the nearest known word.
        EditlibError: a file or setting that it names cannot be used.
    """
    path = Path(path)
    return parse_config(_values(path), str(path))


def parse_config(values: Mapping[str, Any], where: str = "config") -> Config:
    """Checks the content of a config's file, as `read_config` does."""
    lists = {"sets": _sets, "methods": _methods, "attacks": _attacks, "ability": _ability, "prompts": _prompts}
    known = [*General.__dataclass_fields__, *lists]
    for key in values:
        if key not in known:
            raise ConfigError(f'{where}: key "{key}": unknown; expected {nearest(str(key), known)}')
    general = General.read({key: value for key, value in values.items() if key not in lists}, where)
    if general.perplexity == "none":
        general = replace(general, perplexity=None)
    if not general.seeds or len(set(general.seeds)) < len(general.seeds):
        raise ConfigError(f'{where}: key "seeds": {general.seeds}; expected at least one, none twice; change the list')
    config = Config(
        general,
        _sets(values.get("sets"), f'{where}: "sets"', general),
        _methods(values.get("methods"), f'{where}: "methods"', general),
        _attacks(values.get("attacks"), f'{where}: "attacks"'),
        _ability(values.get("ability"), f'{where}: "ability"'),
        values,
        _prompts(values.get("prompts"), f'{where}: "prompts"'),
    )
    for text in (general.corpus, general.perplexity):
        if text not in (None, "self"):
            load_corpus(text)
    return config


def _values(path: Path) -> Mapping[str, Any]:
    wanted = "expected a JSON or TOML file with one object"
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; {wanted}; check the path") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8; {wanted}; save it as UTF-8") from None
    try:
        values = _toml(path, text) if path.suffix.lower() == ".toml" else loads_checked(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno} column {error.colno}"
        raise ConfigError(f"{path}: not JSON at {at} ({error.msg}); {wanted}; fix it, or call it .toml") from None
    except (ValueError, RecursionError) as error:  # tomllib's error, too
        raise ConfigError(f"{path}: {error}; {wanted}; fix it") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {quote(values)}; {wanted}; write {{...}}")
    return values


def _toml(path: Path, text: str) -> dict[str, Any]:
    if sys.version_info < (3, 11):
        raise ConfigError(f"{path}: TOML is read from Python 3.11 on; write the same as JSON, or use a newer Python")
    import tomllib

    return tomllib.loads(text)


def _some(values: Any, where: str, read: Callable[[Any, str], T], named: Callable[[T], str]) -> tuple[T, ...]:
    """Returns each entry of a non-empty list with distinct names."""
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        given = "missing" if values is None else quote(values)
        raise ConfigError(f"{where}: {given}; expected a list with at least one entry; add one")
    entries = tuple(read(value, f"{where}, entry {number}") for number, value in enumerate(values, 1))
    names = [named(entry) for entry in entries]
    for number, name in enumerate(names):
        if name in names[:number]:
            key = "label" if "methods" in where else "name"
            raise ConfigError(f'{where}: two entries are called {name!r}; expected one each; give one a "{key}"')
    return entries


def _sets(values: Any, where: str, general: General) -> tuple[Benchmark, ...]:
    def read(value: Any, place: str) -> Benchmark:
        value = {"protocol": value} if isinstance(value, str) else value
        if not isinstance(value, Mapping):
            raise ConfigError(f'{place}: {quote(value)}; expected an object with "protocol"; write it as one')
        kind = chosen(value.get("protocol"), PROTOCOLS, "protocol", place)
        settings = kind.Settings.read({key: v for key, v in value.items() if key != "protocol"}, place)
        return kind(settings, place, model=general.model, dtype=general.dtype, device_map=general.device_map)

    return _some(values, where, read, lambda benchmark: benchmark.name)


def _methods(values: Any, where: str, general: General) -> tuple[Method, ...]:
    return _some(values, where, lambda value, place: read_method(value, place, general), lambda method: method.label)


def _attacks(values: Any, where: str) -> AttackPlan | None:
    if values is None or values is False:
        return None
    plan = AttackPlan.read({"names": values} if isinstance(values, list) else values, where)
    known = AttackSettings.__dataclass_fields__
    for key in plan.settings:
        if key not in known:
            raise ConfigError(f'{where}: settings: key "{key}": unknown; expected {nearest(key, known)}')
    try:
        choose(plan.names)
        _ = plan.how
    except AttackError as error:
        raise ConfigError(f"{where}: {error}") from None
    return plan


def _prompts(values: Any, where: str) -> PromptSettings | None:
    if values is None or values == {}:
        return None
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: {quote(values)}; expected a table such as system, tags or date; write it as one")
    try:
        return PromptSettings.of_values(values)
    except RequestError as error:
        raise ConfigError(f"{where}: {error}") from None


def _ability(values: Any, where: str) -> AbilityPlan | None:
    if values in (None, [], False):
        return None
    plan = AbilityPlan.read({"tasks": values} if isinstance(values, list) else values, where)
    if not plan.tasks:
        raise ConfigError(f'{where}: "tasks" is empty; name some, or remove "ability"')
    with TemporaryDirectory(prefix="editlib-tasks-") as folder:
        load_tasks(plan.tasks, Path(folder))
    return plan


PROTOCOLS: dict[str, type[Benchmark]] = {kind.protocol: kind for kind in (Facts, Tofu)}
