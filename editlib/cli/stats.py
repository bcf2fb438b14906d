"""Parse, call and print for `editlib stats ...`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from editlib.cli.options import Dtype, Model, Prompts, Seed, StatsDir, layer_numbers, out, prompt_settings, workbench
from editlib.errors import EditlibError, StatsError


class _StatsGroup(TyperGroup):
    """Lets `editlib stats MODEL ...` compute and `editlib stats show MODEL` show."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["make", *args]
        return super().resolve_command(ctx, args)


stats_app = typer.Typer(cls=_StatsGroup, no_args_is_help=True, help="Layer statistics: compute or show them.")


@contextmanager
def _one_voice(shard: Any) -> Iterator[None]:
    """Lets only the first of several processes print; the others wait for it."""
    if not shard.first:
        logging.getLogger("editlib").setLevel(logging.ERROR)
    try:
        yield
    except EditlibError as error:
        if shard.world == 1:
            raise
        if shard.first:
            sys.stderr.write(f"editlib: {error}\n")
            sys.stderr.flush()
        shard.gather(None)  # torchrun stops all processes as soon as one has left
        raise SystemExit(2) from None


@stats_app.command("make", hidden=True)
def stats_make(
    model: Model,
    layers: Annotated[str, typer.Option(help="for example 4-8")],
    corpus: Annotated[
        str,
        typer.Option(help="text, rows with text (.jsonl, .csv, ...), hf:NAME, wiki-sample, or self (by the model)"),
    ] = "wiki-sample",
    tokens: Annotated[int, typer.Option(min=1, help="tokens to count")] = 100_000,
    stats_dir: StatsDir = Path("stats"),
    max_length: Annotated[int, typer.Option(min=2, help="most tokens of a window")] = 512,
    skip_first: Annotated[int, typer.Option(min=0, help="number of tokens left out at the start of each window")] = 1,
    prompts: Prompts = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: Annotated[
        str | None,
        typer.Option(help="auto, or a device; under torchrun each process takes an accelerator, unless this says cpu"),
    ] = None,
) -> None:
    """Computes second moments of the MLP keys of several layers, in one pass; under torchrun, on several processes."""
    from editlib.distributed import processes
    from editlib.stats.corpus import check_corpus

    with processes(accelerators=device_map != "cpu") as shard, _one_voice(shard):
        wanted, how = layer_numbers(layers), prompt_settings(prompts)
        if how is not None and corpus != "self":
            raise StatsError(f"--prompt is for --corpus self, not for {corpus}; leave it out")
        check_corpus(corpus)
        _check_layers(model, wanted)
        with shard.together():
            place = device_map or (None if shard.device is None else {"": str(shard.device)})
            bench = workbench(model, stats_dir, dtype, place, shard=shard, prompts=how)
        made = bench.make_stats(
            wanted, corpus=corpus, tokens=tokens, seed=seed, max_length=max_length, skip_first=skip_first
        )
        if shard.first:
            _stats_table(made)


def _check_layers(model: str, layers: list[int]) -> None:
    """Refuses layers that the model lacks by its configuration, before it is loaded."""
    from editlib.models.source import read_config

    config = read_config(model)
    count = None if config is None else getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if isinstance(count, int) and layers[-1] >= count:
        raise StatsError(f"layer {layers[-1]} is not in {model}; expected layers 0-{count - 1}; change --layers")


@stats_app.command("show")
def stats_show(
    model: Model,
    stats_dir: StatsDir = Path("stats"),
    corpus: Annotated[str | None, typer.Option(help="only statistics of this corpus")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the spectrum into this PNG or SVG")] = None,
) -> None:
    """Shows layers, tokens, rank and null-space sizes of the stored statistics of a model."""
    from editlib.stats.spectrum import draw_spectrum
    from editlib.stats.store import stored_layers

    stored = stored_layers(stats_dir, model, corpus)
    _stats_table(stored)
    if plot is not None:
        draw_spectrum(stored, plot)
        out.print(f"spectrum: {plot}")


def _stats_table(stats: dict[int, Any]) -> None:
    from editlib.stats.spectrum import THRESHOLDS, sketch, summary

    table = Table("layer", "tokens", "d_ff", "rank", *[f"null < {t:g}" for t in THRESHOLDS], "log10 spectrum", "file")
    for layer, layer_stats in sorted(stats.items()):
        row = summary(layer_stats)
        sizes = [str(row.null[t]) for t in THRESHOLDS]
        table.add_row(
            str(layer), str(row.tokens), str(row.d_ff), str(row.rank), *sizes, sketch(row), str(layer_stats.path)
        )
    out.print(table)
