"""Parse, call and print for `editlib hparams` and `editlib tune`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from editlib.cli.options import (
    DeviceMapOption,
    Dtype,
    HeldOut,
    Hparams,
    Model,
    Overwrite,
    Prompts,
    Requests,
    Retain,
    Seed,
    SkipBad,
    StatsCorpus,
    StatsDir,
    out,
    print_table,
    prompt_settings,
    workbench,
)

hparams_app = typer.Typer(no_args_is_help=True, help="Settings of an algorithm for a model.")


@hparams_app.command()
def new(
    model: Model,
    algorithm: Annotated[str, typer.Option(help="see `editlib algorithms`")] = "UniErase",
    values: Annotated[
        str, typer.Option(help="UniErase: values by descent towards a refusal, or from rows, which erase the answer")
    ] = "descent",
    out_file: Annotated[Path | None, typer.Option("--out", help="a JSON file; default: standard output")] = None,
    trace: Annotated[
        bool, typer.Option(help="load the model and trace up to which layer it reads a subject; else by depth")
    ] = True,
    dtype: Dtype = None,
    device_map: DeviceMapOption = None,
    overwrite: Overwrite = False,
) -> None:
    """Writes all settings for a model: bundled ones, or derived ones with a note on the origin of each."""
    from editlib.files import check_file, write_json
    from editlib.finding import find_settings, fit_settings, is_derived, settings_file

    if out_file is not None:
        check_file(out_file, overwrite=overwrite)
    settings = find_settings(model, algorithm, values=values)
    if trace and is_derived(settings):
        settings = fit_settings(workbench(model, Path("stats"), dtype, device_map), settings)
    if out_file is None:
        typer.echo(json.dumps(settings_file(settings), indent=1, ensure_ascii=False))
        return
    write_json(out_file, settings_file(settings))
    out.print(str(out_file), soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command()(tune)


def tune(
    model: Model,
    requests: Requests,
    budget: Annotated[float, typer.Option(min=0, help="minutes after which no new trial starts")],
    out_dir: Annotated[Path, typer.Option("--out", help="folder for best.json, tune.json, table.md and trials")] = Path(
        "runs/tune"
    ),
    retain: Retain = None,
    hparams: Hparams = None,
    stats_dir: StatsDir = Path("stats"),
    corpus: StatsCorpus = "wiki-sample",
    text: HeldOut = "wiki-sample:heldout",
    prompts: Prompts = None,
    skip_bad: SkipBad = False,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMapOption = None,
) -> None:
    """Searches UniErase's settings on your own held-out wordings and neighbours; resumes where it was stopped."""
    from editlib.data import retain_prompts
    from editlib.editing import check_draft, check_given
    from editlib.finding import find_settings, fit_settings
    from editlib.jobs.trials import parted
    from editlib.jobs.tune import check_tuning, table_rows
    from editlib.jobs.tune import tune as run
    from editlib.requests.reading import guess_subjects, read_with_retain
    from editlib.shelf import Finished
    from editlib.stats.corpus import check_corpus

    Finished(out_dir)
    how = prompt_settings(prompts)
    left_out: dict[str, list[str]] = {}
    given, kept = read_with_retain(requests, retain, skip_bad=skip_bad, left_out=left_out, tell_missing=False)
    wanted, _ = guess_subjects(given, otherwise_last=True)  # as `unlearn` asks them, with --last-token
    settings = find_settings(model, "UniErase", hparams)
    check_tuning(wanted, settings, budget)
    check_given(settings, corpus=corpus)
    check_corpus(text)
    anchors = retain_prompts(wanted) if kept is None else kept
    parted(wanted, anchors, seed)
    look = partial(check_draft, requests=wanted, hparams=settings, kept=anchors)
    bench = workbench(model, stats_dir, dtype, device_map, prompts=how, first=look)
    tuned = run(
        bench,
        wanted,
        fit_settings(bench, settings),
        out_dir,
        minutes=budget,
        retain=kept,
        corpus=corpus,
        text=text,
        seed=seed,
        left_out=left_out,
    )
    print_table(table_rows(tuned))
    out.print(str(out_dir / "best.json"), soft_wrap=True)
    if tuned.interrupted:
        raise KeyboardInterrupt
