"""Read, check and write one file of layer statistics, the ROME family's `.npz`."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import sys
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from editlib.errors import StatsError, first_line
from editlib.files import atomic_path

CONSTRUCTOR = "util.runningstats.SecondMoment()"  # the family's own reader expects this
AGAIN = "compute it again with `editlib stats`, or fetch it again"
DAMAGE = (
    *(OSError, ValueError, EOFError, TypeError, AttributeError, KeyError, MemoryError, OverflowError, RuntimeError),
    *(SyntaxError, struct.error, zlib.error, zipfile.BadZipFile),
)
"""Errors of numpy and zipfile for bytes that are not an `.npz` file, or a damaged one."""
LARGE = 2**28  # bytes from which on a matrix is memory-mapped instead of read
CHUNK, ZIP_HEADER = 2**24, 30  # bytes read at once; bytes of the fixed part of a zip member's header
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
"""Readers of an array's header, by the version of its format."""


@dataclass(frozen=True)
class StatsHeader:
    """Tells the origin of a statistics file; stored in the file and checked before use."""

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
    """Holds the un-normalised sum `[d_ff, d_ff]` of `k k^T` over `count` tokens of one layer."""

    mom2: Tensor
    count: int
    sample_size: int
    header: StatsHeader | None = None  # None: the file was made by another tool
    path: Path | None = field(default=None, compare=False)

    def moment(self, neurons: Tensor | None = None) -> Tensor:
        """Returns `C = E[k k^T]`, uncentred, fp64 `[d_ff, d_ff]`; of `neurons [t]` alone `[t, t]`."""
        if neurons is not None:
            some = neurons.to(self.mom2.device)
            return self.mom2[some[:, None], some].to(torch.float64) / self.count
        # Divided in place: two such matrices of a wide layer are gigabytes.
        return self.mom2.to(torch.float64, copy=True).div_(self.count)

    def activity(self) -> Tensor:
        """Returns the mean square of each neuron's key, fp64 `[d_ff]`."""
        return self.mom2.diagonal().to(torch.float64) / self.count

    def sha256(self) -> str:
        """Hashes the sum and the count, for receipts."""
        digest = hashlib.sha256(self.mom2.to(torch.float32).contiguous().numpy().data)
        digest.update(str(self.count).encode())
        return digest.hexdigest()


def write_stats(path: Path, stats: LayerStats) -> None:
    """Writes one file, atomically; ROME, MEMIT, AlphaEdit and EasyEdit can read it."""
    assert stats.header is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("wb") as out:
        arrays: dict[str, Any] = {
            "mom2.constructor": np.array(CONSTRUCTOR),
            "mom2.count": np.array(stats.count),
            "mom2.mom2": stats.mom2.to(torch.float32).numpy(),
            "sample_size": np.array(stats.sample_size),
            "editlib.header": np.array(json.dumps(asdict(stats.header))),
        }
        np.savez(out, **arrays)
    stats.path = path


def read_stats(path: Path) -> LayerStats:
    """Opens one file, ours or one of the ROME family's; never unpickles anything.

    Raises:
        StatsError: not an `.npz` file, truncated, without the family's arrays, or not a second moment: not square, not
            finite, all zero, not symmetric, no token counted.
    """
    arrays = _arrays(path, ("mom2.count", "editlib.header"))
    header, count = _header(path, arrays), _count(path, arrays["mom2.count"])
    mapped = _mapped(path)
    mom2 = _arrays(path, ("mom2.mom2",))["mom2.mom2"] if mapped is None else mapped
    flaw = _flaw(mom2)
    if flaw:
        raise StatsError(f"{path}: {flaw}; expected a sum of k k^T; {AGAIN}")
    wide = mom2.astype(np.float64 if mom2.dtype.itemsize == 8 else np.float32, copy=False)
    return LayerStats(torch.from_numpy(wide), count, _sample_size(path), header, Path(path))


def read_count(path: Path) -> int:
    """Reads the number of tokens in a file, without reading its matrix; raises like `read_stats`."""
    return _count(path, _arrays(path, ("mom2.count",))["mom2.count"])


def read_header(path: Path) -> StatsHeader | None:
    """Reads a file's header (`None` in those of other tools) but not its matrix; raises like `read_stats`."""
    return _header(path, _arrays(path, ("editlib.header",)))


def read_shape(path: Path) -> tuple[int, ...]:
    """Reads the shape of a file's matrix but not its numbers; raises like `read_stats`."""
    _arrays(path, ())
    try:
        with zipfile.ZipFile(path) as archive, archive.open("mom2.mom2.npy") as array:
            read = HEADERS[np.lib.format.read_magic(array)]
            return tuple(read(array)[0])
    except DAMAGE as error:
        raise StatsError(f"{path}: not a readable .npz file ({first_line(error)}); {AGAIN}") from None


