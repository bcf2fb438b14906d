"""`--skip-bad`: every command that reads requests has it, and hands it on."""

import json

import click
import pytest
import typer

from editlib.cli import app
from editlib.cli.evaluate import subjects
from editlib.errors import RequestError
from editlib.jobs.finetune import read_pairs
from editlib.requests.parsing import parse_file

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


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_file_of_another_kind_is_said_once(tmp_path, skip_bad):
    """RippleEdits as it ships names subjects by number only: one line says what to read instead, not a line a row."""
    edit = {"subject_id": "Q1", "prompt": "The mother of A is B.", "original_fact": {"prompt": "The mother of A is C."}}
    path = tmp_path / "recent.json"
    path.write_text(json.dumps([{"edit": edit}] * 400))
    with pytest.raises(RequestError) as told:
        parse_file(path, skip_bad=skip_bad)
    said = str(told.value)
    assert "none of its 400 rows" in said and said.count("wiki_recent") == 1 and len(said) < 400
