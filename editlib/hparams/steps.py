"""Vary settings by one step, for a search."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

from editlib.errors import HparamsError
from editlib.hparams.base import HyperParams

SCALES = {"anchor_weight": 3.0, "L2": 3.0, "nullspace_threshold": 2.0}
"""Numbers to try larger and smaller by a factor, the most important first."""

DESCENT_SCALES = {"early_stop_loss": 2.0}
"""The same for values by descent; values from rows stop by their margins."""

ROW_MARGINS = ("erase_margin",)
SAY_MARGINS = ("say_margin", "quiet_margin")
MARGIN_STEP = 2.0  # nats
LEFT_WEIGHT, LEFT_FACTOR = 30.0, 3.0
"""The weight of the left metric to try if it was off, as in the bundled settings; otherwise its factor."""


def steps(hparams: HyperParams, n_layers: int) -> Iterator[HyperParams]:
    """Yields settings that differ from `hparams` in one important field, layers first.

    The window of layers is moved, narrowed or widened, a number scaled (`SCALES`, ...), a margin moved, the gate moved
    or removed. Invalid settings are left out.

    Args:
        n_layers: decoder layers of the model.
    """
    by = max(n_layers // 15, 1)
    for change in [*_windows(hparams, n_layers, by), *_numbers(hparams), *_gates(hparams, n_layers, by)]:
        with suppress(HparamsError):
            changed = replace(hparams, **change)
            if changed != hparams:
                yield changed


def _windows(hparams: HyperParams, n_layers: int, by: int) -> list[dict[str, Any]]:
    """Returns the window of layers moved, widened and narrowed by `by` layers."""
    low, high = hparams.layers[0], hparams.layers[-1]
    windows = [(low - by, high - by), (low + by, high + by), (low, high + by), (low, high - by), (low - by, high)]
    return [{"layers": list(range(first, last + 1))} for first, last in windows if 0 <= first <= last < n_layers]


def _numbers(hparams: HyperParams) -> list[dict[str, Any]]:
    """Returns scaled numbers and moved margins; those of values come before those of the solve."""
    if hparams.values_from_rows:
        margins = [*ROW_MARGINS, *(SAY_MARGINS if hparams.refuses else ())]
        moved = [{name: getattr(hparams, name) + by} for name in margins for by in (-MARGIN_STEP, MARGIN_STEP)]
        scaled = _scaled(hparams, {"left_weight": LEFT_FACTOR})
        moved += [*scaled, {"left_weight": 0.0}] if scaled else [{"left_weight": LEFT_WEIGHT}]
    else:
        moved = _scaled(hparams, DESCENT_SCALES)
    return moved + _scaled(hparams, SCALES)


def _scaled(hparams: HyperParams, factors: dict[str, float]) -> list[dict[str, Any]]:
    """Returns the fields of `hparams` in `factors` that are not zero, each larger and smaller by its factor."""
    known = {item.name for item in fields(hparams)}
    current = {name: getattr(hparams, name) for name in factors if name in known}
    return [
        {name: float(f"{value * times:.3g}")}
        for name, value in current.items()
        if value
        for times in (factors[name], 1 / factors[name])
    ]


def _gates(hparams: HyperParams, n_layers: int, by: int) -> list[dict[str, Any]]:
    """Returns the gate moved by `by` layers, and removed."""
    gate = hparams.gate_at
    if gate is None:
        return []
    return [{"gate_layer": gate - by}, {"gate_layer": min(gate + by, n_layers - 1)}, {"gate_layer": None}]
