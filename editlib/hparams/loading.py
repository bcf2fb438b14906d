"""Find the settings of an algorithm: in a file, among the bundled ones, or derived for a public model."""

from __future__ import annotations

from pathlib import Path

from editlib.errors import HparamsError, nearest
from editlib.hparams.base import HyperParams
from editlib.hparams.bundled import available, bundled, class_of
from editlib.hparams.derive import DESCENT, ERASE, check_values, derive
from editlib.hparams.methods import ALGORITHMS
from editlib.hparams.published import OTHERS, RELATIVES, SAME
from editlib.hparams.shapes import KNOWN, ModelShape, known_as
from editlib.settings import read_settings


def load_hparams(name_or_path: str | Path, algorithm: str | None = None) -> HyperParams:
    """Loads the settings of an algorithm from a JSON or YAML file, or bundled ones by the name of a model.

    Args:
        name_or_path: `smollm2-135m` with an `algorithm`, `MEMIT/smollm2-135m` without, or a file. For a public model
            without bundled settings (`hparams.KNOWN`), they are derived.
        algorithm: its name in any case; `None`: see `algorithm_of`.

    Raises:
        HparamsError: no such algorithm, file or bundled name, or see `HyperParams.from_dict`.
    """
    given = str(name_or_path)
    cls = class_of(algorithm or algorithm_of(given))
    if not Path(given).exists():
        given = given.removeprefix(f"{cls.algorithm}/")
    names = available(cls.algorithm)
    if given in names:
        return bundled(cls.algorithm, given)
    a_file = given.endswith((".json", ".yaml", ".yml")) or Path(given).is_file()
    if a_file or (Path(given).exists() and given not in KNOWN):
        return cls.from_json(given)
    if given in KNOWN:
        return derive(cls.algorithm, KNOWN[given])
    known = dict.fromkeys((*names, *KNOWN))
    raise HparamsError(
        f"{given}: no bundled hparams for {cls.algorithm}; expected {nearest(given, known)}, or a JSON file"
    )


def find_hparams(algorithm: str, shape: ModelShape, *, values: str = DESCENT) -> HyperParams:
    """Finds settings for a model by its shape: bundled ones, else derived ones; `source` tells which.

    Args:
        values: how values are found, see `derive`.

    Raises:
        HparamsError: there is no such algorithm, or it cannot find values in this way.
    """
    check_values(algorithm, values)
    name = f"{known_as(shape)}{ERASE.get(values, '')}"
    if name in available(algorithm):
        return bundled(algorithm, name)
    return derive(algorithm, shape, values=values)


def algorithm_of(name_or_path: str | Path) -> str:
    """Returns the algorithm that settings are for: the key `alg_name` in a file (EasyEdit), or the name of their
    folder, as in `hparams/MEMIT/gpt2-xl.json` or the bundled `MEMIT/gpt2-xl`.

    Raises:
        HparamsError: neither names one, or the file cannot be read.
    """
    path = Path(name_or_path)
    named = read_settings(path).get("alg_name") if path.is_file() else None
    if isinstance(named, str):
        return class_of(named).algorithm
    folder = path.absolute().parent.name if path.is_file() else path.parent.name
    for name in (*ALGORITHMS, *SAME, *RELATIVES, *OTHERS):
        if name.lower() == folder.lower():
            return class_of(name).algorithm
    raise HparamsError(
        f"{name_or_path}: names no algorithm; expected it in a folder such as MEMIT/, or the key "
        f'"alg_name"; or name it with --algorithm: {", ".join(ALGORITHMS)}'
    )
