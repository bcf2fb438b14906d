"""Parse, call and print for `editlib plan`."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from editlib.cli.options import Algorithm, DeviceMapOption, Dtype, Hparams, out, print_table
from editlib.errors import HparamsError


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command()(plan)


def plan(
    model: Annotated[str, typer.Argument(help="as for other commands, or a model's configuration in a JSON file")],
    requests: Annotated[int, typer.Option(min=1, help="number of requests edited at once")] = 20,
    algorithm: Algorithm = None,
    hparams: Hparams = None,
    stats_tokens: Annotated[
        int | None, typer.Option(min=1, help="tokens of the statistics; default: 20,000 to unlearn, 100,000 to edit")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="tokens of a question, chat template included")] = 16,
    dtype: Dtype = None,
    device_map: DeviceMapOption = None,
    flops: Annotated[
        float | None, typer.Option(min=1, help="operations per second of another machine; default: measured here")
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(min=1, help="bytes of memory per second of another machine; default: measured here")
    ] = None,
) -> None:
    """Estimates time and memory of an edit, step by step, from the model's configuration alone. See
    docs/how-to/plan.md."""
    from editlib.jobs.plan import plan as run

    for option, value in (("--flops", flops), ("--bandwidth", bandwidth)):
        if value is not None and not math.isfinite(value):
            raise HparamsError(f"{option} {value}: expected a finite number; give that of a machine, or leave it out")
    made = run(
        model,
        requests,
        algorithm=algorithm,
        hparams=hparams,
        stats_tokens=stats_tokens,
        prompt_tokens=prompt_tokens,
        dtype=dtype,
        device=device_map or "cpu",
        flops=flops,
        bandwidth=bandwidth,
    )
    out.print(
        f"{model}: {made.size.total / 1e6:.0f} million parameters, {made.weights / 2**20:.0f} MiB; "
        f"{made.settings.algorithm}, {requests} requests, {made.settings.source}",
        soft_wrap=True,
        highlight=False,
    )
    print_table(made.rows())
