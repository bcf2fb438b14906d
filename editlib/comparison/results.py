"""Collect stored cells into results.json: every cell, and a summary over seeds for each set and method."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from editlib.comparison.cells import AXES, FORMAT, RunCell
from editlib.comparison.config import Config
from editlib.errors import OutputError
from editlib.evaluation.intervals import bootstrap
from editlib.evaluation.metrics import wilson_interval
from editlib.shelf import digest
from editlib.version import library_version


def collect(
    config: Config, sets: Mapping[str, Any], cells: Sequence[RunCell], failures: Mapping[str, str | None]
) -> dict[str, Any]:
    """Collects the results of a comparison, JSON-ready.

    `cells` holds every cell with its scores, attacks, cost and items, or the reason why it failed. `sets` holds by name
    the description of the set and, under `methods`, one summary per method over its seeds; `front` is true if no other
    method of the set is at least as good on both axes and better on one.
    """
    entries = [_cell_of(cell, failures[cell.key]) for cell in cells]
    families = {method.label: method.family for method in config.methods}
    described = {}
    for name, about in sets.items():
        set_cells = [cell for cell in entries if cell["set"] == name]
        summaries = [
            summary(label, families[label], [c for c in set_cells if c["method"] == label])
            for label in dict.fromkeys(cell["method"] for cell in set_cells)
        ]
        mark_front(summaries)
        described[name] = {**about, "measures": _measures(set_cells), "methods": summaries}
    return {
        "format": FORMAT,
        "editlib": library_version(),
        "config": config.to_dict(),
        "config_sha256": digest(config.to_dict()),
        "machine": machine(),
        "sets": described,
        "cells": entries,
    }


def machine() -> dict[str, Any]:
    """Returns the machine and versions on which the comparison's numbers depend."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Returns for each point whether no other one dominates it, that is, is at least as large in both and larger in
    one."""
    return [
        not any(a >= x and b >= y and (a > x or b > y) for a, b in points)  # nothing dominates itself
        for x, y in points
    ]


def mark_front(summaries: Sequence[dict[str, Any]]) -> None:
    """Sets `front` of every summary; one without both axes is not on it."""
    placed = [method for method in summaries if all(method[axis] is not None for axis in AXES)]
    for method in summaries:
        method["front"] = False
    for method, front in zip(placed, pareto([(method["forget"], method["retain"]) for method in placed]), strict=True):
        method["front"] = front


def _cell_of(cell: RunCell, failure: str | None) -> dict[str, Any]:
    """Reads one cell, with everything that `summary` needs.

    Raises:
        OutputError: its files were not written by an earlier run.
    """
    try:
        content = _cell(cell, failure)
        summary(cell.method.label, cell.method.family, [content])
        _measures([content])
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        wanted = "remove this folder, and the cell is measured again"
        raise OutputError(f"{cell.shelf.path}: not written by an earlier run; {wanted}") from None
    return content


def _cell(cell: RunCell, failure: str | None) -> dict[str, Any]:
    """Reads one cell from its shelf."""
    measured = {
        "set": cell.set,
        "method": cell.method.label,
        "family": cell.method.family,
        "seed": cell.seed if cell.method.seeded else None,
        "key": cell.key,
        "failed": failure,
    }
    parts = {key: value for key in cell.parts if (value := cell.shelf.get(key)) is not None}
    edit, search = cell.shelf.get("edit"), cell.shelf.get("search")
    scores = parts.get("scores") or {}
    attacks = {value["attack"]: value for key, value in parts.items() if key.startswith("attack-")}
    return {
        **measured,
        "weights_sha256": None if edit is None else edit["sha256"],
        "cost": None if edit is None else edit["cost"],
        "notes": {} if edit is None else edit["notes"],
        "search": None if search is None else search["found"],
        "forget": scores.get("forget"),
        "retain": scores.get("retain"),
        "measures": scores.get("measures") or {},
        "perplexity": next((value for key, value in parts.items() if key.startswith("perplexity-")), None),
        "ability": [value for key, value in parts.items() if key.startswith("ability-")],
        "attacks": {name: _attack(value) for name, value in attacks.items()},
        "items": scores.get("items") or [],
    }


def _attack(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an attack's shares, and which facts it recovered (`None`: not tried on them)."""
    return {
        "meaning": value["meaning"],
        "shares": value["shares"],
        "leaks": {column: {t["id"]: _leaked(t) for t in trials} for column, trials in value["trials"].items()},
        "seconds": value["seconds"],
    }


