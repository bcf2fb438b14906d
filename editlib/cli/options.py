"""Hold shared parts of the commands: options, the console, a loaded model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from editlib.errors import HparamsError

out = Console(markup=False, emoji=False)
"""Prints texts unchanged: brackets (`[/INST]`) and colons in paths, questions and answers are not markup."""

Model = Annotated[str, typer.Argument(help="a packaged model (smollm2-135m), a local folder or a Hugging Face id")]
StatsDir = Annotated[Path, typer.Option(help="folder of the statistics and the token")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="seed of every random draw")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an output folder that is not empty")]
Requests = Annotated[Path, typer.Option(help="facts to forget: JSONL, see docs/reference/file-formats.md")]
Retain = Annotated[Path | None, typer.Option(help="prompts whose answers must stay; default: bundled ones")]
StatsCorpus = Annotated[str, typer.Option(help="text for missing statistics")]
HeldOut = Annotated[str, typer.Option("--text", help="corpus for perplexity")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="leave out unusable rows, and count them")]
Hparams = Annotated[
    str | None, typer.Option(help="a JSON file or a bundled name (UniErase/smollm2-135m); default: found by the model")
]
Algorithm = Annotated[str | None, typer.Option(help="default: the folder of the settings, or their alg_name")]
LastToken = Annotated[
    bool,
    typer.Option("--last-token", help="UniErase: edit a request without an evident subject at its prompt's last token"),
]
OR_LAST = "give --last-token"
DeltaFile = Annotated[Path | None, typer.Option("--delta", help="also write the edit alone, see `editlib apply`")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored")]
DeviceMapOption = Annotated[str | None, typer.Option(help="a device that holds all layers, or auto; default: the CPU")]

Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt",
        metavar="NAME=VALUE",
        help='how the model is asked: system="...", tags="Question: {}\\nAnswer:", date=2026-01-31, chat=false, or an '
        "argument of the chat template such as enable_thinking=false; may be repeated",
    ),
]


def prompt_settings(options: Sequence[str] | None) -> Any:
    """Returns the settings that `--prompt` names, `None` without one."""
    from editlib.models.prompt_settings import PromptSettings

    return PromptSettings.of_options(options or ())


def print_table(rows: Iterable[Sequence[str]]) -> None:
    """Prints head and rows as a table."""
    head, *rest = rows
    table = Table(*head)
    for row in rest:
        table.add_row(*row)
    out.print(table)


MOST_LAYERS = 100_000


def layer_numbers(text: str) -> list[int]:
    """Parses `"4-8,12"` to `[4, 5, 6, 7, 8, 12]`."""
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            ends = int(first), int(last if dash else first)
        except ValueError:
            raise HparamsError(f"--layers {text!r}: expected numbers and ranges such as 4-8 or 4,5,12") from None
        if max(ends) >= MOST_LAYERS:
            raise HparamsError(f"--layers {text!r}: no model has a layer {max(ends)}; expected numbers such as 4-8")
        numbers.update(range(ends[0], ends[1] + 1))
    if not numbers:
        raise HparamsError(f"--layers {text!r} names no layer; expected numbers and ranges such as 4-8")
    return sorted(numbers)


def workbench(
    model: str, stats_dir: Path, dtype: str | None, device_map: str | dict[str, str] | None, **options: Any
) -> Any:
    """Loads a model with the folder of its statistics."""
    from editlib.workbench import Workbench

    return Workbench.load(model, stats_dir, dtype=dtype, device_map=device_map, **options)
