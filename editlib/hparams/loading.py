"""Settings by the name of their algorithm: bundled ones, or a JSON file."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from editlib.errors import HparamsError, nearest
from editlib.hparams.base import HyperParams
from editlib.hparams.methods import ALGORITHMS
from editlib.hparams.published import RELATIVES, SAME
from editlib.settings import read_settings


def available(algorithm: str) -> list[str]:
    """Names of the bundled settings of an algorithm.

    Raises:
        HparamsError: there is no such algorithm.
    """
    folder = _bundled(_class_of(algorithm).algorithm)
    names = [item.name for item in folder.iterdir()] if folder.is_dir() else []
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def load_hparams(name_or_path: str | Path, algorithm: str | None = None) -> HyperParams:
    """Load the settings of an algorithm from a JSON or YAML file, or bundled ones by their name.

    Args:
        name_or_path: `smollm2-135m` with an `algorithm`, `MEMIT/smollm2-135m` without, or a file.
        algorithm: its name in any case; `None`: see `algorithm_of`.

    Raises:
        HparamsError: no such algorithm, file or bundled name, or see `HyperParams.from_dict`.
    """
    given = str(name_or_path)
    cls = _class_of(algorithm or algorithm_of(given))
    if not Path(given).exists():
        given = given.removeprefix(f"{cls.algorithm}/")
    names = available(cls.algorithm)
    if given in names:
        text = (_bundled(cls.algorithm) / f"{given}.json").read_text(encoding="utf-8")
        return cls.from_dict(json.loads(text), f"{cls.algorithm}/{given}.json")
    if given.endswith((".json", ".yaml", ".yml")) or Path(given).exists():
        return cls.from_json(given)
    wanted = f"{nearest(given, names)}, or a JSON file" if names else "the path of a JSON file"
    raise HparamsError(f"{given}: no bundled hparams for {cls.algorithm}; expected {wanted}")


def algorithm_of(name_or_path: str | Path) -> str:
    """The algorithm that settings are for: EasyEdit's key `alg_name` in a file, or the folder that they lie in, as in
    `hparams/MEMIT/gpt2-xl.json` or the bundled `MEMIT/gpt2-xl`.

    Raises:
        HparamsError: neither says it, or the file cannot be read.
    """
    path = Path(name_or_path)
    named = read_settings(path).get("alg_name") if path.is_file() else None
    if isinstance(named, str):
        return _class_of(named).algorithm
    folder = path.absolute().parent.name if path.is_file() else path.parent.name
    for name in (*ALGORITHMS, *SAME, *RELATIVES):
        if name.lower() == folder.lower():
            return _class_of(name).algorithm
    raise HparamsError(
        f"{name_or_path}: does not say which algorithm it is for; expected it in a folder such as MEMIT/, or the key "
        f'"alg_name"; or name it with --algorithm: {", ".join(ALGORITHMS)}'
    )


def _bundled(algorithm: str) -> Any:  # a Traversable, whose home moved between Python 3.10 and 3.14
    return resources.files("editlib.hparams") / algorithm


def _class_of(algorithm: str) -> type[HyperParams]:
    by_lower = {name.lower(): cls for name, cls in ALGORITHMS.items()}
    by_lower |= {name.lower(): ALGORITHMS[ours] for name, ours in SAME.items()}
    if (cls := by_lower.get(algorithm.lower())) is not None:
        return cls
    for name, (ours, meaning) in RELATIVES.items():
        if name.lower() == algorithm.lower():
            raise HparamsError(
                f"algorithm {algorithm!r} ({meaning}): not here; expected one of {', '.join(ALGORITHMS)}; its settings "
                f"load with --algorithm {ours}"
            )
    raise HparamsError(f"algorithm {algorithm!r}: unknown; expected {nearest(algorithm, ALGORITHMS)}")
