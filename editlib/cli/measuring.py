"""The commands that ask and measure: parse, call, print."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from editlib.cli.options import DeviceMap, Dtype, Model, Overwrite, Requests, Seed, StatsDir, out, workbench

bench_app = typer.Typer(no_args_is_help=True, help="Algorithms side by side on a data set.")


def register(app: typer.Typer) -> None:
    """Adds the commands to `app`."""
    app.command()(attack)
    app.command()(ask)
    app.command()(demo)
    app.add_typer(bench_app, name="bench")


def print_metrics(metrics: dict[str, Any]) -> None:
    """The headline table in the terminal."""
    from editlib.evaluation.report import summary_rows

    table = Table("metric", "value", "n", "meaning")
    for row in summary_rows(metrics):
        table.add_row(*row)
    out.print(table)


def attack(
    base: Annotated[str, typer.Argument(help="the model before the edit")],
    edited: Annotated[str, typer.Argument(help="the model after it")],
    requests: Requests,
    out_dir: Annotated[Path, typer.Option("--out", help="gets attacks.json and table.md")],
    control: Annotated[Path | None, typer.Option(help="facts that the base never knew; default: bundled")] = None,
    known: Annotated[Path | None, typer.Option(help="facts for few-shot examples; default: bundled")] = None,
    attacks: Annotated[str | None, typer.Option(help="names, separated by commas; default: all")] = None,
    samples: Annotated[int, typer.Option(help="answers drawn for each question by the attack `sampling`")] = 8,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
    overwrite: Overwrite = False,
) -> None:
    """Tries to bring every forgotten fact back, see docs/attacks.md; goes on where it was stopped."""
    from editlib.attacks.job import attack_folders, table_rows
    from editlib.attacks.settings import AttackSettings

    report = attack_folders(
        base,
        edited,
        requests,
        out_dir,
        control_file=control,
        known_file=known,
        attacks=None if attacks is None else attacks.split(","),
        settings=AttackSettings(samples=samples),
        seed=seed,
        dtype=dtype,
        device_map=device_map,
        overwrite=overwrite,
    )
    head, *rows = table_rows(report, short=True)
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    out.print(table)
    out.print(str(out_dir / "table.md"), soft_wrap=True)


def ask(
    model: Model,
    questions: Annotated[list[str], typer.Argument(help="one or more questions")],
    vs: Annotated[str | None, typer.Option(help="another model to ask too")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 48,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
) -> None:
    """Asks a model, or two side by side, and prints the greedy answers."""
    from editlib.evaluation.facts import ask as ask_model
    from editlib.models.anatomy import anatomy
    from editlib.models.loading import load

    columns = {}
    for name in dict.fromkeys([model, *([vs] if vs else [])]):
        loaded, tok = load(name, dtype=dtype, device_map=device_map)
        answers = ask_model(anatomy(loaded), tok, questions, max_new_tokens=max_new_tokens)
        columns[name] = {
            question: tok.decode(ids, skip_special_tokens=True).strip() for question, ids in answers.items()
        }
    table = Table("question", *columns)
    for question in dict.fromkeys(questions):
        table.add_row(question, *[answers[question] for answers in columns.values()])
    out.print(table)


@bench_app.command("counterfact")
def bench_counterfact(
    requests: Requests,
    model: Annotated[str, typer.Option(help="a packaged model, a local folder or a Hugging Face id")] = "smollm2-135m",
    out_dir: Annotated[Path, typer.Option("--out", help="gets cells.jsonl, table.md and plot.png")] = Path(
        "runs/counterfact"
    ),
    algorithms: Annotated[str, typer.Option(help="separated by commas")] = "FT,ROME,MEMIT,AlphaEdit",
    hparams: Annotated[
        list[str] | None, typer.Option(help="settings of one of them (MEMIT/mine.json); default: bundled ones")
    ] = None,
    edits: Annotated[str, typer.Option(help="numbers of edits to measure at")] = "1,10,100,500",
    modes: Annotated[str, typer.Option(help="batch, sequential or both, separated by a comma")] = "batch,sequential",
    known: Annotated[bool, typer.Option("--known", help="only facts whose true answer the model gives")] = False,
    stats_dir: StatsDir = Path("stats"),
    corpus: Annotated[str, typer.Option(help="for statistics that have to be made first")] = "wiki-sample",
    text: Annotated[str, typer.Option(help="corpus for perplexity")] = "wiki-sample:heldout",
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
) -> None:
    """Efficacy, generalisation and specificity over numbers of edits; goes on where it was stopped."""
    from editlib.evaluation.bench import bench_counterfact as run
    from editlib.evaluation.bench import check_plan
    from editlib.evaluation.bench_report import table_rows, write_bench
    from editlib.request import read_requests

    plan = check_plan(model, algorithms, hparams or [], edits, modes)
    wanted = read_requests(requests)
    cells = run(
        workbench(model, stats_dir, dtype, device_map),
        wanted,
        plan.settings,
        out_dir,
        counts=plan.counts,
        modes=plan.modes,
        corpus=corpus,
        text=text,
        known=known,
        seed=seed,
    )
    head, *rows = table_rows(cells)
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    out.print(table)
    for path in write_bench(cells, out_dir):
        out.print(str(path), soft_wrap=True)


@bench_app.command("sequential")
def bench_sequential(
    model: Annotated[str, typer.Option(help="a packaged model, a local folder or a Hugging Face id")] = "smollm2-135m",
    out_dir: Annotated[Path, typer.Option("--out", help="gets the chains, points.jsonl, table.md and plot.png")] = Path(
        "runs/sequential"
    ),
    algorithms: Annotated[str, typer.Option(help="separated by commas")] = "UniErase,MEMIT,ROME",
    hparams: Annotated[
        list[str] | None, typer.Option(help="settings of one of them (MEMIT/mine.json); default: bundled ones")
    ] = None,
    sizes: Annotated[str, typer.Option(help="requests a batch: a chain each")] = "10,1",
    points: Annotated[int, typer.Option(min=1, help="how often a chain is measured on its way")] = 5,
    stats_dir: StatsDir = Path("stats"),
    text: Annotated[str, typer.Option(help="corpus for perplexity")] = "wiki-sample:heldout",
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
) -> None:
    """Forgets 100 bundled facts that the model knows, batch after batch; goes on where it was stopped."""
    from editlib.sequential import bench_sequential as run
    from editlib.sequential import check_plan
    from editlib.sequential.report import table_rows, write_sequential

    settings, wanted = check_plan(model, algorithms, hparams or [], sizes)
    found = run(
        lambda: workbench(model, stats_dir, dtype, device_map),
        settings,
        wanted,
        out_dir,
        points=points,
        text=text,
        seed=seed,
    )
    head, *rows = table_rows(found)
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    out.print(table)
    for path in write_sequential(found, out_dir):
        out.print(str(path), soft_wrap=True)


def demo(
    out_dir: Annotated[Path, typer.Option("--out")] = Path("runs/demo"),
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Forgets real facts from a real model, end to end, and shows what came of it."""
    from editlib.demo import run_demo

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
