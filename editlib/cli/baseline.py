"""Parse, call and print for `editlib baseline` and `editlib baselines`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from editlib.cli.options import (
    DeviceMapOption,
    Dtype,
    Model,
    Overwrite,
    Prompts,
    Requests,
    Retain,
    Seed,
    SkipBad,
    StatsDir,
    out,
    prompt_settings,
)


def register(app: typer.Typer) -> None:
    """Adds the commands to `app`."""
    app.command()(baseline)
    app.command()(baselines)


def baseline(
    model: Model,
    method: Annotated[str, typer.Option(help="one of `editlib baselines`, such as NPO+GD")],
    requests: Requests,
    out_dir: Annotated[Path, typer.Option("--out", help="folder of the model that was made to forget")],
    retain: Retain = None,
    search: Annotated[
        int | None,
        typer.Option(min=1, help="number of learning rates to search first, see --max-steps"),
    ] = None,
    max_steps: Annotated[int, typer.Option(min=1, help="search: steps of each run")] = 60,
    points: Annotated[int, typer.Option(min=1, help="search: numbers of steps at which a run is measured")] = 3,
    low: Annotated[float | None, typer.Option(help="lowest learning rate of a search; default: the method's")] = None,
    high: Annotated[float | None, typer.Option(help="highest learning rate of a search; default: the method's")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="learning rate, without a search")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="without a search")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    beta: Annotated[float | None, typer.Option(help="of NPO, SimNPO, DPO, AP")] = None,
    retain_weight: Annotated[float, typer.Option(help="weight of the loss on prompts to keep")] = 1.0,
    rank: Annotated[
        int | None, typer.Option(min=1, help="train a LoRA adapter of this rank, merged at the end")
    ] = None,
    hparams: Annotated[str | None, typer.Option(help="settings of an editor; default: those of the model")] = None,
    stats_dir: StatsDir = Path("stats"),
    corpus: Annotated[str, typer.Option(help="text for an editor's missing statistics")] = "wiki-sample",
    prompts: Prompts = None,
    skip_bad: SkipBad = False,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMapOption = None,
    overwrite: Overwrite = False,
) -> None:
    """Makes a model forget with a baseline method, for comparison; resumes an interrupted search."""
    from editlib.baselines import BaselineSettings, Budget
    from editlib.errors import HparamsError
    from editlib.jobs.baseline import baseline_folder

    if search is not None and (learning_rate is not None or steps is not None):
        raise HparamsError("--search looks for learning rate and steps itself; leave --learning-rate and --steps out")
    if search is None and (low is not None or high is not None):
        raise HparamsError("--low and --high are the range of a search; give --search, or leave them out")
    how = prompt_settings(prompts)
    settings = BaselineSettings(
        learning_rate=learning_rate,
        steps=steps,
        batch_size=batch_size,
        beta=beta,
        retain_weight=retain_weight,
        rank=rank,
        hparams=hparams,
        stats_dir=stats_dir,
        corpus=corpus,
    )
    budget = None if search is None else Budget(rates=search, steps=max_steps, points=points, low=low, high=high)
    receipt = baseline_folder(
        method, model, requests, out_dir, retain_file=retain, settings=settings, budget=budget,
        skip_bad=skip_bad, prompts=how, seed=seed, dtype=dtype, device_map=device_map, overwrite=overwrite,
    )  # fmt: skip
    search_result = receipt["baseline"]["search"]
    if search_result is not None:
        _trials_table(search_result)
    done = receipt["baseline"]
    out.print(
        f"{done['name']}: {len(receipt['requests'])} requests, {done['steps']} steps, {done['parameters']} parameters "
        f"touched, {receipt['timings']['training']:.0f} s",
        highlight=False,
    )
    out.print(str(out_dir), soft_wrap=True)


def _trials_table(found: dict[str, Any]) -> None:
    """Returns every trial of a search, the chosen one marked."""
    table = Table("", "learning rate", "steps", "forgetting", "retention", "balance", "seconds")
    for trial in found["trials"]:
        shares = [f"{trial[name]:.2f}" for name in ("forgetting", "retention", "balance")]
        mark = "*" if trial == found["chosen"] else ""
        knobs = ["-" if trial[name] is None else f"{trial[name]:g}" for name in ("learning_rate", "steps")]
        table.add_row(
            mark, *knobs, *(shares if trial["failed"] is None else ["failed", "", ""]), f"{trial['seconds']:.0f}"
        )
    out.print(table)
    if found["edges"]:
        out.print(f"the best trial lies at an edge of the search: {', '.join(found['edges'])}")


def baselines() -> None:
    """Lists the baselines with their sources."""
    from editlib.baselines import BASELINES

    table = Table("baseline", "what it does", "source")
    for name, entry in BASELINES.items():
        table.add_row(name, entry.meaning, entry.source)
    out.print(table)
