"""Parse, call and print for `editlib demo`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from editlib.cli.options import Overwrite, Seed, out, print_table


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command()(demo)


def print_metrics(metrics: dict[str, Any]) -> None:
    """Prints the headline table in the terminal."""
    from editlib.reports.summary import summary_rows

    print_table([["metric", "value", "n", "meaning"], *summary_rows(metrics)])


def demo(
    out_dir: Annotated[Path, typer.Option("--out")] = Path("runs/demo"),
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Forgets real facts from a real model, end to end, and shows the result."""
    from editlib.jobs.demo import run_demo

    metrics = run_demo(out_dir, seed=seed, overwrite=overwrite)
    print_metrics(metrics)
    shown = [item for item in metrics["items"] if item["kind"] in ("request", "neighbour", "same_subject")]
    random.Random(seed).shuffle(shown)
    table = Table("kind", "question", "before", "after")
    for kind in ("request", "neighbour", "same_subject"):
        for item in [item for item in shown if item["kind"] == kind and item["counted"]][:4]:
            table.add_row(kind, item["question"], item["before"], item["after"])
    out.print(table)
    out.print(f"{out_dir}/report.html, {out_dir}/metrics.json, {out_dir}/model", soft_wrap=True)
