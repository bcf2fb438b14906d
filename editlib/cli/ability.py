"""Parse, call and print for `editlib ability`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from editlib.cli.options import DeviceMapOption, Dtype, Overwrite, Prompts, out, print_table, prompt_settings


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command()(ability)


def ability(
    base: Annotated[str, typer.Argument(help="the model before the edit")],
    out_dir: Annotated[Path, typer.Option("--out", help="folder for ability.json and table.md; a run resumes from it")],
    edited: Annotated[list[str] | None, typer.Argument(help="models to compare with it")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="lm-eval's names, its task files (.yaml), or files of questions (.jsonl), with commas"),
    ] = None,
    text: Annotated[str, typer.Option(help="corpus for perplexity, or none")] = "wiki-sample:heldout",
    limit: Annotated[int | None, typer.Option(min=1, help="use only the first N documents of each task")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="draw the --limit documents at random with this seed")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="rows at a time")] = 4,
    prompts: Prompts = None,
    dtype: Dtype = None,
    device_map: DeviceMapOption = None,
    overwrite: Overwrite = False,
) -> None:
    """Measures what models can still do: perplexity and lm-eval tasks, side by side; resumes after an interruption."""
    from editlib.ability import run_ability
    from editlib.ability.report import table_rows

    report = run_ability(
        {model: model for model in (base, *(edited or []))},
        [name.strip() for name in (tasks or "").split(",") if name.strip()],
        text=None if text == "none" else text,
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        dtype=dtype,
        device_map=device_map,
        out=out_dir,
        prompts=prompt_settings(prompts),
        overwrite=overwrite,
    )
    print_table(table_rows(report))
    out.print(str(out_dir / "table.md"), soft_wrap=True)
