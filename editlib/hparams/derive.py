"""Derive settings for a model without measured ones, from those of a reference model.

Layer numbers are scaled by depth (`setting(..., depth=True)` marks the fields), an absolute threshold on eigenvalues
becomes a share of energy, and everything else is copied. `notes` records the origin of each value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import takewhile
from typing import Any

from editlib.errors import HparamsError
from editlib.hparams.base import HyperParams
from editlib.hparams.bundled import available, bundled, class_of
from editlib.hparams.null_space import UniEraseHyperParams
from editlib.hparams.shapes import KNOWN, ModelShape, known_as

SMALL, GEMMA, LARGE = "smollm2-135m", "gemma3-270m", "llama-3-8b"
"""The reference models: two with measurements by editlib, and the one of most published settings."""

DESCENT, ROWS = "descent", "rows"
ERASE = {ROWS: "-erase"}
"""Suffixes of the names of UniErase's settings, by how values are found; none for descent."""

WIDE = 1600  # width of GPT2-XL, the smallest model with published settings
ENERGY = 0.3
"""Share of the energy of a layer's keys in the directions that may be edited. On smollm2-135m the published threshold,
0.02, gives shares of 0.49, 0.37, 0.31, 0.28, 0.25 and 0.19 in layers 3 to 8 (20,000 tokens): 0.3 is the median."""

READ_AT = {SMALL: 22}
"""For each reference, the last layer at which the subject's state decides the answer (`algorithms.causal_trace`)."""

NORM_BEHIND = frozenset({"gemma2", "gemma3", "gemma3_text", "olmo2", "olmo3", "granite", "exaone4", "glm4"})
"""Architectures with a norm or a factor after the MLP, for which there is no answer gate."""

MEASURED: dict[tuple[str, str | None], str] = {
    (
        "UniErase",
        "qwen2.5-0.5b",
    ): "with layers and gate by share of depth and the threshold still at 0.02: efficacy 1.00, "
    "unseen wordings .95, perplexity ratio 1.004",
}
"""Measurements with derived settings, by algorithm and model."""


@dataclass(frozen=True)
class _Depth:
    """Maps, piecewise linearly, the layers of a reference to those of a model.

    First and last layer map to first and last. After a causal trace, the last layer that decides answers maps to its
    counterpart too.
    """

    ends: tuple[tuple[int, int], ...]  # (reference, model), rising

    @classmethod
    def between(cls, n_reference: int, n_layers: int, read: tuple[int, int] | None) -> _Depth:
        inner = (read,) if read and 0 < read[0] < n_reference - 1 and 0 < read[1] < n_layers - 1 else ()
        return cls(((0, 0), *inner, (n_reference - 1, n_layers - 1)))

    def layer(self, layer: int) -> int:
        """Returns the model's layer for a layer of the reference."""
        at = len(list(takewhile(lambda end: end[0] < layer, self.ends[1:-1])))
        (low, low_here), (high, high_here) = self.ends[at], self.ends[at + 1]
        return math.floor(low_here + (layer - low) * (high_here - low_here) / (high - low) + 0.5)

    def layers(self, layers: list[int]) -> list[int]:
        """Returns the model's layers for a window of the reference's.

        All layers between the ends; in a much deeper model, whose statistics would fill the memory, only as many as in
        the reference, evenly spread.
        """
        low, high = self.layer(layers[0]), self.layer(layers[-1])
        width = high - low + 1
        count = width if width <= 1.5 * len(layers) else len(layers)
        return [low] if count == 1 else [low + round(i * (high - low) / (count - 1)) for i in range(count)]

    def carried(self, value: Any) -> Any:
        """Returns the value of a field that holds layer numbers."""
        if isinstance(value, list):
            return self.layers(value)
        return None if value is None else self.layer(value)


