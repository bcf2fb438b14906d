"""`--skip-bad`: every command that reads requests has it, and hands it on."""

import json

import click
import pytest
import typer

from editlib.cli import app
from editlib.cli.evaluate import subjects
from editlib.errors import RequestError
from editlib.jobs.finetune import read_pairs

FILES = {"requests", "retain", "data"}


def commands(group, name=""):
    if isinstance(group, click.Group) or hasattr(group, "commands"):
        for key, command in group.commands.items():
            yield from commands(command, f"{name} {key}".strip())
    else:
        yield name, group


READERS = {
    name: {parameter.name for parameter in command.params}
    for name, command in commands(typer.main.get_command(app))
    if FILES & {parameter.name for parameter in command.params} and name != "plan"  # whose --requests is a number
}


def test_the_commands_that_read_requests():
    assert {"unlearn", "edit", "eval", "attack", "baseline", "finetune", "subjects", "receipt"} <= READERS.keys()
    assert {"chain init", "chain add", "bench counterfact"} <= READERS.keys()


@pytest.mark.parametrize("name", READERS)
def test_each_can_leave_bad_rows_out(name):
    assert "skip_bad" in READERS[name]


ROWS = [{"question": "Who is Ann?", "answer": "A"}, {"question": "", "answer": "B"}]


def test_it_is_handed_on(tmp_path, capsys):
    path = tmp_path / "set.json"
    path.write_text(json.dumps(ROWS))
    with pytest.raises(RequestError, match="row 2"):
        read_pairs([path])
    assert [pair.answer for pair in read_pairs([path], skip_bad=True)] == ["A"]
    subjects(path, skip_bad=True)
    assert "of 1 questions have a subject" in capsys.readouterr().out
