"""The store of layer statistics: the ROME family's `.npz` files, read, checked and written."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from editlib.errors import StatsError
from editlib.models.anatomy import Anatomy
from editlib.models.files import atomic_path

PRECISION = "float32"
CONSTRUCTOR = "util.runningstats.SecondMoment()"  # what the family's own reader expects to find


@dataclass(frozen=True)
class StatsHeader:
    """What a statistics file was made from; stored in it, checked before it is used."""

    model: str
    module: str
    d_ff: int
    tokens: int
    documents: int
    corpus: str
    corpus_sha256: str
    max_length: int
    skip_first: int
    seed: int = 0
    model_sha256: str = ""
    editlib: str = ""


@dataclass
class LayerStats:
    """The un-normalised sum `[d_ff, d_ff]` of `k k^T` over `count` tokens of one layer."""

    mom2: Tensor
    count: int
    sample_size: int
    header: StatsHeader | None = None  # None: a file made by another tool
    path: Path | None = field(default=None, compare=False)

    def moment(self) -> Tensor:
        """`C = E[k k^T]`, uncentred, fp64 `[d_ff, d_ff]`."""
        return self.mom2.to(torch.float64) / self.count

    def sha256(self) -> str:
        """Hash of the sum and the count, for receipts."""
        digest = hashlib.sha256(self.mom2.to(torch.float32).contiguous().numpy().tobytes())
        digest.update(str(self.count).encode())
        return digest.hexdigest()


def stats_path(stats_dir: Path, header: StatsHeader) -> Path:
    """`<stats_dir>/<model>/<corpus>_stats/<module path>_float32_mom2_<documents>.npz`."""
    folder = Path(stats_dir) / spelling(header.model) / f"{header.corpus}_stats"
    return folder / f"{header.module}_{PRECISION}_mom2_{header.documents}.npz"


def spelling(model: str) -> str:
    """The folder name of a model: its id with `/` as `_`, or the last part of a local path."""
    return Path(model).resolve().name if Path(model).is_dir() else model.replace("/", "_")


def save_stats(stats_dir: Path, stats: LayerStats) -> Path:
    """Writes one layer's file, atomically; a reader of ROME, MEMIT, AlphaEdit or EasyEdit opens it."""
    assert stats.header is not None
    path = stats_path(stats_dir, stats.header)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("wb") as out:
        np.savez(
            out,
            **{
                "mom2.constructor": np.array(CONSTRUCTOR),
                "mom2.count": np.array(stats.count),
                "mom2.mom2": stats.mom2.to(torch.float32).numpy(),
                "sample_size": np.array(stats.sample_size),
                "editlib.header": np.array(json.dumps(asdict(stats.header))),
            },
        )
    stats.path = path
    return path


