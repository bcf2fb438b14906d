"""Parse, call and print for `editlib bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from editlib.cli.options import (
    DeviceMapOption,
    Dtype,
    HeldOut,
    Prompts,
    Requests,
    Seed,
    SkipBad,
    StatsCorpus,
    StatsDir,
    out,
    print_table,
    prompt_settings,
    workbench,
)

bench_app = typer.Typer(no_args_is_help=True, help="Algorithms side by side on a data set.")


@bench_app.command("counterfact")
def bench_counterfact(
    requests: Requests,
    model: Annotated[str, typer.Option(help="a packaged model, a local folder or a Hugging Face id")] = "smollm2-135m",
    out_dir: Annotated[
        Path, typer.Option("--out", help="folder for bench.json, cells.jsonl, table.md, plot.png")
    ] = Path("runs/counterfact"),
    algorithms: Annotated[str, typer.Option(help="separated by commas")] = "FT,ROME,MEMIT,AlphaEdit",
    hparams: Annotated[
        list[str] | None, typer.Option(help="settings of one of them (MEMIT/mine.json); default: bundled ones")
    ] = None,
    edits: Annotated[str, typer.Option(help="numbers of edits after which to measure")] = "1,10,100,500",
    modes: Annotated[str, typer.Option(help="batch, sequential or both, separated by a comma")] = "batch,sequential",
    known: Annotated[bool, typer.Option("--known", help="only facts whose true answer the model gives")] = False,
    stats_dir: StatsDir = Path("stats"),
    corpus: StatsCorpus = "wiki-sample",
    text: HeldOut = "wiki-sample:heldout",
    prompts: Prompts = None,
    skip_bad: SkipBad = False,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMapOption = None,
) -> None:
    """Measures efficacy, generalisation and specificity over numbers of edits; resumes where it was stopped."""
    from editlib.benches.counterfact import bench_counterfact as run
    from editlib.benches.counterfact import check_facts, check_plan
    from editlib.benches.report import counterfact_rows, write_bench
    from editlib.editing import check_draft
    from editlib.files import check_folder
    from editlib.finding import fit_settings
    from editlib.models.loading import check_device
    from editlib.requests.reading import read_requests

    check_folder(out_dir)
    if device_map is not None:
        check_device(device_map)
    how = prompt_settings(prompts)
    plan = check_plan(model, algorithms, hparams or [], edits, modes, corpus=corpus, text=text)
    left_out: dict[str, list[str]] = {}
    wanted = read_requests(requests, skip_bad=skip_bad, left_out=left_out)
    usable = check_facts(wanted, plan.counts)

    def look(draft: Any) -> None:
        for settings in plan.settings:
            check_draft(draft, usable[: max(plan.counts)], settings, chat=False)

    bench = workbench(model, stats_dir, dtype, device_map, prompts=how, first=look)
    cells = run(
        bench,
        wanted,
        [fit_settings(bench, settings) for settings in plan.settings],
        out_dir,
        counts=plan.counts,
        modes=plan.modes,
        corpus=corpus,
        text=text,
        known=known,
        seed=seed,
        left_out=left_out,
    )
    print_table(counterfact_rows(cells))
    for path in write_bench(cells, out_dir):
        out.print(str(path), soft_wrap=True)


@bench_app.command("sequential")
def bench_sequential(
    model: Annotated[str, typer.Option(help="a packaged model, a local folder or a Hugging Face id")] = "smollm2-135m",
    out_dir: Annotated[Path, typer.Option("--out", help="folder for chains, points.jsonl, table.md, plot.png")] = Path(
        "runs/sequential"
    ),
    algorithms: Annotated[str, typer.Option(help="separated by commas")] = "UniErase,MEMIT,ROME",
    hparams: Annotated[
        list[str] | None, typer.Option(help="settings of one of them (MEMIT/mine.json); default: bundled ones")
    ] = None,
    sizes: Annotated[str, typer.Option(help="requests per batch; each size has its own chain")] = "10,1",
    points: Annotated[int, typer.Option(min=1, help="how often each chain is measured")] = 5,
    prompts: Prompts = None,
    stats_dir: StatsDir = Path("stats"),
    text: HeldOut = "wiki-sample:heldout",
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMapOption = None,
) -> None:
    """Forgets 100 bundled facts that the model knows, batch after batch; resumes where it was stopped."""
    from editlib.benches.report import sequential_rows, write_sequential
    from editlib.benches.sequential import bench_sequential as run
    from editlib.benches.sequential import check_plan
    from editlib.editing import check_draft
    from editlib.files import check_folder

    check_folder(out_dir)
    how = prompt_settings(prompts)
    settings, wanted = check_plan(model, algorithms, hparams or [], sizes, text=text)

    def look(draft: Any) -> None:
        for setting in settings:
            check_draft(draft, [], setting)

    points_measured = run(
        lambda: workbench(model, stats_dir, dtype, device_map, prompts=how, first=look),
        settings,
        wanted,
        out_dir,
        points=points,
        text=text,
        seed=seed,
    )
    print_table(sequential_rows(points_measured))
    for path in write_sequential(points_measured, out_dir):
        out.print(str(path), soft_wrap=True)
