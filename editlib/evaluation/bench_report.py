"""A benchmark's cells as a table and as one plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from editlib.models.files import atomic_path

if TYPE_CHECKING:
    from editlib.evaluation.bench import Cell

MEASURES = ("efficacy", "generalisation", "specificity")
COLOURS = {"FT": "#8a6d1d", "ROME": "#b4511f", "MEMIT": "#2f6f9f", "AlphaEdit": "#2f7d4f"}
OTHER = "#6b4c9a"


def table_rows(cells: Sequence[Cell]) -> list[list[str]]:
    """Head and rows: shares in 0..1 (higher is better), perplexity (lower is better), seconds."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    rows = [["algorithm", "mode", "edits", *MEASURES, "generated", "perplexity", "seconds"]]
    for cell in cells:
        shares = [share(getattr(cell, name)) for name in (*MEASURES, "generated")]
        size = f"{cell.perplexity:.1f}" if cell.perplexity < 1e4 else f"{cell.perplexity:.0e}"
        rows.append([cell.algorithm, cell.mode, str(cell.edits), *shares, size, f"{cell.seconds:.0f}"])
    return rows


def write_bench(cells: Sequence[Cell], out: Path) -> list[Path]:
    """Writes `table.md` and `plot.png` to `out`; returns their paths."""
    table, plot = out / "table.md", out / "plot.png"
    write_table(table_rows(cells), table)
    _draw(cells, plot)
    return [table, plot]


def write_table(rows: Sequence[Sequence[str]], path: Path, note: str = "") -> None:
    """Writes head and rows as a Markdown table, with a `note` below."""
    head, *rest = rows
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rest)]
    lines += ["", note] if note else []
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _draw(cells: Sequence[Cell], path: Path) -> None:
    """A row of panels a mode, one panel a measure, over the number of edits."""
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
    # ROME has no batches: no one panel shows every line.
    lines = {
        label: line for panel in figure.axes for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    shown = [name for name in (*names, "unedited") if name in lines]
    axes[0][0].legend([lines[name] for name in shown], shown, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
