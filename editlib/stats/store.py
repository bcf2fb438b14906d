"""Find stored layer statistics in the ROME family's folders: choose one file, and check that it fits the model."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from editlib.errors import StatsError
from editlib.files import check_folder
from editlib.models.anatomy import Anatomy, inputs_of
from editlib.stats.file import LayerStats, StatsHeader, read_count, read_header, read_shape, read_stats, write_stats

__all__ = [
    "LayerStats",
    "StatsHeader",
    "StatsNotFound",
    "check_stats",
    "check_stored",
    "find_layers",
    "find_stats",
    "model_slug",
    "read_stats",
    "save_stats",
    "stats_hash",
    "stats_path",
    "stored_layers",
]

log = logging.getLogger(__name__)

PRECISION = "float32"
# The family's own names; one release writes a literal `{batch_tokens}`.
FILE = re.compile(
    r"(?P<module>.+)_(?:float16|bfloat16|float32|float64)_mom2(?:_t(?:\{batch_tokens\}|\d+))?(?:_(?P<number>\d+))?\.npz"
)


class StatsNotFound(StatsError):
    """Reports that no file of statistics was found; any other fault of a file is a plain `StatsError`."""


@dataclass(frozen=True)
class _Stored:
    """Describes a file by its name: `<model>/<corpus>_stats/<module>_<precision>_mom2_<number>.npz`."""

    path: Path
    corpus: str
    module: str
    number: int | None


def stats_path(stats_dir: Path, header: StatsHeader) -> Path:
    """Returns `<stats_dir>/<model>/<corpus>_stats/<module path>_float32_mom2_<documents>.npz`."""
    folder = Path(stats_dir) / model_slug(header.model) / f"{header.corpus}_stats"
    return folder / f"{header.module}_{PRECISION}_mom2_{header.documents}.npz"


def model_slug(model: str) -> str:
    """Returns the folder name of a model: its id with `/` as `_`, or the last part of a local path."""
    return Path(model).resolve().name if Path(model).is_dir() else model.strip("/").replace("/", "_")


def model_slugs(model: str) -> list[str]:
    """Lists the folder names that tools give a model: ROME and MEMIT use the whole id, others its last part."""
    bare = model.rstrip("/")
    names = [model_slug(model), bare.replace("/", "_").strip("_"), bare.replace("/", "_"), bare.rpartition("/")[2]]
    return [name for name in dict.fromkeys(names) if name not in ("", ".", "..")]


def save_stats(stats_dir: Path, stats: LayerStats) -> Path:
    """Writes one layer's file to its standard path, atomically; sets and returns the path. If a file for other weights
    of the same model (another dtype or revision) is there, it stays; this one goes to
    `<corpus>@<hash of its weights>_stats`."""
    assert stats.header is not None
    path = stats_path(stats_dir, stats.header)
    sha256 = stats.header.model_sha256
    with contextlib.suppress(StatsError):  # a damaged file is replaced
        if sha256 and path.exists() and not _made_from(path, sha256):
            path = path.parents[1] / f"{stats.header.corpus}@{sha256[:12]}_stats" / path.name
    if path.exists():
        log.info("%s is replaced", path)
    write_stats(path, stats)
    return path


def find_stats(
    stats_dir: Path,
    model: str,
    corpus: str | None,
    module: str,
    d_ff: int,
    *,
    model_sha256: str = "",
    dataset: str | None = None,
    samples: int | None = None,
) -> LayerStats:
    """Finds the file of one module, under any spelling of the model's name.

    Args:
        corpus: take files of this corpus only (the folders `<corpus>_stats` and `<corpus>@..._stats`).
        model_sha256: hash of the weights from which the file must have been made, if it records one.
        dataset, samples: of several files, prefer those of this corpus, then those whose name ends in this number
            (hparams keys `mom2_dataset`, `mom2_n_samples`), then the one with most tokens. The choice is logged.

    Raises:
        StatsNotFound: no file (the message names the folders).
        StatsError: a damaged file, one of another shape, or one made from other weights.
    """
    candidates = [stored for stored in _stored(stats_dir, model, corpus) if stored.module == module]
    if not candidates:
        looked = " or ".join(
            str(Path(stats_dir) / name / f"{corpus or '*'}_stats" / f"{module}_{PRECISION}_mom2*.npz")
            for name in model_slugs(model)
        )
        raise StatsNotFound(f"no layer statistics found at {looked}; make them with: editlib stats {model}")
    if model_sha256 and len(candidates) > 1:
        candidates = [stored for stored in candidates if _made_from(stored.path, model_sha256)] or candidates
    stats = read_stats(_choose(candidates, dataset, samples))
    check_stats(stats, module, d_ff, model_sha256)
    return stats


def find_layers(
    stats_dir: Path | str,
    model: str,
    anat: Anatomy,
    layers: Sequence[int],
    *,
    given: Mapping[int, LayerStats] | None = None,
    corpus: str | None = None,
    model_sha256: str = "",
    dataset: str | None = None,
    samples: int | None = None,
) -> Mapping[int, LayerStats]:
    """Returns the statistics `given` by the caller, or finds those of several layers of one model.

    It chooses and raises like `find_stats`.

    Raises:
        StatsError: statistics are given, but not for all `layers`.
    """
    if given is not None:
        missing = sorted(set(layers) - set(given))
        if missing:
            raise StatsError(
                f"statistics were given for layers {sorted(given)}; the settings also need layers {missing}: "
                "give theirs, or none, to read all from `stats_dir`"
            )
        return given
    return {
        layer: find_stats(
            Path(stats_dir),
            model,
            corpus,
            anat.mlp_output_names[layer],
            anat.d_ff,
            model_sha256=model_sha256,
            dataset=dataset,
            samples=samples,
        )
        for layer in layers
    }


def stored_layers(stats_dir: Path | str, model: str, corpus: str | None = None) -> dict[int, LayerStats]:
    """Finds all stored statistics of a model by layer number; of several files the one with most tokens.

    Raises:
        StatsNotFound: there are none.
        StatsError: a file cannot be read.
    """
    modules: dict[str, list[_Stored]] = {}
    for stored in _stored(stats_dir, model, corpus):
        modules.setdefault(stored.module, []).append(stored)
    if not modules:
        raise StatsNotFound(f"no layer statistics of {model} in {stats_dir}; make them with: editlib stats {model}")
    by_layer = {}
    for module, files in modules.items():
        number = re.search(r"\.(\d+)\.", module)
        by_layer[int(number[1]) if number else -1] = read_stats(_choose(files, None, None))
    return by_layer


def _stored(stats_dir: Path | str, model: str, corpus: str | None) -> Iterator[_Stored]:
    """Lists the files of a model, in a fixed order."""
    for name in model_slugs(model):
        for folder in sorted((Path(stats_dir) / name).glob("*_stats")):
            of = folder.name.removesuffix("_stats").partition("@")[0]
            if corpus is not None and of != corpus:
                continue
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                match = FILE.fullmatch(path.name)
                if match:
                    yield _Stored(path, of, match["module"], int(match["number"]) if match["number"] else None)


def _made_from(path: Path, model_sha256: str) -> bool:
    """Returns whether a file was made from these weights, or records no weights."""
    header = read_header(path)
    return header is None or header.model_sha256 in ("", model_sha256)


def _choose(candidates: Sequence[_Stored], dataset: str | None, samples: int | None) -> Path:
    """Chooses one file of several for the same module; see `find_stats`."""
    left = [stored for stored in candidates if stored.corpus == dataset] or list(candidates)
    left = [stored for stored in left if stored.number == samples] or left
    if len(left) > 1:
        counts = {stored.path: read_count(stored.path) for stored in left}
        left.sort(key=lambda stored: -counts[stored.path])  # stable: our own model_slug first if counts are equal
    taken = left[0].path
    if len(candidates) > 1:
        others = ", ".join(str(stored.path) for stored in candidates if stored.path != taken)
        log.info("statistics: taking %s; there are also %s", taken, others)
    return taken


def check_stored(stats_dir: Path, model: str, outline: PreTrainedModel, layers: Sequence[int]) -> None:
    """Checks the stored statistics of `layers` against a model, by headers alone; for a layer without any, checks that
    the folder can be written.

    Raises:
        StatsError: no file of a module is readable and fits it; describes the fault of the first.
        OutputError: a layer has none, and the folder cannot be written.
    """
    modules = dict(outline.named_modules())
    faults: dict[str, list[StatsError | None]] = {}
    for stored in _stored(stats_dir, model, None):
        width = inputs_of(modules.get(stored.module))
        if width is not None and any(f".{layer}." in stored.module for layer in layers):
            faults.setdefault(stored.module, []).append(_fault(stored, width))
    for module_faults in faults.values():
        if module_faults[0] is not None and None not in module_faults:
            raise module_faults[0]
    if not all(any(f".{layer}." in module for module in faults) for layer in layers):
        check_folder(Path(stats_dir) / model_slug(model), "--stats-dir")


def _fault(stored: _Stored, d_ff: int) -> StatsError | None:
    """Returns the fault of a file of statistics, as far as its headers show it."""
    try:
        shape, header = read_shape(stored.path), read_header(stored.path)
        _check_shape(stored.path, shape, stored.module, d_ff)
        _check_module(stored.path, header, stored.module)
    except StatsError as error:
        return error
    return None


def check_stats(stats: LayerStats, module: str, d_ff: int, model_sha256: str = "") -> None:
    """Raises `StatsError` if a file has another shape, module or model than the weight to edit."""
    _check_shape(stats.path, tuple(stats.mom2.shape), module, d_ff)
    _check_module(stats.path, stats.header, module)
    if stats.header is None:
        return
    if model_sha256 and stats.header.model_sha256 and stats.header.model_sha256 != model_sha256:
        raise StatsError(
            f"{stats.path}: comes from other weights of {stats.header.model} (hash {stats.header.model_sha256[:12]}, "
            f"this model {model_sha256[:12]}): another --dtype, revision or edit; make statistics for this one with "
            "`editlib stats` and the same --dtype"
        )


def _check_shape(path: Path | None, shape: Sequence[int], module: str, d_ff: int) -> None:
    if tuple(shape) != (d_ff, d_ff):
        size = " x ".join(map(str, shape)) or "single number as"
        raise StatsError(
            f"{path}: holds a {size} moment, but {module} has {d_ff} inputs: statistics of another model; make them "
            "with `editlib stats`"
        )


def _check_module(path: Path | None, header: StatsHeader | None, module: str) -> None:
    if header is not None and header.module != module:
        raise StatsError(f"{path}: was made for {header.module}, not for {module}; the file was renamed")


def stats_hash(hashes: Mapping[int, str]) -> str:
    """Computes one hash over the hashes of several layers' statistics, for receipts."""
    digest = hashlib.sha256()
    for layer in sorted(hashes):
        digest.update(f"{layer}:{hashes[layer]};".encode())
    return digest.hexdigest()