def _header(path: Path, arrays: Mapping[str, np.ndarray]) -> StatsHeader | None:
    if "editlib.header" not in arrays:
        return None
    try:
        return StatsHeader(**json.loads(str(arrays["editlib.header"])))
    except (ValueError, TypeError) as error:
        raise StatsError(f"{path}: its header cannot be read ({error}); {AGAIN}") from None


def _arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            present = set(archive.files)
            arrays = {name: archive[name] for name in names if name in present}
    except DAMAGE as error:
        raise StatsError(f"{path}: not a readable .npz file ({first_line(error)}); {AGAIN}") from None
    lacking = [name for name in ("mom2.mom2", "mom2.count") if name not in present]
    if lacking:
        raise StatsError(f"{path}: lacks {lacking[0]!r}; expected a second-moment file of the ROME family")
    return arrays


def _mapped(path: Path) -> np.ndarray | None:
    """Maps a large matrix from its file; `None` for one that is small or compressed.

    An edit holds the statistics of all its layers, which are gigabytes for a wide model. The operating system can drop
    mapped pages when memory is short. The archive's checksum is compared once.
    """
    if sys.platform == "win32":  # a mapped file cannot be replaced there
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo("mom2.mom2.npy")
            if member.file_size < LARGE or member.compress_type != zipfile.ZIP_STORED:
                return None
            with archive.open(member) as array:
                shape, fortran, dtype = HEADERS[np.lib.format.read_magic(array)](array)
                begin = array.tell()
                while array.read(CHUNK):  # the checksum is compared at its end
                    pass
        with Path(path).open("rb") as file:
            file.seek(member.header_offset + ZIP_HEADER - 4)
            # A member's header has a fixed part, which ends with the lengths of the name and of the extra field.
            begin += member.header_offset + ZIP_HEADER + sum(struct.unpack("<HH", file.read(4)))
        return np.memmap(path, dtype, "c", begin, shape, order="F" if fortran else "C")
    except DAMAGE as error:
        raise StatsError(f"{path}: not a readable .npz file ({first_line(error)}); {AGAIN}") from None


def _count(path: Path, array: np.ndarray) -> int:
    """Reads the count, which the family's tools write as a number or as an array of one."""
    if array.size == 1 and array.dtype.kind in "iuf":
        value = float(array.reshape(-1)[0])
        if math.isfinite(value) and value >= 1 and value == int(value):
            return int(value)
    raise StatsError(f"{path}: 'mom2.count' is {array.tolist()!r:.60}; expected the number of tokens counted; {AGAIN}")


def _sample_size(path: Path) -> int:
    """Returns the number of documents; 0 if it is unknown (missing, NaN or a pickled None)."""
    try:
        array = _arrays(path, ("sample_size",)).get("sample_size", np.array(0))
    except StatsError:
        return 0
    value = float(array.reshape(-1)[0]) if array.size == 1 and array.dtype.kind in "iuf" else 0.0
    return int(value) if math.isfinite(value) else 0


def _flaw(mom2: np.ndarray) -> str | None:
    """Says why `mom2` cannot be a sum of `k k^T`; `None` if it can."""
    if mom2.ndim != 2 or mom2.shape[0] != mom2.shape[-1] or not mom2.size:
        return f"holds an array of shape {' x '.join(map(str, mom2.shape)) or '()'}, which is not square"
    if mom2.dtype.kind != "f" or mom2.dtype.itemsize > 8:
        return f"holds numbers of type {mom2.dtype}"
    diagonal = mom2.diagonal().astype(np.float64)
    least = float(np.finfo(mom2.dtype).smallest_subnormal)
    if (diagonal < 0).any():
        return "holds a negative number on its diagonal"
    if not diagonal.any():
        return "holds only zeros on its diagonal"
    flaws = (_block_flaw(mom2, diagonal, least, start) for start in range(0, len(mom2), 512))
    return next((flaw for flaw in flaws if flaw), None)


def _block_flaw(mom2: np.ndarray, diagonal: np.ndarray, least: float, start: int) -> str | None:
    """Checks 512 rows right of the diagonal and the same columns below it, since a copy of the whole may be gigabytes.

    `least` is the resolution of the file's dtype, to which small sums in half precision are rounded.
    """
    block = slice(start, start + 512)
    upper = mom2[block, start:].astype(np.float64)
    lower = mom2[start:, block].T.astype(np.float64)
    if not (np.isfinite(upper).all() and np.isfinite(lower).all()):
        return "holds numbers that are not finite"
    # |m_ij| <= sqrt(m_ii m_jj) in every sum of k k^T. The floor is far above fp32's rounding, also of products that
    # underflow, and far below what a damaged block shows.
    scale = np.sqrt(diagonal[block, None] + least) * np.sqrt(diagonal[None, start:] + least)
    scale += 1e-6 * diagonal.max() + 100 * least
    if (np.abs(upper - lower) > 0.01 * scale).any():
        return "holds a matrix that is not symmetric"
    if (np.abs(upper) > 1.05 * scale).any():
        return "holds numbers larger than its diagonal allows"
    return None