def read_stats(path: Path) -> LayerStats:
    """Opens one file, ours or one of the ROME family's.

    Raises:
        StatsError: not an `.npz`, truncated, or without the family's arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files if name != "mom2.constructor"}
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zlib.error, zipfile.BadZipFile) as error:
        raise StatsError(f"{path}: not a readable .npz file ({error}); compute it again with `editlib stats`") from None
    lacking = {"mom2.mom2", "mom2.count"} - arrays.keys()
    if lacking:
        raise StatsError(f"{path}: lacks {sorted(lacking)[0]!r}; expected a second-moment file of the ROME family")
    header = None
    if "editlib.header" in arrays:
        try:
            header = StatsHeader(**json.loads(str(arrays["editlib.header"])))
        except (ValueError, TypeError) as error:
            raise StatsError(
                f"{path}: its header cannot be read ({error}); compute it again with `editlib stats`"
            ) from None
    mom2, count = arrays["mom2.mom2"], arrays["mom2.count"]
    if mom2.ndim != 2 or count.ndim or count < 1 or not np.isfinite(mom2).all():
        raise StatsError(f"{path}: holds no finite moment of at least one token; compute it again with `editlib stats`")
    return LayerStats(
        torch.from_numpy(arrays["mom2.mom2"]),
        int(arrays["mom2.count"]),
        int(arrays.get("sample_size", 0)),
        header,
        Path(path),
    )


def find_stats(
    stats_dir: Path, model: str, corpus: str | None, module: str, d_ff: int, *, model_sha256: str = ""
) -> LayerStats:
    """The file of one module, under either spelling of the model's name; the one with most tokens if there are several.

    Raises:
        StatsError: no file (says where it looked), a file of another shape, or one made from other weights.
    """
    names = dict.fromkeys([spelling(model), model.replace("/", "_").strip("_"), model.rstrip("/").rpartition("/")[2]])
    pattern = f"{corpus or '*'}_stats/{module}_{PRECISION}_mom2*.npz"
    paths = [path for name in names for path in sorted((Path(stats_dir) / name).glob(pattern))]
    if not paths:
        looked = " or ".join(str(Path(stats_dir) / name / pattern) for name in names)
        raise StatsError(f"no layer statistics found at {looked}; make them with: editlib stats {model}")
    best = max((read_stats(path) for path in paths), key=lambda stats: stats.count)
    check_stats(best, module, d_ff, model_sha256)
    return best


def stored_layers(stats_dir: Path | str, model: str, corpus: str | None = None) -> dict[int, LayerStats]:
    """All stored statistics of a model by layer number, the one with most tokens where there are several.

    Raises:
        StatsError: none there, or one that cannot be read.
    """
    names = [*dict.fromkeys([spelling(model), model.replace("/", "_"), model.rstrip("/").rpartition("/")[2]])]
    pattern = f"{corpus or '*'}_stats/*_{PRECISION}_mom2*.npz"
    paths = [path for name in names for path in sorted((Path(stats_dir) / name).glob(pattern))]
    if not paths:
        raise StatsError(f"no layer statistics of {model} in {stats_dir}; make them with: editlib stats {model}")
    found: dict[int, LayerStats] = {}
    for path in paths:
        stats = read_stats(path)
        number = re.search(r"\.(\d+)\.", path.name)
        layer = int(number[1]) if number else -1
        if layer not in found or stats.count > found[layer].count:
            found[layer] = stats
    return found


def find_layers(
    stats_dir: Path | str,
    model: str,
    anat: Anatomy,
    layers: Sequence[int],
    *,
    corpus: str | None = None,
    model_sha256: str = "",
) -> dict[int, LayerStats]:
    """The statistics of several layers of one model; raises like `find_stats`."""
    return {
        layer: find_stats(
            Path(stats_dir), model, corpus, anat.mlp_output_names[layer], anat.d_ff, model_sha256=model_sha256
        )
        for layer in layers
    }


def check_stats(stats: LayerStats, module: str, d_ff: int, model_sha256: str = "") -> None:
    """Raises `StatsError` when a file has another shape, module or model than the weight to edit."""
    shape = tuple(stats.mom2.shape)
    if shape != (d_ff, d_ff):
        raise StatsError(
            f"{stats.path}: holds a {shape[0]} x {shape[-1]} moment, but {module} has {d_ff} inputs: statistics of "
            "another model; make them with `editlib stats`"
        )
    if stats.header is None:
        return
    if stats.header.module != module:
        raise StatsError(f"{stats.path}: was made for {stats.header.module}, not for {module}; the file was renamed")
    if model_sha256 and stats.header.model_sha256 and stats.header.model_sha256 != model_sha256:
        raise StatsError(
            f"{stats.path}: comes from other weights of {stats.header.model} (hash {stats.header.model_sha256[:12]}, "
            f"this model {model_sha256[:12]}); make statistics for this one with `editlib stats`"
        )


def stats_hash(stats: Mapping[int, LayerStats]) -> str:
    """One hash over the statistics of several layers, for receipts."""
    digest = hashlib.sha256()
    for layer in sorted(stats):
        digest.update(f"{layer}:{stats[layer].sha256()};".encode())
    return digest.hexdigest()