def _leaked(trial: Mapping[str, Any]) -> bool | None:
    return None if trial["skipped"] is not None else any(output["leaked"] for output in trial["outputs"])


def _measures(cells: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Collects the meaning of each measure of a set."""
    meanings: dict[str, Any] = {}
    for cell in cells:
        named = {axis: cell[axis] for axis in AXES if cell[axis]}
        for name, measure in {**named, **cell["measures"]}.items():
            meanings.setdefault(name, {key: measure[key] for key in ("meaning", "higher_is_better")})
    return meanings


def summary(label: str, family: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarises a method on a set over its seeds: means, and the smallest and largest if there are several."""
    done = [cell for cell in cells if cell["forget"] is not None]
    costs = [cell["cost"] for cell in cells if cell["cost"] is not None]
    names = dict.fromkeys(name for cell in done for name in cell["measures"])
    attacks = dict.fromkeys(name for cell in cells for name in cell["attacks"])
    reasons = {cell["seed"]: cell["failed"] for cell in cells if cell["failed"]}
    return {
        "method": label,
        "family": family,
        "seeds": len(cells),
        "done": len(done),
        "failed": [{"seed": seed, "reason": reason} for seed, reason in reasons.items()],
        "forget": mean(cell["forget"]["value"] for cell in done),
        "retain": mean(cell["retain"]["value"] for cell in done),
        "points": [[cell["seed"], cell["forget"]["value"], cell["retain"]["value"]] for cell in done],
        "measures": {name: mean(_value(cell, name) for cell in done) for name in names},
        "intervals": {name: done[0]["measures"][name]["interval"] for name in names} if len(done) == 1 else {},
        "perplexity_ratio": mean(cell["perplexity"]["ratio"] for cell in cells if cell["perplexity"]),
        "attacks": {name: _pooled([c["attacks"][name] for c in cells if name in c["attacks"]]) for name in attacks},
        "ability": _ability(cells),
        "cost": {
            "seconds": mean(cost["seconds"] for cost in costs),
            "search_seconds": mean(cost["search_seconds"] for cost in costs),
            "prepared_seconds": max((sum(cost["prepared"].values()) for cost in costs), default=None),
            "more_mb": mean(cost["more_mb"] for cost in costs),
            "accelerator_mb": mean(cost["accelerator_mb"] for cost in costs),
            "touched": mean(cost["touched"]["weights"] for cost in costs),
            "touched_share": mean(cost["touched"]["weights"] / cost["touched"]["of"] for cost in costs),
            "update_bytes": mean(cost["update_bytes"] for cost in costs),
        },
    }


def mean(values: Iterable[float | None]) -> float | None:
    """Computes the mean of the values that are not `None`; `None` if there are none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _value(cell: Mapping[str, Any], name: str) -> float | None:
    return (cell["measures"].get(name) or {}).get("value")


def _pooled(attacks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Pools an attack over seeds, by column: a fact counts by the share of seeds in which it leaked, and the interval
    is a bootstrap over facts, or Wilson's where all or none leaked."""
    pooled: dict[str, Any] = {}
    for column in ("edited", "base", "control"):
        by_fact: dict[str, list[bool]] = {}
        for attack in attacks:
            for name, leaked in attack["leaks"][column].items():
                if leaked is not None:
                    by_fact.setdefault(name, []).append(leaked)
        shares = [fmean(values) for values in by_fact.values()]
        rate, n = (fmean(shares) if shares else None), len(shares)
        certain = rate in (None, 0.0, 1.0)  # where the bootstrap interval is a point
        ends = wilson_interval(round((rate or 0) * n), n) if certain else bootstrap(shares)
        pooled[column] = {"rate": rate, "n": n, "interval": list(ends)}
    return {"meaning": attacks[0]["meaning"], **pooled}


def _ability(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarises every task's metrics: means over seeds of the values and of their standard errors, and the base's
    numbers."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        for task in cell["ability"]:
            for row in task["rows"]:
                rows.setdefault(f"{row['task']} {row['metric']}", []).append(row)
    return {
        name: {
            "value": mean(row["value"] for row in scores),
            "stderr": mean(row.get("stderr") for row in scores),
            "base": scores[0].get("base"),
            "higher_is_better": scores[0].get("higher_is_better") is not False,
        }
        for name, scores in rows.items()
    }
