"""Hyper-parameters: one flat, checked dataclass an algorithm, under the published key names.

A new key is one `knob(...)` line, its range included. A new algorithm is one class and its place in
`ALGORITHMS`; its bundled settings are `hparams/<algorithm>/<name>.json`.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

from editlib.errors import HparamsError

logger = logging.getLogger(__name__)

FAMILY_KEYS = frozenset(
    # ROME, MEMIT, AlphaEdit
    {"mom2_adjustment", "mom2_update_weight", "context_template_length_params", "layer_selection"}
    | {"attn_module_tmp", "ln_f_module", "lm_head_module", "nullspace_threshold", "L2"}
    # EasyEdit
    | {"alg_name", "stats_dir", "P_loc", "device", "model_parallel", "fp16", "batch_size", "max_length"}
    # EMMET, FastMEMIT, NSE
    | {"calculate_objective_value", "update_norm_lambda", "emmet_lambda", "dynamic", "dynamic_multiplier"}
    | {"alpha", "upper_bound", "max_iterations", "neuron_threshold"}
)
"""Keys of the family's published files; where an algorithm has no use for one, it is kept in `unused`."""

Self = TypeVar("Self", bound="HyperParams")


def knob(default: Any = MISSING, help: str = "", **limits: Any) -> Any:
    """A field of a `HyperParams`: its default, its help text and what it may be.

    `limits` are `min`, `max` (both allowed themselves), `above` (not allowed itself) and `choices`.
    """
    given = {"default_factory": default} if callable(default) else {"default": default}
    return field(**given, metadata={"help": help, **limits})


