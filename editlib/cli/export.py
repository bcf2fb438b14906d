"""Parse, call and print for the commands that export an edit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from editlib.cli.options import Overwrite, SkipBad, out

if TYPE_CHECKING:
    from editlib.export.lora import LoraReport

BaseArgument = Annotated[str, typer.Argument(help="the model that was edited: a packaged one, a local folder or an id")]
Given = Annotated[Path, typer.Argument(help="a file that `editlib edit` or `unlearn` wrote with --delta")]


def register(app: typer.Typer) -> None:
    """Adds the commands to `app`."""
    for command in (apply, lora, receipt):
        app.command()(command)


def apply(
    base: BaseArgument,
    delta: Given,
    out_dir: Annotated[Path, typer.Option("--out", help="folder of the edited model")],
    overwrite: Overwrite = False,
) -> None:
    """Applies a delta file to its base model and writes the edited model, bit for bit the same."""
    from editlib.export.apply import apply_delta_file

    applied = apply_delta_file(base, delta, out_dir, overwrite=overwrite)
    out.print(f"{len(applied.modules)} matrices changed; the result has the recorded hash {applied.result_sha256[:12]}")
    out.print(str(out_dir), soft_wrap=True)


def lora(
    delta: Given,
    base: Annotated[str, typer.Option(help="the model that was edited: a packaged one, a local folder or an id")],
    out_dir: Annotated[Path, typer.Option("--out", help="folder of the adapter")],
    rank: Annotated[int | None, typer.Option(help="largest rank of a layer; default: exact")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Writes a delta file as a LoRA adapter that plain `peft` opens on the base model."""
    from editlib.export.lora import lora_from_file

    report = lora_from_file(base, delta, out_dir, rank=rank, overwrite=overwrite)
    tell_adapter(report, out_dir)
    out.print(str(out_dir), soft_wrap=True)


def receipt(
    edited: Annotated[str, typer.Argument(help="an edited folder, or a delta file")],
    out_dir: Annotated[Path, typer.Option("--out", help="folder for receipt.json and receipt.html")],
    requests: Annotated[Path | None, typer.Option(help="request file; without it the receipt names ids only")] = None,
    metrics: Annotated[Path | None, typer.Option(help="metrics.json of `editlib eval`")] = None,
    private: Annotated[
        bool, typer.Option("--private", help="salted hashes instead of texts; the key is written beside the folder")
    ] = False,
    skip_bad: SkipBad = False,
    overwrite: Overwrite = False,
) -> None:
    """Writes requests, time, version and result of an edit, as JSON and as a page."""
    from editlib.reports.receipt import write_receipt

    page, key = write_receipt(
        edited, out_dir, requests_file=requests, metrics_file=metrics, private=private,
        skip_bad=skip_bad, overwrite=overwrite,
    )  # fmt: skip
    tell_receipt(page, key)


def tell_adapter(report: LoraReport, folder: Path) -> None:
    """Shows the share of each layer's update that an adapter contains."""
    table = Table("layer", "rank", "|update|", "left out (share of the norm)")
    for layer, layer_error in sorted(report.layers.items(), key=lambda item: int(item[0])):
        table.add_row(
            str(layer),
            str(layer_error.rank),
            f"{layer_error.norm:.2f}",
            f"{layer_error.error:.2e}" if layer_error.error else "nothing",
        )
    out.print(table)
    size = (folder / "adapter_model.safetensors").stat().st_size
    left = f"leaves out {report.error:.2e} of the norm of all updates" if report.error else "exact"
    out.print(f"adapter: {left}, {size / 1000:.0f} kB")


def tell_receipt(page: Path, key: Path | None) -> None:
    """Names the files of a receipt and its key."""
    out.print(str(page), soft_wrap=True)
    if key is not None:
        out.print(f"key to the hashes, not to be published: {key}", soft_wrap=True)
