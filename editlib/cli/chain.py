"""Parse, call and print for `editlib chain ...`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from editlib.cli.export import tell_adapter, tell_receipt
from editlib.cli.options import (
    OR_LAST,
    Algorithm,
    DeviceMapOption,
    Dtype,
    Hparams,
    LastToken,
    Overwrite,
    Prompts,
    Retain,
    Seed,
    SkipBad,
    StatsCorpus,
    out,
    prompt_settings,
)
from editlib.errors import OutputError

chain_app = typer.Typer(
    no_args_is_help=True, help="Edits in batches, kept in a folder: resume, verify, undo and revoke them."
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="the chain's folder")]
BaseModel = Annotated[str | None, typer.Option("--model", help="the base model, if it has moved")]
MovedStatsDir = Annotated[Path | None, typer.Option(help="the layer statistics, if they have moved")]


@chain_app.command()
def init(
    folder: Folder,
    model: Annotated[str, typer.Option(help="a packaged model (smollm2-135m), a local folder or a Hugging Face id")],
    hparams: Hparams = None,
    algorithm: Algorithm = None,
    retain: Retain = None,
    token_file: Annotated[Path | None, typer.Option("--token", help="a token from `editlib token`")] = None,
    stats_dir: Annotated[Path, typer.Option(help="folder of the statistics and the token")] = Path("stats"),
    corpus: StatsCorpus = "wiki-sample",
    chat: Annotated[bool, typer.Option("--chat", help="ask through the chat template")] = False,
    skip_bad: SkipBad = False,
    prompts: Prompts = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMapOption = None,
) -> None:
    """Starts a chain of edits of one model."""
    from editlib.chain import Chain
    from editlib.chain.create import check_start
    from editlib.editing import check_draft, check_given
    from editlib.finding import find_settings, fit_settings
    from editlib.requests.reading import read_requests
    from editlib.workbench import Workbench

    settings = find_settings(model, algorithm, hparams)
    check_start(folder, settings, retain=retain is not None, token=token_file is not None)
    check_given(settings, token=token_file, corpus=corpus)
    left_out: dict[str, list[str]] = {}
    kept = None if retain is None else read_requests(retain, skip_bad=skip_bad, left_out=left_out)
    how = prompt_settings(prompts)
    asked = (chat or None) if not settings.has_target else chat
    look = partial(check_draft, requests=[], hparams=settings, kept=kept or (), chat=asked, token=token_file)
    bench = Workbench.load(model, stats_dir, dtype=dtype, device_map=device_map, prompts=how, first=look)
    chain = Chain.create(
        folder,
        bench,
        fit_settings(bench, settings),
        retain=kept,
        token=token_file,
        chat=chat or None,
        corpus=corpus,
        seed=seed,
        left_out=left_out,
    )
    typer.echo(f"{chain.path}: a chain of {chain.record.algorithm} on {model}")


@chain_app.command()
def add(
    folder: Folder,
    requests: Annotated[Path, typer.Option(help="what to forget or edit: JSONL, see docs/reference/file-formats.md")],
    skip_bad: SkipBad = False,
    last_token: LastToken = False,
    model: BaseModel = None,
    stats_dir: MovedStatsDir = None,
    device_map: DeviceMapOption = None,
) -> None:
    """Edits the requests of a file as one more batch."""
    from editlib.chain import Chain
    from editlib.editing import check_last_token, subjects_for
    from editlib.requests.reading import read_requests

    left_out: dict[str, list[str]] = {}
    given = read_requests(requests, skip_bad=skip_bad, left_out=left_out, tell_missing=False)
    chain = Chain.open(folder, model=model, stats_dir=stats_dir, device_map=device_map)
    settings = chain.record.settings
    check_last_token(last_token, settings)
    remedy = "" if settings.has_target else OR_LAST
    wanted, guessed = subjects_for(given, settings, last_token=last_token, remedy=remedy)
    chain.add(wanted, left_out=left_out, guessed=guessed)
    _table(chain.status()["batches"][-5:])


@chain_app.command()
def undo(folder: Folder) -> None:
    """Undoes the last batch, bit for bit."""
    from editlib.chain import Chain

    chain = Chain.open(folder)
    taken = chain.undo()
    typer.echo(f"batch {taken.number} is undone: {', '.join(taken.ids)}; {len(chain.batches)} left")


@chain_app.command()
def revoke(
    folder: Folder,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="ids of requests, see `editlib chain log`")],
    model: BaseModel = None,
    stats_dir: MovedStatsDir = None,
    device_map: DeviceMapOption = None,
) -> None:
    """Removes single requests from any batch and replays the later batches from their stored values."""
    from editlib.chain import Chain

    chain = Chain.open(folder, model=model, stats_dir=stats_dir, device_map=device_map)
    taken = chain.revoke(ids)
    typer.echo(f"revoked: {', '.join(taken.ids)}; {len(chain.record.ids)} requests left")


@chain_app.command()
def verify(folder: Folder, model: BaseModel = None) -> None:
    """Recomputes every hash, applies the recorded updates to the base model and compares."""
    from editlib.chain import Chain

    chain = Chain.open(folder, model=model)
    chain.verify()
    count, asked = len(chain.batches), len(chain.record.ids)
    typer.echo(f"{folder}: sound; {count} batches with {asked} requests give the recorded weights")


@chain_app.command()
def export(
    folder: Folder,
    out_path: Annotated[Path, typer.Option("--out", help="the folder, or for a delta the file, to write")],
    kind: Annotated[
        Literal["folder", "delta", "lora", "receipt"],
        typer.Option("--as", help="the edited model, the edit alone, a PEFT adapter, or the receipt"),
    ] = "folder",
    rank: Annotated[int | None, typer.Option(help="lora: largest rank of a layer; default: exact")] = None,
    metrics: Annotated[Path | None, typer.Option(help="receipt: metrics.json of `editlib eval`")] = None,
    private: Annotated[
        bool, typer.Option("--private", help="receipt: salted hashes, with the key in a file beside the folder")
    ] = False,
    model: BaseModel = None,
    overwrite: Overwrite = False,
) -> None:
    """Exports the chain, see docs/how-to/hand-it-on.md."""
    from editlib.chain import Chain
    from editlib.chain import export as made

    _check_kind("--rank", rank is not None, kind, "lora")
    _check_kind("--metrics", metrics is not None, kind, "receipt")
    _check_kind("--private", private, kind, "receipt")
    chain = Chain.open(folder, model=model)
    if kind == "folder":
        made.save_chain(chain, out_path, overwrite=overwrite)
    elif kind == "delta":
        made.save_chain_delta(chain, out_path, overwrite=overwrite)
    elif kind == "lora":
        tell_adapter(made.save_chain_lora(chain, out_path, rank=rank, base=model, overwrite=overwrite), out_path)
    else:
        page, key = made.save_chain_receipt(chain, out_path, metrics_file=metrics, private=private, overwrite=overwrite)
        tell_receipt(page, key)
        return
    out.print(str(out_path), soft_wrap=True)


def _check_kind(option: str, given: bool, kind: str, wanted: str) -> None:
    if given and kind != wanted:
        raise OutputError(f"{option} is for --as {wanted}, but --as {kind} was given; leave it out")


@chain_app.command()
def status(folder: Folder, as_json: Annotated[bool, typer.Option("--json", help="as one JSON object")] = False) -> None:
    """Describes the chain and its contents."""
    from editlib.chain import Chain

    summary = Chain.open(folder).status()
    if as_json:
        typer.echo(json.dumps(summary, indent=2, sort_keys=True))
        return
    layers = ", ".join(map(str, summary["layers"]))
    typer.echo(f"{summary['algorithm']} on {summary['base']['name']}, layers {layers}, seed {summary['seed']}")
    _table(summary["batches"])
    revoked = sum(len(revocation["ids"]) for revocation in summary["revoked"])
    typer.echo(f"{summary['requests']} requests, {revoked} revoked, {summary['bytes'] / 1e6:.1f} MB")


@chain_app.command()
def log(folder: Folder) -> None:
    """Lists the batches, one per line, with their requests and time, and what was revoked."""
    from editlib.chain import Chain

    summary = Chain.open(folder).status()
    for batch in summary["batches"]:
        typer.echo(
            f"{batch['time']}  batch {batch['number']}  {summary['algorithm']}  editlib {batch['editlib']}  "
            f"update/weight {batch['ratio']:.2g}  {', '.join(batch['ids'])}"
        )
    for revocation in summary["revoked"]:
        numbers = ", ".join(map(str, revocation["batches"]))
        typer.echo(
            f"{revocation['time']}  revoked from batch {numbers} (as numbered then)  {', '.join(revocation['ids'])}"
        )


def _table(batches: list[dict[str, Any]]) -> None:
    table = Table("batch", "time", "requests", "largest update/weight", "kB", "ids")
    for batch in batches:
        listed = ", ".join(batch["ids"][:3]) + (", ..." if len(batch["ids"]) > 3 else "")
        numbers = (str(batch["number"]), batch["time"], str(len(batch["ids"])), f"{batch['ratio']:.2g}")
        table.add_row(*numbers, f"{batch['bytes'] / 1e3:.0f}", listed)
    out.print(table)
