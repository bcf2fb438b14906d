"""Parse, call and print for the commands that change a model."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from editlib.cli.options import (
    OR_LAST,
    Algorithm,
    DeltaFile,
    DeviceMapOption,
    Dtype,
    Hparams,
    LastToken,
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
    prompt_settings,
    workbench,
)


def register(app: typer.Typer) -> None:
    """Adds the commands to `app`."""
    for command in (token, unlearn, edit, algorithms):
        app.command()(command)


def token(
    model: Model,
    out_file: Annotated[Path | None, typer.Option("--out", help="default: beside the statistics")] = None,
    refusals: Annotated[Path | None, typer.Option(help="your own refusals, one per line")] = None,
    steps: Annotated[int, typer.Option(min=1, help="optimiser steps")] = 70,
    stats_dir: StatsDir = Path("stats"),
    prompts: Prompts = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMapOption = None,
) -> None:
    """Learns the unlearning token of a model, once (phase I); later edits reuse it."""
    from editlib import data
    from editlib.algorithms.unierase.token import UnlearningToken
    from editlib.algorithms.unierase.token_learning import TokenHyperParams
    from editlib.files import check_file

    if out_file is not None:
        check_file(out_file, overwrite=True)
        if out_file.exists():
            UnlearningToken.load(out_file)  # another kind of file is not replaced
    data.refusals(refusals)
    bench = workbench(model, stats_dir, dtype, device_map, prompts=prompt_settings(prompts))
    hparams = TokenHyperParams(steps=steps, robust_steps=steps * 5 // 7, seed=seed)
    learned = bench.make_token(refusals=refusals, hparams=hparams, path=out_file)
    numbers = learned.header.metrics
    out.print(
        f"{learned.header.token}: refusal NLL {numbers['refusal_nll']:.2f} nats per token (lower is better), largest "
        f"probability on ordinary text {numbers['largest_probability_on_ordinary_text']:.1e} (lower is better)"
    )
    out.print(str(out_file or bench.token_path), soft_wrap=True)


def unlearn(
    model: Model,
    requests: Requests,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="folder of the edited model; not needed with --show-rows")
    ] = None,
    retain: Retain = None,
    hparams: Hparams = None,
    token_file: Annotated[Path | None, typer.Option("--token", help="a token from `editlib token`")] = None,
    stats_dir: StatsDir = Path("stats"),
    corpus: StatsCorpus = "wiki-sample",
    prompts: Prompts = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMapOption = None,
    delta: DeltaFile = None,
    skip_bad: SkipBad = False,
    show_rows: Annotated[
        bool, typer.Option("--show-rows", help="print the questions of each request without editing")
    ] = False,
    last_token: LastToken = False,
    overwrite: Overwrite = False,
) -> None:
    """Erases the answers of --requests, makes the model refuse instead, and writes it as an ordinary folder.

    Without an "answer", or with a --token, questions are only refused: the knowledge stays in the model.
    """
    from editlib.data import retain_prompts
    from editlib.editing import check_draft, check_given, check_wanted
    from editlib.errors import OutputError
    from editlib.finding import find_settings, fit_settings, usual_values
    from editlib.jobs.edit import check_places
    from editlib.jobs.edit import unlearn as run
    from editlib.jobs.verdict import spot_check
    from editlib.requests.reading import guess_subjects, read_with_retain

    inputs = (model, requests, retain, hparams, token_file, stats_dir)
    if out_dir is not None:
        check_places(out_dir, delta, overwrite=overwrite, inputs=inputs)
    elif not show_rows:
        raise OutputError("--out is not given; expected a folder for the edited model; give one, or use --show-rows")
    how = prompt_settings(prompts)
    left_out: dict[str, list[str]] = {}
    given, kept = read_with_retain(requests, retain, skip_bad=skip_bad, left_out=left_out, tell_missing=False)
    wanted, guessed = guess_subjects(given, otherwise_last=last_token, remedy=OR_LAST)
    # A given token needs values by descent.
    how_found = {} if hparams or token_file else {"values": usual_values(wanted)}
    settings = find_settings(model, "UniErase", hparams, **how_found)
    check_wanted(wanted, settings)
    check_given(settings, token=token_file, corpus=corpus)
    anchors = retain_prompts(wanted) if kept is None else kept
    place = None if show_rows else out_dir
    look = partial(check_draft, requests=wanted, hparams=settings, kept=anchors, out=place, token=token_file)
    bench = workbench(model, stats_dir, dtype, device_map, prompts=how, first=look)
    settings = fit_settings(bench, settings)
    if show_rows or out_dir is None:
        _print_rows(bench, wanted, settings, kept)
        return
    with spot_check(bench, wanted) as verdict:
        result, receipt = run(
            bench, wanted, settings, out_dir, retain=kept, token=token_file, corpus=corpus, seed=seed, delta=delta,
            overwrite=overwrite, left_out=left_out, as_given=given, guessed=guessed,
        )  # fmt: skip
    _norms_table(result, receipt)
    out.print(str(out_dir), soft_wrap=True)
    _say_next(verdict, model, out_dir, requests, wanted[0].question)


def _say_next(verdict: list[str], model: str, out_dir: Path, requests: Path, question: str) -> None:
    """Prints what the edited model answers, and the commands that come next."""
    for line in verdict:
        out.print(line, soft_wrap=True, highlight=False)
    measured = [model, str(out_dir), "--requests", str(requests), "--out"]
    for command in (
        ["ask", model, "--vs", str(out_dir), question],
        ["eval", *measured, f"{out_dir}-report"],
        ["attack", *measured, f"{out_dir}-attacks"],
    ):
        out.print(f"next: {shlex.join(['editlib', *command])}", soft_wrap=True, highlight=False)


def _print_rows(bench: Any, wanted: Any, settings: Any, kept: Any) -> None:
    """Prints the wordings, sentences, rivals and sibling questions made for each request."""
    from editlib.jobs.edit import rows_of

    for made in rows_of(bench, wanted, settings, retain=kept):
        known = "" if made.known else "; the model does not know it"
        out.print(Text.assemble((made.id, "bold"), f" ({made.kind}{known})"))
        for name, texts in (
            ("asked as", made.wordings),
            ("erased after", [text or "(the question)" for text in made.sentences]),
            ("rivals", made.rivals or ["(the likeliest other tokens)"]),
            ("kept", [f"{question} {answer}" for question, answer in made.siblings.items()]),
        ):
            for text in texts:
                out.print(f"  {name}: {text}", soft_wrap=True, highlight=False)


def _norms_table(result: Any, receipt: dict[str, Any]) -> None:
    """Shows the size of an edit and its cost."""
    table = Table("layer", "|update|", "|weight|", "ratio")
    for layer, norms in receipt["layers"].items():
        table.add_row(layer, f"{norms['update']:.2f}", f"{norms['weight']:.2f}", f"{norms['ratio']:.3f}")
    out.print(table)
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in receipt["timings"].items())
    held = f", {len(result.anchors)} anchors" if result.anchors else ""
    out.print(f"{receipt['algorithm']}: {len(receipt['requests'])} requests{held}; {seconds}")


def edit(
    model: Model,
    requests: Annotated[Path, typer.Option(help="facts with their new answers: JSONL, CounterFact, zsRE, ...")],
    out_dir: Annotated[Path, typer.Option("--out", help="folder of the edited model")],
    hparams: Hparams = None,
    algorithm: Algorithm = None,
    stats_dir: StatsDir = Path("stats"),
    corpus: StatsCorpus = "wiki-sample",
    chat: Annotated[bool, typer.Option("--chat", help="ask through the chat template")] = False,
    prompts: Prompts = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMapOption = None,
    delta: DeltaFile = None,
    skip_bad: SkipBad = False,
    last_token: LastToken = False,
    overwrite: Overwrite = False,
) -> None:
    """Edits facts towards new answers with any algorithm and writes the model as an ordinary folder."""
    from editlib.editing import check_draft, check_given, check_last_token, check_wanted, subjects_for
    from editlib.errors import HparamsError
    from editlib.finding import find_settings, fit_settings
    from editlib.jobs.edit import check_places
    from editlib.jobs.edit import edit as run
    from editlib.requests.reading import read_requests

    check_places(out_dir, delta, overwrite=overwrite, inputs=(model, requests, hparams, stats_dir))
    how = prompt_settings(prompts)
    if hparams is None and algorithm is None:
        raise HparamsError("which algorithm? give --algorithm (see `editlib algorithms`), or a file with --hparams")
    settings = find_settings(model, algorithm, hparams)
    if not settings.has_target:
        unlearn(
            model, requests, out_dir, hparams=hparams, stats_dir=stats_dir, corpus=corpus, prompts=prompts, seed=seed,
            dtype=dtype, device_map=device_map, delta=delta, skip_bad=skip_bad, last_token=last_token,
            overwrite=overwrite,
        )  # fmt: skip
        return
    check_last_token(last_token, settings)
    left_out: dict[str, list[str]] = {}
    given = read_requests(requests, skip_bad=skip_bad, left_out=left_out, tell_missing=False)
    wanted, guessed = subjects_for(given, settings)
    check_wanted(wanted, settings)
    check_given(settings, corpus=corpus)
    look = partial(check_draft, requests=wanted, hparams=settings, chat=chat, out=out_dir)
    bench = workbench(model, stats_dir, dtype, device_map, prompts=how, first=look)
    settings = fit_settings(bench, settings)
    result, receipt = run(
        bench, wanted, settings, out_dir, corpus=corpus, chat=chat, seed=seed, delta=delta, overwrite=overwrite,
        left_out=left_out, as_given=given, guessed=guessed,
    )  # fmt: skip
    _norms_table(result, receipt)
    out.print(str(out_dir), soft_wrap=True)


def algorithms() -> None:
    """Lists the algorithms with their papers and bundled settings."""
    from editlib.hparams import ALGORITHMS, available

    table = Table("algorithm", "what it does", "paper", "bundled settings")
    for name, kind in ALGORITHMS.items():
        table.add_row(name, kind.summary, kind.paper, ", ".join(available(name)) or "-")
    out.print(table)