@dataclass(frozen=True, kw_only=True)
class HyperParams:
    """Keys that all algorithms of the ROME family share: where to edit, and how targets are optimised.

    `layers` has no default: which layers to edit depends on the model. Target states are found by Adam
    (`v_*`, `kl_factor`, `clamp_norm_factor`); `mom2_*` name the layer statistics to use.

    Raises:
        HparamsError: a value of the wrong type or out of range; quotes it and what is allowed.
    """

    algorithm: ClassVar[str] = ""

    layers: list[int] = knob(help="decoder layers to edit, rising, counted from 0", min=0)  # noqa: RUF009
    model_name: str | None = knob(None, "the model these values were found for")
    fact_token: str = knob("subject_last", "the lookup position", choices=("subject_last", "last"))
    v_optimizer: str = knob("adam", "how a target state is found", choices=("adam", "normalised"))
    v_num_grad_steps: int = knob(25, "steps for a target state", min=1)
    v_lr: float = knob(0.5, "Adam's learning rate, or a normalised step's length in norms of the state", above=0)
    v_loss_layer: int | None = knob(None, "layer whose output is read for the loss; none: the last", min=0)
    v_weight_decay: float = knob(0.5, "weight of the norm of the change to a target state", min=0)
    clamp_norm_factor: float = knob(4.0, "largest change to a target state, in norms of the state", above=0)
    kl_factor: float = knob(0.0625, "weight of the KL term that holds the subject's essence", min=0)
    early_stop_loss: float = knob(0.05, "a target state is done when the NLL of its target is below this", min=0)
    rewrite_module_tmp: str | None = knob(None, 'the edited matrix, "{}" for the layer; none: found')
    layer_module_tmp: str | None = knob(None, 'the decoder layer, "{}" for its number; none: found')
    mlp_module_tmp: str | None = knob(None, 'the MLP, "{}" for the layer; none: found')
    mom2_dataset: str = knob("wikipedia", "corpus of the layer statistics")
    mom2_n_samples: int = knob(100000, "texts in the layer statistics", min=1)
    mom2_dtype: str = knob("float32", "dtype of the layer statistics", choices=("float32", "float64"))
    notes: dict | str = knob("", "free text, such as where the values come from")  # noqa: RUF009
    unused: dict = field(
        default_factory=dict, repr=False, compare=False, metadata={"help": "published keys of no use here"}
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            value = _checked(item.name, getattr(self, item.name), hints[item.name], item.metadata)
            object.__setattr__(self, item.name, value)  # 10 becomes 10.0 where a float is due
        self.check()

    def check(self) -> None:
        """What one field alone cannot tell; subclasses add theirs and call this one."""
        if not self.layers or any(a >= b for a, b in pairwise(self.layers)):
            raise _bad("layers", self.layers, "at least one, rising, none twice", "sort the list")
        for name in ("rewrite_module_tmp", "layer_module_tmp", "mlp_module_tmp"):
            value = getattr(self, name)
            if value is not None and value.count("{}") != 1:
                raise _bad(name, value, 'one "{}" in the layer\'s place', "or leave the key out")

    @classmethod
    def from_dict(cls: type[Self], values: Mapping[str, Any], where: str = "hparams") -> Self:
        """Build from published keys; keys of the family without a use here go to `unused`.

        Raises:
            HparamsError: an unknown or missing key, or a bad value; starts with `where`.
        """
        names = [item.name for item in fields(cls) if item.name != "unused"]
        for key in values:
            if key not in names and key not in FAMILY_KEYS:
                raise HparamsError(f'{where}: key "{key}": unknown; expected {_nearest(key, names, FAMILY_KEYS)}')
        for item in fields(cls):
            if item.name not in values and item.default is item.default_factory is MISSING:
                wanted = item.metadata["help"]
                raise HparamsError(f'{where}: key "{item.name}": missing; expected {wanted}; add it')
        unused = {key: value for key, value in values.items() if key not in names}
        if unused:
            logger.info("%s: of no use to %s: %s", where, cls.algorithm or cls.__name__, ", ".join(unused))
        try:
            return cls(**{key: value for key, value in values.items() if key in names}, unused=unused)
        except HparamsError as error:
            raise HparamsError(f"{where}: {error}") from None

    @classmethod
    def from_json(cls: type[Self], path: str | Path) -> Self:
        """Read one flat JSON object.

        Raises:
            HparamsError: the file cannot be read, or see `from_dict`.
        """
        return cls.from_dict(_read_json(path), str(path))

    def to_dict(self) -> dict[str, Any]:
        """All keys with their values, ready for JSON and for `from_dict`; without `unused`."""
        return {key: value for key, value in asdict(self).items() if key != "unused"}


@dataclass(frozen=True, kw_only=True)
class NullSpaceHyperParams(HyperParams):
    """Keys of edits that keep to the null space of what the layer has seen (AlphaEdit, 2410.02355).

    `nullspace_threshold` is an eigenvalue of the second moment, as published; since eigenvalues do not
    carry over between models, `nullspace_rule` may make it a share of the energy or of the dimensions.
    """

    nullspace_threshold: float = knob(0.02, "directions below this may be edited", min=0)
    nullspace_rule: str = knob("absolute", "what the threshold counts", choices=("absolute", "energy", "dimensions"))
    L2: float = knob(10.0, "ridge of the solve; more is a smaller, less exact update", min=0)

    def check(self) -> None:
        super().check()
        if self.nullspace_rule != "absolute" and self.nullspace_threshold > 1:
            wanted = f'a share from 0 to 1 with nullspace_rule "{self.nullspace_rule}"'
            raise _bad("nullspace_threshold", self.nullspace_threshold, wanted)


@dataclass(frozen=True, kw_only=True)
class UniEraseHyperParams(NullSpaceHyperParams):
    """Keys of UniErase (2505.15674): a null-space edit towards `[UNL]`, with retain anchors on top.

    Anchors are keys of prompts whose answers must not move; they enter the solve with no residual.
    """

    algorithm: ClassVar[str] = "UniErase"

    solve: str = knob("ridge", "requests met by least squares, or exactly", choices=("ridge", "exact"))
    context_templates: list[str] = knob(  # noqa: RUF009
        lambda: ["{}"], 'surroundings of the question that targets are found in; "{}" is the question'
    )
    v_precision: str = knob(
        "model", 'dtype that targets are found in; "fast" is bf16 on processors that have it', choices=("model", "fast")
    )
    kl_subject_prompts: int = knob(0, "general prompts about the subject that the KL term also holds", min=0, max=11)
    kl_answer_tokens: int = knob(0, "how many tokens of the answers to them it holds", min=0)
    gate_layer: int | None = knob(None, "late layer that lifts [UNL] for the requests' relations; none: no gate", min=0)
    gate_nll: float = knob(5.5, "NLL of [UNL] that the gate alone comes to", above=0)
    gate_templates: list[str] = knob(  # noqa: RUF009
        lambda: ["{}"], 'surroundings of the question that the gate is found in; "{}" is the question'
    )
    anchors: bool = knob(True, "hold the keys of the retain prompts in place")
    anchor_weight: float = knob(1.0, "weight of an anchor against a request", min=0)
    anchor_positions: str = knob("all", "which positions are anchored", choices=("all", "subject_last"))
    anchor_subjects: bool = knob(True, "also anchor general prompts about the requests' own subjects")
    max_anchors: int | None = knob(None, "at most so many anchor prompts; none: all of them", min=1)

    def check(self) -> None:
        super().check()
        for name in ("context_templates", "gate_templates"):
            texts = getattr(self, name)
            if not texts or any(text.count("{}") != 1 for text in texts):
                raise _bad(name, texts, 'texts with one "{}" each')
        if self.gate_layer is not None and self.gate_layer <= self.layers[-1]:
            raise _bad("gate_layer", self.gate_layer, f"a layer above the last of `layers`, {self.layers[-1]}")


ALGORITHMS: dict[str, type[HyperParams]] = {cls.algorithm: cls for cls in (UniEraseHyperParams,)}


def available(algorithm: str) -> list[str]:
    """Names of the bundled settings of an algorithm.

    Raises:
        HparamsError: there is no such algorithm.
    """
    folder = _bundled(_hparams_class(algorithm).algorithm)
    names = [item.name for item in folder.iterdir()] if folder.is_dir() else []
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def load_hparams(name_or_path: str | Path, algorithm: str) -> HyperParams:
    """Load the settings of an algorithm from a JSON file, or bundled ones by their name.

    Raises:
        HparamsError: no such algorithm, file or bundled name, or see `HyperParams.from_dict`.
    """
    cls, given = _hparams_class(algorithm), str(name_or_path)
    names = available(algorithm)
    if given in names:
        text = (_bundled(cls.algorithm) / f"{given}.json").read_text(encoding="utf-8")
        return cls.from_dict(json.loads(text), f"{cls.algorithm}/{given}.json")
    if given.endswith(".json") or Path(given).exists():
        return cls.from_json(given)
    wanted = f"{_nearest(given, names)}, or a JSON file" if names else "the path of a JSON file"
    raise HparamsError(f"{given}: no bundled hparams for {cls.algorithm}; expected {wanted}")


def _bundled(algorithm: str) -> Any:  # a Traversable, whose home moved between Python 3.10 and 3.14
    return resources.files(__name__) / algorithm


def _hparams_class(algorithm: str) -> type[HyperParams]:
    for name, cls in ALGORITHMS.items():
        if name.lower() == algorithm.lower():
            return cls
    raise HparamsError(f"algorithm {algorithm!r}: unknown; expected {_nearest(algorithm, ALGORITHMS)}")


def _read_json(path: str | Path) -> dict[str, Any]:
    wanted = "expected a file with one flat JSON object"
    try:
        values = json.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise HparamsError(f"{path}: {error.strerror}; {wanted}; check the path") from None
    except UnicodeDecodeError:
        raise HparamsError(f"{path}: not UTF-8; {wanted}; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        at = f"line {error.lineno} column {error.colno}"
        raise HparamsError(f"{path}: not JSON at {at} ({error.msg}); {wanted}; mend it") from None
    except (ValueError, RecursionError) as error:  # also a null byte in the path
        raise HparamsError(f"{path}: {error}; {wanted}; mend it") from None
    if not isinstance(values, dict):
        raise HparamsError(f"{path}: {_quote(values)}; {wanted}; write {{...}}")
    return values


def _nearest(key: str, known: Iterable[str], also: Iterable[str] = ()) -> str:
    known = list(known)
    by_lower = {name.lower(): name for name in (*also, *known)}
    near = difflib.get_close_matches(key.lower(), by_lower, n=1, cutoff=0.5)
    return f'"{by_lower[near[0]]}"' if near else "one of " + ", ".join(known)


def _quote(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _bad(name: str, value: Any, wanted: str, remedy: str = "change it") -> HparamsError:
    return HparamsError(f'key "{name}": {_quote(value)}; expected {wanted}; {remedy}')


_KINDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a string", dict: "an object",
    list[int]: "a list of whole numbers", list[str]: "a list of texts", type(None): "null",
}  # fmt: skip
_LIMITS = {"min": "at least", "above": "more than", "max": "at most"}


def _checked(name: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    """The value in the type of its annotation and within its limits."""
    kinds = get_args(hint) if hint not in _KINDS else (hint,)
    if float in kinds and type(value) is int and abs(value) <= sys.float_info.max:
        value = float(value)
    if isinstance(value, (list, tuple)) and {list[int], list[str]} & set(kinds):
        value = list(value)  # the caller's list may change later
    if not any(_is(value, kind) for kind in kinds):
        raise _bad(name, value, " or ".join(_KINDS[kind] for kind in kinds))
    if "choices" in metadata and value not in metadata["choices"]:
        raise _bad(name, value, " or ".join(f'"{choice}"' for choice in metadata["choices"]))
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, (int, float)) and not _within(number, metadata):
            limits = [f"{word} {metadata[key]}" for key, word in _LIMITS.items() if key in metadata]
            raise _bad(name, value, " and ".join(limits) or "a finite number")
    return value


def _is(value: Any, kind: Any) -> bool:
    if kind == list[int]:
        return type(value) is list and all(type(item) is int for item in value)
    if kind == list[str]:
        return type(value) is list and all(type(item) is str for item in value)
    return type(value) is kind  # exact: True is no number


def _within(number: float, limits: Mapping[str, Any]) -> bool:
    return (
        abs(number) < math.inf  # false for nan, and whole numbers may be too big for math.isfinite
        and number >= limits.get("min", number)
        and number <= limits.get("max", number)
        and ("above" not in limits or number > limits["above"])
    )
