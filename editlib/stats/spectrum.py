"""Describe layer statistics: rank, null-space sizes and the spectrum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from editlib.errors import EditlibError, HparamsError
from editlib.files import atomic_path
from editlib.stats.file import LayerStats
from editlib.version import install_line

THRESHOLDS = (0.005, 0.01, 0.02, 0.05, 0.1)
BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Spectrum:
    """Holds the eigenvalues of `E[k k^T]`, ascending `[d_ff]`, and the numbers derived from them."""

    eigenvalues: Tensor
    tokens: int
    rank: int
    null: dict[float, int]

    @property
    def d_ff(self) -> int:
        return len(self.eigenvalues)


def summary(stats: LayerStats) -> Spectrum:
    """Computes the spectrum of one layer; the rank counts eigenvalues above fp32's resolution of the largest."""
    values, _ = eigen(stats.moment())
    resolution = float(values[-1]) * len(values) * torch.finfo(torch.float32).eps
    null = {threshold: kept_dimensions(values, threshold) for threshold in THRESHOLDS}
    return Spectrum(values, stats.count, int((values > resolution).sum()), null)


def sketch(spectrum: Spectrum, width: int = 24) -> str:
    """Draws the logarithms of the eigenvalues, largest first, as a line of blocks for a terminal."""
    logs = spectrum.eigenvalues.flip(0).clamp_min(1e-12).log10()
    points = logs[torch.linspace(0, len(logs) - 1, width).long()]
    low, high = float(points.min()), float(points.max())
    scaled = (points - low) / max(high - low, 1e-9) * (len(BLOCKS) - 1)
    return "".join(BLOCKS[int(value)] for value in scaled.round().tolist())


def draw_spectrum(stats: Mapping[int, LayerStats], path: Path) -> None:
    """Draws all layers' eigenvalues, largest first, on a logarithmic axis, into a PNG, SVG or PDF.

    Raises:
        EditlibError: matplotlib is not installed, or it cannot write the file's format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise EditlibError(f"plots need matplotlib: {install_line('report')}") from None
    kind = path.suffix.lstrip(".").lower()
    if kind not in ("png", "svg", "pdf"):
        raise EditlibError(f"--plot {path}: expected a file ending in .png, .svg or .pdf")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for layer, layer_stats in sorted(stats.items()):
        axes.plot(
            summary(layer_stats).eigenvalues.flip(0).clamp_min(1e-9).numpy(), label=f"layer {layer}", linewidth=1.2
        )
    for threshold in (0.02,):
        axes.axhline(threshold, color="grey", linestyle=":", linewidth=1)
        axes.annotate(f"threshold {threshold:g}", (0, threshold), fontsize=8, va="bottom", color="grey")
    axes.set(yscale="log", xlabel="direction, by eigenvalue", ylabel="eigenvalue of E[k kᵀ]")
    axes.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=150)


def eigen(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Computes eigenvalues, ascending `[d_ff]`, and eigenvectors `[d_ff, d_ff]` of a second moment `E[k k^T]`, in
    fp64."""
    moment = moment.to(torch.float64)
    try:
        values, vectors = torch.linalg.eigh(moment)
    except torch.linalg.LinAlgError:  # many equal eigenvalues can keep the fast routine from converging
        vectors, values, _ = torch.linalg.svd(moment)
        values, vectors = values.flip(0), vectors.flip(1)
    return values.clamp_min(0), vectors


def kept_dimensions(eigenvalues: Tensor, threshold: float, rule: str = "absolute") -> int:
    """Counts how many of the smallest `eigenvalues` (ascending) an edit may use.

    `rule`: "absolute" keeps eigenvalues below `threshold` (AlphaEdit); "energy" keeps the directions that together
    hold less than that share of the trace; "dimensions" keeps that share of all directions.
    """
    if rule == "absolute":
        return int((eigenvalues < threshold).sum())
    if rule == "energy":
        share = eigenvalues.cumsum(0) / eigenvalues.sum()
        return int((share < threshold).sum())
    if rule == "dimensions":
        return round(threshold * len(eigenvalues))
    raise HparamsError(f'nullspace_rule is {rule!r}; expected "absolute", "energy" or "dimensions"')
