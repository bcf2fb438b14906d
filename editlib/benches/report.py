"""Write the points of a benchmark as a table and as one plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from editlib.benches.points import CounterFactPoint, SequentialPoint
from editlib.files import atomic_path
from editlib.reports.tables import write_table

MEASURES = ("efficacy", "generalisation", "specificity")
COLOURS = {"FT": "#8a6d1d", "ROME": "#b4511f", "MEMIT": "#2f6f9f", "AlphaEdit": "#2f7d4f"}
OTHER = "#6b4c9a"


def counterfact_rows(cells: Sequence[CounterFactPoint]) -> list[list[str]]:
    """Builds a table, head first: shares in 0..1 (higher is better), perplexity (lower is better), seconds."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    rows = [["algorithm", "mode", "edits", *MEASURES, "generated", "perplexity", "seconds"]]
    for cell in cells:
        shares = [share(getattr(cell, name)) for name in (*MEASURES, "generated")]
        size = f"{cell.perplexity:.1f}" if cell.perplexity < 1e4 else f"{cell.perplexity:.0e}"
        rows.append([cell.algorithm, cell.mode, str(cell.edits), *shares, size, f"{cell.seconds:.0f}"])
    return rows


def write_bench(cells: Sequence[CounterFactPoint], out: Path) -> list[Path]:
    """Writes `table.md` and `plot.png` to `out`; returns their paths."""
    table, plot = out / "table.md", out / "plot.png"
    write_table(counterfact_rows(cells), table)
    _draw_counterfact(cells, plot)
    return [table, plot]


def _draw_counterfact(cells: Sequence[CounterFactPoint], path: Path) -> None:
    """Draws a row of panels for each mode, one panel for each measure, over the number of edits."""
    from matplotlib.figure import Figure

    modes = [mode for mode in dict.fromkeys(cell.mode for cell in cells) if mode != "-"]
    names = [name for name in dict.fromkeys(cell.algorithm for cell in cells) if name != "none"]
    figure = Figure(figsize=(10, 3.2 * len(modes)), layout="constrained")
    axes = figure.subplots(len(modes), len(MEASURES), squeeze=False, sharex=True, sharey=True)
    for row, mode in enumerate(modes):
        for column, measure in enumerate(MEASURES):
            panel = axes[row][column]
            for name in names:
                points = [(c.edits, getattr(c, measure)) for c in cells if (c.algorithm, c.mode) == (name, mode)]
                if points:
                    panel.plot(*zip(*sorted(points), strict=True), "o-", color=COLOURS.get(name, OTHER), label=name)
            before = sorted((c.edits, getattr(c, measure)) for c in cells if c.algorithm == "none")
            if before:
                panel.plot(*zip(*before, strict=True), ":", color="#59626d", label="unedited")
            panel.set(xscale="log", ylim=(-0.03, 1.03), title=f"{measure}, {mode}" if len(modes) > 1 else measure)
            panel.grid(color="#d5d9de")
            if row == len(modes) - 1:
                panel.set_xlabel("edits")
    axes[0][0].set_ylabel("share (higher is better)")
    # ROME has no batches, so no single panel shows every line.
    lines = {
        label: line for panel in figure.axes for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    shown = [name for name in (*names, "unedited") if name in lines]
    axes[0][0].legend([lines[name] for name in shown], shown, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


SHARES = ("efficacy", "gone", "paraphrases", "neighbours", "same_subject", "other")
PANELS = ("efficacy", "neighbours", "perplexity_ratio")


def sequential_rows(points: Sequence[SequentialPoint]) -> list[list[str]]:
    """Returns head and rows: shares in 0..1 (higher is better), perplexity after over before (1 is best), seconds."""
    rows = [["algorithm", "batches of", "edits", *SHARES, "perplexity ratio", "s a batch"]]
    for point in points:
        shares = [getattr(point, name) for name in SHARES]
        cells = ["-" if share is None else f"{share:.3f}" for share in shares]
        ratio = f"{point.perplexity_ratio:.3f}" if point.perplexity_ratio < 100 else f"{point.perplexity_ratio:.0e}"
        rows.append([point.algorithm, str(point.size), str(point.edits), *cells, ratio, f"{point.seconds:.1f}"])
    return [[cell.replace("_", " ") for cell in row] if row is rows[0] else row for row in rows]


def write_sequential(points: Sequence[SequentialPoint], out: Path) -> list[Path]:
    """Writes `table.md` and `plot.png` to `out`; returns their paths."""
    table, plot = out / "table.md", out / "plot.png"
    write_table(sequential_rows(points), table)
    _draw_sequential(points, plot)
    return [table, plot]


def _draw_sequential(points: Sequence[SequentialPoint], path: Path) -> None:
    """Draws one panel for each measure, over the edits; a line for each chain, the smallest batches dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.0), layout="constrained")
    largest = max((point.size for point in points), default=1)
    for panel, measure in zip(figure.subplots(1, len(PANELS), squeeze=False)[0], PANELS, strict=True):
        for algorithm, size in dict.fromkeys((point.algorithm, point.size) for point in points):
            curve = sorted((p.edits, getattr(p, measure)) for p in points if (p.algorithm, p.size) == (algorithm, size))
            curve = [(edits, value) for edits, value in curve if value is not None]
            if curve:
                style = "o-" if size == largest else "s--"
                colour = COLOURS.get(algorithm, OTHER)
                panel.plot(*zip(*curve, strict=True), style, color=colour, label=f"{algorithm}, batches of {size}")
        panel.set(title=measure.replace("_", " "), xlabel="edits")
        panel.grid(color="#d5d9de")
        if measure == "perplexity_ratio":
            # A destroyed model's perplexity is in the millions; within a decade a logarithmic axis has no readable
            # ticks.
            if max((point.perplexity_ratio for point in points), default=1.0) > 10:
                panel.set_yscale("log")
        else:
            panel.set_ylim(-0.03, 1.03)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
