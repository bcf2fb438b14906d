"""`editlib hparams`: parse, call, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from editlib.cli.options import DeviceMap, Dtype, Model, Overwrite, out, workbench

hparams_app = typer.Typer(no_args_is_help=True, help="Settings of an algorithm for a model.")


@hparams_app.command()
def new(
    model: Model,
    algorithm: Annotated[str, typer.Option(help="see `editlib algorithms`")] = "UniErase",
    out_file: Annotated[Path | None, typer.Option("--out", help="a JSON file; default: standard output")] = None,
    trace: Annotated[
        bool, typer.Option(help="load the model, and see up to which layer it reads a subject; else by depth alone")
    ] = True,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    overwrite: Overwrite = False,
) -> None:
    """Writes all settings for a model: those that ship for it, or derived ones with a note on where each comes from."""
    from editlib.files import check_file, write_json
    from editlib.finding import find_settings, fit_settings, is_derived, settings_file

    if out_file is not None:
        check_file(out_file, overwrite=overwrite)
    settings = find_settings(model, algorithm)
    if trace and is_derived(settings):
        settings = fit_settings(workbench(model, Path("stats"), dtype, device_map), settings)
    if out_file is None:
        typer.echo(json.dumps(settings_file(settings), indent=1, ensure_ascii=False))
        return
    write_json(out_file, settings_file(settings))
    out.print(str(out_file), soft_wrap=True)
