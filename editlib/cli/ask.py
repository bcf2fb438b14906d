"""`editlib ask`: parse, call, print."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from editlib.cli.options import DeviceMap, Dtype, Model, out


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command()(ask)


def ask(
    model: Model,
    questions: Annotated[list[str], typer.Argument(help="one or more questions")],
    vs: Annotated[str | None, typer.Option(help="another model to ask too")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 48,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
) -> None:
    """Asks a model, or two side by side, and prints the greedy answers."""
    from editlib.evaluation.answer_cache import ask as ask_model
    from editlib.models.anatomy import anatomy
    from editlib.models.loading import load

    columns = {}
    for name in dict.fromkeys([model, *([vs] if vs else [])]):
        loaded, tok = load(name, dtype=dtype, device_map=device_map)
        answers = ask_model(anatomy(loaded), tok, questions, max_new_tokens=max_new_tokens)
        columns[name] = {
            question: tok.decode(ids, skip_special_tokens=True).strip() for question, ids in answers.items()
        }
    table = Table("question", *columns)
    for question in dict.fromkeys(questions):
        table.add_row(question, *[answers[question] for answers in columns.values()])
    out.print(table)
