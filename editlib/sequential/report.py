"""The points of chains as a table and as one plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from editlib.evaluation.bench_report import COLOURS, OTHER, write_table
from editlib.models.files import atomic_path
from editlib.sequential.run import Point

SHARES = ("efficacy", "gone", "paraphrases", "neighbours", "same_subject", "other")
PANELS = ("efficacy", "neighbours", "perplexity_ratio")


def table_rows(points: Sequence[Point]) -> list[list[str]]:
    """Head and rows: shares in 0..1 (higher is better), perplexity after over before (1 is best), seconds."""
    rows = [["algorithm", "batches of", "edits", *SHARES, "perplexity ratio", "s a batch"]]
    for point in points:
        shares = [getattr(point, name) for name in SHARES]
        told = ["-" if share is None else f"{share:.3f}" for share in shares]
        ratio = f"{point.perplexity_ratio:.3f}" if point.perplexity_ratio < 100 else f"{point.perplexity_ratio:.0e}"
        rows.append([point.algorithm, str(point.size), str(point.edits), *told, ratio, f"{point.seconds:.1f}"])
    return [[cell.replace("_", " ") for cell in row] if row is rows[0] else row for row in rows]


def write_sequential(points: Sequence[Point], out: Path) -> list[Path]:
    """Writes `table.md` and `plot.png` to `out`; returns their paths."""
    table, plot = out / "table.md", out / "plot.png"
    write_table(table_rows(points), table)
    _draw(points, plot)
    return [table, plot]


def _draw(points: Sequence[Point], path: Path) -> None:
    """One panel a measure, over the edits; a line a chain, the smallest batches dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.0), layout="constrained")
    largest = max((point.size for point in points), default=1)
    for panel, measure in zip(figure.subplots(1, len(PANELS), squeeze=False)[0], PANELS, strict=True):
        for algorithm, size in dict.fromkeys((point.algorithm, point.size) for point in points):
            own = sorted((p.edits, getattr(p, measure)) for p in points if (p.algorithm, p.size) == (algorithm, size))
            own = [(edits, value) for edits, value in own if value is not None]
            if own:
                style = "o-" if size == largest else "s--"
                colour = COLOURS.get(algorithm, OTHER)
                panel.plot(*zip(*own, strict=True), style, color=colour, label=f"{algorithm}, batches of {size}")
        panel.set(title=measure.replace("_", " "), xlabel="edits")
        panel.grid(color="#d5d9de")
        if measure == "perplexity_ratio":
            # A destroyed model's is in the millions; within a decade a logarithmic axis has no readable ticks.
            if max((point.perplexity_ratio for point in points), default=1.0) > 10:
                panel.set_yscale("log")
        else:
            panel.set_ylim(-0.03, 1.03)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
