"""Bad input on the command line: one line on stderr, exit code 2, nothing written."""

import json
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

import editlib
from editlib.cli import PANELS, app
from editlib.cli.options import layer_numbers
from editlib.errors import HparamsError
from editlib.jobs import doctor
from editlib.version import install_line

GOOD = {"id": "a", "prompt": "What is the capital of {}?", "subject": "France", "answer": "Paris"}


def refused(result, *words):
    code, _, err = result
    assert code == 2, err
    lines = [line for line in err.strip().splitlines() if line]
    assert len(lines) == 1, err
    for word in words:
        assert word in lines[0], lines[0]


def test_a_package_that_is_required_and_missing_is_one_line(call, monkeypatch):
    """As after an installation without dependencies."""
    monkeypatch.delitem(sys.modules, "editlib.jobs.doctor", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(call("doctor"), "'torch' is not installed here", "pip install")


BAD_LINES = {
    "no JSON": ("{nonsense", "requests.jsonl:2"),
    "no subject in the prompt": (json.dumps({**GOOD, "id": "b", "prompt": "What is it?"}), '"subject"'),
    "the subject twice": (json.dumps({**GOOD, "id": "b", "prompt": "France? France?"}), "more than once"),
    "an empty answer": (json.dumps({**GOOD, "id": "b", "answer": ""}), '"answer"'),
    "a duplicate id": (json.dumps(GOOD), "line 1"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_names_file_line_and_field(call, folder, tmp_path, case):
    line, word = BAD_LINES[case]
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    before = sorted(tmp_path.rglob("*"))
    refused(call("unlearn", folder, "--requests", path, "--out", tmp_path / "out"), "requests.jsonl:2", word)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def requests(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    return path


def test_missing_and_empty_files(call, folder, tmp_path):
    refused(call("unlearn", folder, "--requests", tmp_path / "none.jsonl", "--out", tmp_path / "out"), "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    refused(call("unlearn", folder, "--requests", tmp_path / "empty.jsonl", "--out", tmp_path / "out"), "empty.jsonl")


def test_an_unknown_hparam(call, folder, requests, tmp_path):
    path = tmp_path / "h.json"
    path.write_text(json.dumps({"layers": [1], "v_lrr": 1}))
    out = tmp_path / "out"
    refused(call("unlearn", folder, "--requests", requests, "--hparams", path, "--out", out), "v_lrr", "v_lr")


def test_a_layer_out_of_range(call, folder, requests, tmp_path):
    path = tmp_path / "h.json"
    path.write_text(json.dumps({"layers": [1, 99]}))
    out = tmp_path / "out"
    refused(call("unlearn", folder, "--requests", requests, "--hparams", path, "--out", out), "layer 99", "0-")
    refused(call("stats", folder, "--layers", "99", "--stats-dir", tmp_path / "s"), "layer 99")
    assert not out.exists() and not (tmp_path / "s").exists()


def test_a_loss_layer_that_is_not_read(tiny_llama, tok_chat):
    """A published hparams file made for another depth is refused, not half obeyed."""
    from editlib.algorithms.unierase.apply import apply_unierase_to_model
    from editlib.hparams import UniEraseHyperParams
    from editlib.requests.request import EditRequest

    hparams = UniEraseHyperParams(layers=[1], v_loss_layer=31)
    with pytest.raises(HparamsError, match='"v_loss_layer": layer 31'):
        apply_unierase_to_model(tiny_llama, tok_chat, [EditRequest(**GOOD)], hparams, token=None)


def test_an_output_folder_that_is_not_empty(call, folder, requests, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    refused(call("unlearn", folder, "--requests", requests, "--out", out), "--overwrite")
    refused(call("eval", folder, folder, "--requests", requests, "--out", out), "--overwrite")
    refused(call("demo", "--out", out), "--overwrite")
    assert (out / "mine").read_text() == "precious"


@pytest.mark.parametrize("name", ["./gone", "/gone/model", "~/gone", "smollm2-135", "SmolLM2-135m"])
def test_a_model_that_is_nowhere(call, monkeypatch, name):
    """A packaged name with a typo was asked of the Hub for half a minute, and a folder called no repository."""
    monkeypatch.setattr("editlib.models.source.AutoConfig", None)  # nothing is asked of anyone
    code, _, err = call("ask", name, "question")
    assert code == 2 and err.count("\n") == 1
    assert f"{name}: no such folder" in err


def test_models_of_the_wrong_kind(call, folder, requests, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for change, word in (
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
    ):
        (other / "config.json").write_text(json.dumps({**config, **change}))
        refused(call("unlearn", other, "--requests", requests, "--out", tmp_path / "out"), word)
    refused(call("ask", tmp_path / "nowhere", "Hello?"), "nowhere")
    refused(call("ask", requests, "Hello?"), "is a file")


def test_statistics_of_another_model(call, folder, requests, tmp_path, tiny_llama):
    import numpy as np

    place = tmp_path / "stats" / "tiny" / "x_stats"
    place.mkdir(parents=True)
    name = "model.layers.1.mlp.down_proj_float32_mom2_5.npz"
    np.savez(place / name, **{"mom2.mom2": np.eye(7), "mom2.count": 5, "sample_size": 5})
    hparams = tmp_path / "h.json"
    hparams.write_text(json.dumps({"layers": [1]}))
    args = ["--requests", requests, "--hparams", hparams, "--stats-dir", tmp_path / "stats", "--out", tmp_path / "out"]
    refused(call("unlearn", folder, *args), name, "7 x 7")
    assert not (tmp_path / "out").exists()


def test_layer_ranges():
    assert layer_numbers("4-8,12") == [4, 5, 6, 7, 8, 12]
    assert layer_numbers("3") == [3]
    for bad in ("a", "", "4-", "8-4", "-1"):
        with pytest.raises(HparamsError, match="--layers"):
            layer_numbers(bad)


def test_interrupted_work_leaves_nothing(call, folder, requests, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("editlib.jobs.edit.save_edited", stop)
    monkeypatch.setattr("editlib.workbench.Workbench.find_or_make_stats", stop)
    hparams = tmp_path / "h.json"
    hparams.write_text(json.dumps({"layers": [1]}))
    before = sorted(tmp_path.rglob("*"))
    code, _, err = call("unlearn", folder, "--requests", requests, "--hparams", hparams, "--out", tmp_path / "out")
    assert code == 130 and "interrupted" in err
    assert sorted(tmp_path.rglob("*")) == before


def _commands(group, path=()):
    if not hasattr(group, "commands"):
        return [(" ".join(path), group)]
    return [found for name, command in group.commands.items() for found in _commands(command, (*path, name))]


def test_what_can_be_loaded_in_another_dtype_can_be_put_on_another_device():
    """Edits and chains once ran on the CPU only, since nothing but `stats` and `ability` asked where."""
    commands = _commands(typer.main.get_command(app))
    takes = {path: {option.name for option in command.params} for path, command in commands}
    assert {path for path, names in takes.items() if "dtype" in names} >= {"unlearn", "edit", "chain init", "eval"}
    assert all("device_map" in names for names in takes.values() if "dtype" in names)
    assert all("device_map" in takes[path] for path in ("chain add", "chain revoke"))


@pytest.mark.parametrize("device", ["nonsense", "cpu:1", "meta", ""])
def test_a_device_that_is_not_there(call, folder, requests, tmp_path, device):
    """PyTorch answers with a traceback, or takes the CPU without a word."""
    out = tmp_path / "out"
    code, _, err = call("unlearn", folder, "--requests", requests, "--out", out, "--device-map", device)
    assert code == 2 and not out.exists()
    assert (
        err.count("\n") == 1
        and f"device_map {device!r}: not on this machine; expected one of auto" in err
        and "cpu" in err
    )


TO_LOAD = {
    "ask": "MODEL question",
    "token": "MODEL --out OUT",
    "edit": "MODEL --requests REQUESTS --algorithm UniErase --out OUT",
    "eval": "MODEL MODEL --requests REQUESTS --out OUT",
    "attack": "MODEL MODEL --requests REQUESTS --out OUT",
    "ability": "MODEL --out OUT",
    "baseline": "MODEL --method GA --requests REQUESTS --out OUT --steps 1 --learning-rate 0.1",
    "finetune": "--model MODEL --data REQUESTS --out OUT",
    "stats make": "MODEL --layers 1",
    "bench counterfact": "--model MODEL --requests REQUESTS --algorithms MEMIT",
    "bench sequential": "--model MODEL --algorithms MEMIT --out OUT",
    "chain init": "OUT --model MODEL",
}


@pytest.mark.parametrize("command", TO_LOAD)
def test_the_device_reaches_what_loads_the_model(call, folder, requests, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": folder, "REQUESTS": requests, "OUT": tmp_path / "out"}
    args = [places.get(word, word) for word in TO_LOAD[command].split()]
    code, _, err = call(*command.split(), *args, "--device-map", "nowhere")
    assert code == 2 and "device_map 'nowhere': not on this machine" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["tune", "x", "--requests", "y", "--budget", "-1"], ["--budget", "tune --help"]),
        (["tune", "x", "--requests", "y", "--budget", "nan"], ["--budget"]),
        (["unlearn", "x", "--requests", "y", "--out", "z", "--seed", "-1"], ["--seed"]),
        (["unlearn", "x", "--requests", "y", "--out", "z", "--seed", str(2**70)], ["--seed"]),
        (["unlearn", "x"], ["--requests"]),
        (["unlearnn"], ["unlearnn"]),
        (["token", "x", "--steps", "many"], ["--steps"]),
        (["finetune", "--data", "y", "--out", "z", "--learning-rate", "nan"], ["learning_rate"]),
        (["finetune", "--data", "y", "--out", "z", "--learning-rate", "-1"], ["learning_rate"]),
        (["finetune", "--data", "y", "--out", "z", "--keep", "inf"], ["keep"]),
        (["baseline", "x", "--method", "GA", "--requests", "y", "--out", "z", "--beta", "nan"], ["beta"]),
    ],
)
def test_numbers_and_options_that_cannot_be_are_one_line(call, args, words):
    refused(call(*args), *words)


LONG = "x" * 300
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "args",
    [
        ["edit", "FOLDER", "--requests", LONG, "--algorithm", "FT", "--out", "OUT"],
        ["edit", "FOLDER", "--requests", "GOOD", "--algorithm", "FT", "--hparams", LONG, "--out", "OUT"],
        ["edit", "FOLDER", "--requests", "GOOD", "--algorithm", "FT", "--out", LONG],
        ["ask", LONG, "Who?"],
        ["compare", "--config", LONG, "--out", "OUT"],
        ["receipt", LONG, "--out", "OUT"],
        ["edit", "FOLDER", "--requests", "DEEP", "--algorithm", "FT", "--out", "OUT"],
        ["apply", "FOLDER", "DEEP", "--out", "OUT"],
        ["receipt", "DEEP", "--out", "OUT"],
        ["compare", "--config", "DEEP", "--out", "OUT"],
        ["stats", "FOLDER", "--layers", "1", "--corpus", "DEEP"],
        ["attack", "FOLDER", "FOLDER", "--requests", "GOOD", "--frames", "DEEP", "--out", "OUT"],
    ],
    ids=lambda args: " ".join(args)[:60],
)
def test_names_too_long_and_brackets_too_deep_are_one_line(call, folder, tmp_path, args):
    (tmp_path / "deep.jsonl").write_text(DEEP, encoding="utf-8")
    (tmp_path / "good.jsonl").write_text(json.dumps({**GOOD, "target_new": "Rome"}), encoding="utf-8")
    places = {"FOLDER": folder, "OUT": tmp_path / "out", "DEEP": tmp_path / "deep.jsonl"}
    places["GOOD"] = tmp_path / "good.jsonl"
    refused(call(*[places.get(arg, arg) for arg in args]))
    assert not (tmp_path / "out").exists()


def test_doctor_and_version_tell_what_is_installed(call):
    """Beside what Python itself says is installed."""
    code, said, _ = call("doctor")
    assert code == 0
    for package in ("torch", "transformers", "safetensors"):
        assert re.search(rf"{package}\s.*{re.escape(version(package))}", said)
    assert "smollm2-135m" in said and "gemma3-270m" in said
    assert call("--version")[:2] == (0, f"editlib {version('editlib')}\n")


def test_doctor_names_the_line_that_installs_a_missing_extra(monkeypatch):
    known = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda package: None if package == "peft" else known(package))
    extras = {name: found for part, name, found in doctor.doctor() if part == "extra"}
    assert extras["lora"] == f"missing: peft; {install_line('lora')}"
    assert "pip install" not in extras["report"] and "dev" not in extras


@pytest.mark.parametrize(
    ("origin", "line"),
    [
        (None, "pip install 'editlib[lora]'"),
        ("damaged", "pip install 'editlib[lora]'"),
        ('{"url": "https://x/editlib.whl", "archive_info": {}}', "pip install 'editlib[lora]'"),
        ('{"url": "file:///x", "dir_info": {}}', "pip install '.[lora]' in the folder of editlib"),
        ('{"url": "file:///x", "dir_info": {"editable": true}}', "pip install -e '.[lora]' in the folder of editlib"),
    ],
)
def test_the_line_that_installs_an_extra_is_for_where_editlib_came_from(monkeypatch, origin, line):
    monkeypatch.setattr("editlib.version.distribution", lambda name: SimpleNamespace(read_text=lambda file: origin))
    assert install_line("lora") == line


def test_a_source_tree_that_is_not_installed_has_a_line_too(monkeypatch):
    def none(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("editlib.version.distribution", none)
    assert install_line("eval") == "pip install '.[eval]' in the folder of editlib"


def test_every_message_takes_its_line_from_there():
    """A name as from a registry does not work for whoever runs a clone."""
    root = Path(editlib.__file__).parent
    named = [path.name for path in root.rglob("*.py") if "editlib[" in path.read_text(encoding="utf-8")]
    assert named == ["version.py"]


def test_help_shows_every_command_in_a_panel(call):
    code, said, _ = call("--help")
    assert code == 0 and "Others" not in said
    named = [name for names in PANELS.values() for name in names.split()]
    assert sorted(named) == sorted(typer.main.get_command(app).commands)
    assert all(panel in said for panel in PANELS)


def test_an_edit_needs_a_place_and_a_look_does_not(call, folder, requests, monkeypatch):
    refused(call("unlearn", folder, "--requests", requests), "--out is not given", "--show-rows")
