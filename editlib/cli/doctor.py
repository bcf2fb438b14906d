"""Call and print for `editlib doctor`."""

from __future__ import annotations

import typer

from editlib.cli.options import print_table


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command()(doctor)


def doctor() -> None:
    """Shows versions, extras, devices, caches and packaged models, for a first check or a bug report."""
    from editlib.jobs.doctor import doctor as run

    print_table([("part", "name", "found"), *run()])