def derive(
    algorithm: str, shape: ModelShape, *, read_at: int | None = None, gated: bool = True, values: str = DESCENT
) -> HyperParams:
    """Derives settings of `algorithm` for a model of this shape.

    Args:
        read_at: the last layer at which the subject's state decides the answer, from a causal trace of this model;
            `None`: layers are scaled by depth alone.
        gated: `False` leaves out the answer gate, for a model that cannot have one.
        values: how values are found; "rows", which erase answers, exist for UniErase only.

    Raises:
        HparamsError: no such algorithm, or it cannot find values in this way.
    """
    cls = class_of(algorithm)
    check_values(algorithm, values)
    origin, name = _reference(cls, shape) if values == DESCENT else (cls.algorithm, SMALL)
    file = name + ERASE.get(values, "")
    reference = bundled(origin, file)
    n_reference = KNOWN[name].n_layers
    read = None if read_at is None or name not in READ_AT else (READ_AT[name], read_at)
    depth = _Depth.between(n_reference, shape.n_layers, read)
    carried, notes = _copied(cls, reference), {}
    how = "by share of depth" if read is None else f"by share of depth, answers being read up to layer {read_at}"
    for key in cls.depth_fields():
        if carried.get(key) not in (None, []):
            before, carried[key] = carried[key], depth.carried(carried[key])
            notes[key] = f"{_short(before)} of {n_reference} layers, {how}"
    if carried.get("nullspace_rule") == "absolute":
        notes["nullspace_threshold"] = (
            f"a share of energy in place of {carried['nullspace_threshold']:g}, to which it comes on {SMALL}"
        )
        carried |= {"nullspace_rule": "energy", "nullspace_threshold": ENERGY}
    no_gate = not gated or shape.model_type in NORM_BEHIND
    if carried.get("gate_layer") is not None and (no_gate or carried["gate_layer"] <= carried["layers"][-1]):
        why = "a norm or a factor follows the MLP" if no_gate else "too few layers for one"
        carried["gate_layer"], notes["gate_layer"] = None, f"none: {why}"
    notes["templates"] = "found in the model"
    notes["all else"] = f"as in {origin}/{file}.json"
    here = MEASURED.get((cls.algorithm, known_as(shape))) if values == DESCENT else None
    notes["measured"] = here or f"on {name} only, not on this model"
    title = f"{origin}/{file}.json, carried over to {shape}"
    given = {**carried, "model_name": shape.name, "notes": {"from": title, **notes}}
    return cls.from_dict(given, f"derived from {title}")


def check_values(algorithm: str, values: str) -> None:
    """Raises `HparamsError` if no settings of this algorithm find values in this way."""
    cls = class_of(algorithm)
    if values not in (DESCENT, *ERASE):
        raise HparamsError(f"values {values!r}: expected one of {', '.join((DESCENT, *ERASE))}")
    if values != DESCENT and cls is not UniEraseHyperParams:
        known = UniEraseHyperParams.algorithm
        raise HparamsError(
            f"values {values!r}: {cls.algorithm} finds none in this way; expected {known}, or leave it out"
        )


def _reference(cls: type[HyperParams], shape: ModelShape) -> tuple[str, str]:
    """Returns the algorithm and name of the bundled settings to start from: those of the algorithm, or of its parent if
    it is a variant."""
    kinds: list[type[HyperParams]] = [kind for kind in cls.__mro__ if issubclass(kind, HyperParams)]
    for kind in kinds:
        names = available(kind.algorithm) if kind.algorithm else []
        wanted = [GEMMA] if shape.model_type.startswith("gemma3") else []
        # UniErase's published settings leave out what editlib found to matter (anchors, the gate).
        wanted += [LARGE] if shape.d_model >= WIDE and not issubclass(kind, UniEraseHyperParams) else []
        for name in (*wanted, SMALL):
            if name in names:
                return kind.algorithm, name
    raise HparamsError(f"{cls.algorithm}: there are no bundled settings to derive from; give a file with --hparams")


def _copied(cls: type[HyperParams], reference: HyperParams) -> dict[str, Any]:
    """Returns the reference's values of the fields that both classes have.

    A variant's own fields keep their published defaults. Module templates are left out: they are found in the model.
    """
    variant_keys = vars(cls).get("__annotations__", {}) if type(reference) is not cls else {}
    skip: Callable[[str], bool] = lambda key: key in variant_keys or key.endswith("_tmp")  # noqa: E731
    known = {item.name for item in fields(cls)}
    return {key: value for key, value in reference.to_dict().items() if key in known and not skip(key)}


def _short(value: int | list[int]) -> str:
    """Formats layers: 3-8, or 3, 5, 9."""
    if not isinstance(value, list):
        return str(value)
    whole = value == list(range(value[0], value[-1] + 1)) and len(value) > 1
    return f"{value[0]}-{value[-1]}" if whole else ", ".join(map(str, value))
