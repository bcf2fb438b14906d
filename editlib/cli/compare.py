"""Parse, call and print for `editlib compare`."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from editlib.cli.options import out
from editlib.errors import EditlibError

SOME_FAILED = 3  # the exit code if cells failed and everything else is written


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command()(compare)


def compare(
    config: Annotated[Path, typer.Option(help="what to compare: JSON or TOML, see docs/how-to/compare-methods.md")],
    out_dir: Annotated[Path, typer.Option("--out", help="folder for results.json, table.md, report.html")],
) -> None:
    """Runs methods x seeds x sets, side by side in one table and one page; resumes where it was stopped; under
    torchrun, on several processes."""
    from editlib.comparison import compare as run
    from editlib.comparison import read_config
    from editlib.comparison.report.files import write_all
    from editlib.comparison.report.tables import main_table
    from editlib.distributed import processes

    first = os.environ.get("RANK", "0") == "0"
    if not first:
        logging.getLogger("editlib").setLevel(logging.ERROR)
    try:
        plan = read_config(config)
        with processes() as shard:
            results = run(plan, out_dir, shard=shard)
    except EditlibError:
        if first:
            raise
        return  # the first process has the same error and reports it; torchrun would stop it at an exit code
    if not first:
        return
    paths = write_all(results, out_dir)
    for name in results["sets"]:
        head, *rows = main_table(results, name)
        first_column = Column(head[0], no_wrap=True, min_width=max(len(row[0]) for row in rows))
        table = Table(first_column, *head[1:], title=name, title_justify="left")
        for row in rows:
            table.add_row(*row)
        out.print(table)
    for path in paths:
        out.print(str(path), soft_wrap=True)
    failed = [cell for cell in results["cells"] if cell["failed"]]
    for cell in failed:
        seed = "" if cell["seed"] is None else f", seed {cell['seed']}"
        sys.stderr.write(f"editlib: failed: {cell['set']}, {cell['method']}{seed}: {cell['failed']}\n")
    if failed:
        raise SystemExit(SOME_FAILED)
