"""Parse, call and print for `editlib ask`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from editlib.cli.options import DeviceMapOption, Dtype, Model, Prompts, out, prompt_settings


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    app.command()(ask)


def ask(
    model: Model,
    questions: Annotated[list[str], typer.Argument(help="one or more questions")],
    vs: Annotated[str | None, typer.Option(help="another model to ask too")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 48,
    prompts: Prompts = None,
    dtype: Dtype = None,
    device_map: DeviceMapOption = None,
) -> None:
    """Asks a model, or two side by side, and prints the greedy answers."""
    from editlib.evaluation.answer_cache import ask as ask_model
    from editlib.export import read_receipt
    from editlib.export.receipt import prompts_of
    from editlib.models.anatomy import anatomy
    from editlib.models.loaded import plain_text
    from editlib.models.loading import load
    from editlib.models.outline import outline_of
    from editlib.models.positions import check_prompts
    from editlib.models.prompts import PromptFormat, settled
    from editlib.models.source import check_models

    names = list(dict.fromkeys([model, *([vs] if vs else [])]))
    given = prompt_settings(prompts)
    check_models(*names)
    recorded = {name: prompts_of(read_receipt(name), given) for name in names}
    usual = next((how for how in recorded.values() if how is not None), None)  # a base is asked as its edited model
    forms = {}
    for name in names:  # check all of them before any weights are read
        outline = outline_of(name, dtype=dtype)
        forms[name] = settled(outline.tok, recorded[name] or usual)
        asked = PromptFormat.of(outline.tok, forms[name])
        check_prompts(outline.model, asked, zip(questions, questions, strict=True), answer_tokens=max_new_tokens)
    columns = {}
    for name in names:
        loaded, tok = load(name, dtype=dtype, device_map=device_map)
        answers = ask_model(anatomy(loaded), tok, questions, max_new_tokens=max_new_tokens, how=forms[name])
        columns[name] = {question: plain_text(tok, ids) for question, ids in answers.items()}
    table = Table("question", *columns)
    for question in dict.fromkeys(questions):
        table.add_row(question, *[answers[question] for answers in columns.values()])
    out.print(table)
    first, last = (forms[name].to_dict() for name in (names[0], names[-1]))
    if first != last:
        out.print(f"{names[0]} and {names[-1]} were asked in different forms: {first} and {last}", highlight=False)
