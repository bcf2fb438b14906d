"""Read the bundled settings: one JSON file per algorithm and model."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from editlib.errors import HparamsError, nearest
from editlib.hparams.base import HyperParams
from editlib.hparams.methods import ALGORITHMS
from editlib.hparams.published import OTHERS, RELATIVES, SAME


def available(algorithm: str) -> list[str]:
    """Names of the bundled settings of an algorithm.

    Raises:
        HparamsError: there is no such algorithm.
    """
    folder = _folder(class_of(algorithm).algorithm)
    names = [item.name for item in folder.iterdir()] if folder.is_dir() else []
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def bundled(algorithm: str, name: str) -> HyperParams:
    """Reads the bundled settings called `name`, one of `available`."""
    cls = class_of(algorithm)
    text = (_folder(cls.algorithm) / f"{name}.json").read_text(encoding="utf-8")
    return cls.from_dict(json.loads(text), f"{cls.algorithm}/{name}.json")


def class_of(algorithm: str) -> type[HyperParams]:
    """Returns the settings class of an algorithm; its name may be in any case.

    Raises:
        HparamsError: there is no such algorithm.
    """
    by_lower = {name.lower(): cls for name, cls in ALGORITHMS.items()}
    by_lower |= {name.lower(): ALGORITHMS[ours] for name, ours in SAME.items()}
    if (cls := by_lower.get(algorithm.lower())) is not None:
        return cls
    for name, (ours, meaning) in RELATIVES.items():
        if name.lower() == algorithm.lower():
            raise HparamsError(
                f"algorithm {algorithm!r} ({meaning}): not available; expected one of {', '.join(ALGORITHMS)}; its "
                f"settings load with --algorithm {ours}"
            )
    if algorithm.lower() in {name.lower() for name in OTHERS}:
        raise HparamsError(f"algorithm {algorithm!r}: not available; expected one of {', '.join(ALGORITHMS)}")
    raise HparamsError(f"algorithm {algorithm!r}: unknown; expected {nearest(algorithm, ALGORITHMS)}")


def _folder(algorithm: str) -> Any:  # a Traversable, whose module changed between Python 3.10 and 3.14
    return resources.files("editlib.hparams") / algorithm
