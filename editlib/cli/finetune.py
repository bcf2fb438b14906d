"""Parse, call and print for `editlib finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from editlib.cli.options import DeviceMapOption, Dtype, Overwrite, Prompts, Seed, SkipBad, out, prompt_settings


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command()(finetune)


def finetune(
    data: Annotated[list[Path], typer.Option(help="pairs to learn: TOFU or request files; may be repeated")],
    out_dir: Annotated[Path, typer.Option("--out", help="folder of the trained model")],
    model: Annotated[str, typer.Option(help="a packaged model, a local folder or a Hugging Face id")] = "smollm2-135m",
    authors: Annotated[
        int | None, typer.Option(min=1, help="only the first N authors of each file, 20 pairs each")
    ] = None,
    lora: Annotated[bool, typer.Option("--lora/--full", help="a LoRA adapter, merged at the end, or all weights")] = (
        False
    ),
    rank: Annotated[int, typer.Option(min=1, help="rank of the adapter, with --lora")] = 32,
    epochs: Annotated[int | None, typer.Option(min=1, help="passes over all pairs")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="default: 3e-4, with --lora 1e-3")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    keep: Annotated[float | None, typer.Option(help="share of general prompts and plain text to add")] = None,
    text: Annotated[str, typer.Option(help="corpus of that text, or none")] = "wiki-sample",
    prompts: Prompts = None,
    skip_bad: SkipBad = False,
    seed: Seed = 0,
    dtype: Dtype = None,
    device_map: DeviceMapOption = None,
    overwrite: Overwrite = False,
) -> None:
    """Teaches a model question-answer pairs, such as TOFU's; resumes where it was stopped."""
    from editlib.jobs.finetune import FinetuneSettings
    from editlib.jobs.finetune import finetune as run

    given: dict[str, Any] = {
        "epochs": epochs,
        "learning_rate": learning_rate if learning_rate is not None or not lora else 1e-3,
        "batch_size": batch_size,
        "keep": keep,
        "rank": rank if lora else None,
    }
    settings = FinetuneSettings(
        **{name: value for name, value in given.items() if value is not None}, text=None if text == "none" else text
    )
    done = run(
        model, data, out_dir, authors=authors, settings=settings, skip_bad=skip_bad,
        prompts=prompt_settings(prompts), seed=seed,
        dtype=dtype, device_map=device_map, overwrite=overwrite,
    )  # fmt: skip
    if done["done_before"]:
        out.print(f"{out_dir} already contains this model; nothing to do", soft_wrap=True)
    table = Table("measure", "before", "after", "of")
    asked = done["after"]["asked"]
    of = {
        "probability": f"{asked} answers",
        "rouge_l_recall": f"{asked} answers, generated",
        "perplexity": "held-out text",
    }
    for name, meaning in of.items():
        numbers = [done[when][name] for when in ("before", "after")]
        table.add_row(name, *["-" if number is None else f"{number:.3f}" for number in numbers], meaning)
    out.print(table)
    out.print(f"{done['pairs']} pairs, {done['training']['steps']} steps, {done['training']['seconds']:.0f} s")
    out.print(str(out_dir), soft_wrap=True)
