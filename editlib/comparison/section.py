"""One object of a config as a checked dataclass: unknown, missing and bad keys are told apart, each in one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, TypeVar, get_type_hints

from editlib.errors import ConfigError, HparamsError
from editlib.hparams.checks import checked, knob, nearest, quote
from editlib.models.loading import DTYPES

Self = TypeVar("Self", bound="Section")


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base of every part of a config; its fields are `knob`s, which hold help, range and choices."""

    @classmethod
    def read(cls: type[Self], values: Any, where: str) -> Self:
        """The section from what stands in the file.

        Raises:
            ConfigError: not an object, an unknown or missing key, a value of the wrong type or out of range.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: {quote(values)}; expected an object with keys; write it as one")
        names, hints = [item.name for item in fields(cls)], get_type_hints(cls)
        for key in values:
            if key not in names:
                raise ConfigError(f'{where}: key "{key}": unknown; expected {nearest(str(key), names)}')
        given = {}
        for item in fields(cls):
            if item.name not in values:
                if item.default is item.default_factory is MISSING:
                    wanted = item.metadata["help"]
                    raise ConfigError(f'{where}: key "{item.name}": missing; expected {wanted}; add it')
                continue
            try:
                given[item.name] = checked(item.name, values[item.name], hints[item.name], item.metadata)
            except HparamsError as error:
                raise ConfigError(f"{where}: {error}") from None
        try:
            return cls(**given)
        except HparamsError as error:  # what one key alone does not tell
            raise ConfigError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the defaults filled in."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class General(Section):
    """The single values of a config."""

    model: str = knob(help="a packaged model, a local folder or a Hugging Face id")
    dtype: str | None = knob(None, "what the model is loaded in; none: as stored", choices=(*DTYPES, None))
    device_map: str | None = knob(None, "auto, or a device; none: the CPU, under torchrun an accelerator each")
    stats_dir: str = knob("stats", "where statistics, tokens and a model's own answers are kept")
    corpus: str = knob("wiki-sample", "what missing statistics are made from")
    stats_tokens: int = knob(100_000, "tokens that they are made from", min=1)
    seeds: list[int] = knob(lambda: [0], "one run of every method for each", min=0)
    perplexity: str | None = knob("wiki-sample:heldout", "text whose perplexity is taken; none: not taken")


def chosen(name: Any, known: Mapping[str, Any], what: str, where: str) -> Any:
    """The entry of a registry.

    Raises:
        ConfigError: there is none of this name; says which is nearest.
    """
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"{where}: {what} {quote(name)}: unknown; expected {nearest(str(name), known)}")
    return known[name]
