"""Parse, call and print for `editlib attack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from editlib.cli.options import (
    DeviceMapOption,
    Dtype,
    Overwrite,
    Prompts,
    Requests,
    Seed,
    SkipBad,
    out,
    print_table,
    prompt_settings,
)


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command()(attack)


def attack(
    base: Annotated[str, typer.Argument(help="the model before the edit")],
    edited: Annotated[str, typer.Argument(help="the model after it")],
    requests: Requests,
    out_dir: Annotated[Path, typer.Option("--out", help="folder for attacks.json and table.md")],
    control: Annotated[Path | None, typer.Option(help="facts that the base does not know; default: bundled")] = None,
    known: Annotated[Path | None, typer.Option(help="facts for few-shot examples; default: bundled")] = None,
    attacks: Annotated[
        str | None, typer.Option("--attacks", "--names", help="names, separated by commas; default: all")
    ] = None,
    samples: Annotated[int, typer.Option(help="answers sampled for each question by the attack `sampling`")] = 8,
    skip_bad: SkipBad = False,
    frames: Annotated[Path | None, typer.Option(help="`language`: questions in other languages, JSONL")] = None,
    endings: Annotated[int, typer.Option(min=0, help="letters of an inflected ending that an answer may have")] = 0,
    prompts: Prompts = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMapOption = None,
    overwrite: Overwrite = False,
) -> None:
    """Tries to recover every forgotten fact, see docs/reference/attacks.md; resumes where it was stopped."""
    from editlib.attacks.settings import AttackSettings
    from editlib.jobs.attack import attack_folders, table_rows

    report = attack_folders(
        base,
        edited,
        requests,
        out_dir,
        control_file=control,
        known_file=known,
        attacks=None if attacks is None else attacks.split(","),
        settings=AttackSettings(samples=samples, frames=None if frames is None else str(frames), endings=endings),
        skip_bad=skip_bad,
        prompts=prompt_settings(prompts),
        seed=seed,
        dtype=dtype,
        device_map=device_map,
        overwrite=overwrite,
    )
    print_table(table_rows(report, short=True))
    out.print(str(out_dir / "table.md"), soft_wrap=True)
