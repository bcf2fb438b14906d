"""Strange values in files and options: each is refused in one line, and raises no other kind of error."""

from __future__ import annotations

import copy
import json

import pytest
from test_cli import refused

from editlib import data
from editlib.errors import EditlibError
from editlib.evaluation.metrics import read_results
from editlib.export import read_receipt
from editlib.export.receipt import prompts_of
from editlib.reports.receipt import read_metrics

STRANGE = [None, True, -1, 10**400, float("nan"), "", "x", "\0", [], {}, [1], {"a": 1}]


def paths(value, path=()):
    """Every place in a JSON value."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from paths(value[key], (*path, key))


def changed(value, path, new):
    """A copy with another value in one place."""
    if not path:
        return new
    found = copy.deepcopy(value)
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return found


def receipt_of(path):
    prompts_of(read_receipt(path.parent))


RATIO = {"agg_value": 1.0, "value_by_index": {"0": {"id": "x", "score": 1.0}}, "interval": [0.0, 1.0]}
GIVEN = {
    "frames": ("frames.jsonl", {"language": "french", "relation": "capital", "frame": "Où est {} ?"}, data.frames),
    "results": ("edited.json", {"forget_teacher_forced_truth_ratio": RATIO}, read_results),
    "a receipt": (
        "editlib.json",
        {"base": {"name": "x", "sha256": "y"}, "requests": [{"id": "a"}], "anchors": ["b"], "token": {"token": "[UNL]"},
         "prompts": {"chat": True, "system": "x"}},
        receipt_of,
    ),
    "metrics": (
        "metrics.json",
        {"edited": {"sha256": "x"}, "efficacy": 1.0, "groups": {"efficacy": {"n": 1, "interval": [0, 1]}}},
        read_metrics,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GIVEN)
def test_any_value_in_any_place_of_a_file(tmp_path, case):
    name, value, read = GIVEN[case]
    path = tmp_path / name
    path.write_text(json.dumps(value))
    read(path)
    lines = []
    for place in paths(value):
        for new in STRANGE:
            path.write_text(json.dumps(changed(value, place, new)))
            try:
                read(path)
            except EditlibError as error:
                lines.append(str(error))
    assert len(lines) > len(STRANGE) and not any("\n" in line for line in lines)


@pytest.mark.parametrize("name", ["a\nb", "no\nsuch/model", "a\r\nb"])
def test_a_line_end_in_a_name_makes_no_second_line(call, monkeypatch, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(call("ask", name, "Who?"), "cannot be loaded")


@pytest.mark.parametrize("option", ["--flops", "--bandwidth"])
@pytest.mark.parametrize("value", ["inf", "1e400", "nan"])
def test_no_machine_is_infinite(call, folder, option, value):
    refused(call("plan", folder, "--requests", 1, option, value), option)


@pytest.mark.parametrize("line", ['{"id": "a", "prompt": NaN}', '{"text": "", "id": "x"}'])
def test_a_text_without_a_token_leaves_no_folder(call, folder, tmp_path, line):
    (tmp_path / "text.jsonl").write_text(line + "\n")
    given = ("--layers", "1", "--stats-dir", tmp_path / "s", "--corpus", tmp_path / "text.jsonl")
    code, _, err = call("stats", folder, *given)
    assert code == 2 and err.splitlines()[-1].startswith("editlib: ") and "text" in err.splitlines()[-1]
    assert not (tmp_path / "s").exists()


def test_too_long_a_name_of_a_text(call, folder, tmp_path):
    given = ("--layers", "1", "--stats-dir", tmp_path / "s", "--corpus", "9" * 400)
    refused(call("stats", folder, *given), "999")
    assert not (tmp_path / "s").exists()
