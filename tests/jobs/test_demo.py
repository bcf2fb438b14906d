"""Options of `editlib demo` that cannot be used: one line before anything is fetched, and nothing is lost."""

from __future__ import annotations

import pytest
from test_cli import refused

from editlib.errors import ModelError


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder to work in, beside others, inside of the user's home; nothing is fetched."""

    def fetch(*_, **__):
        raise ModelError("fetched")

    monkeypatch.setattr("editlib.jobs.demo.fetch", fetch)
    work = tmp_path / "home" / "work"
    for folder in (work / "full", work / "repository" / ".git", work / "empty"):
        folder.mkdir(parents=True)
    (work / "full" / "mine").write_text("precious")
    (work / "repository" / "code.py").write_text("precious")
    (work / "file").write_text("precious")
    (work / "link").symlink_to(work)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(work)
    return tmp_path / "home"


def everything(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


BAD = {
    "a file": (["--out", "file"], "is a file"),
    "a file in between": (["--out", "file/deeper/out"], "is not a folder"),
    "a folder with something in it": (["--out", "full"], "not empty"),
    "no name": (["--out", ""], "not empty"),
    "the working directory": (["--out", ".", "--overwrite"], "holds the working directory"),
    "the folder above": (["--out", "..", "--overwrite"], "holds the working directory"),
    "a link to the working directory": (["--out", "link", "--overwrite"], "holds the working directory"),
    "a way round to it": (["--out", "full/../../work", "--overwrite"], "holds the working directory"),
    "the root": (["--out", "/", "--overwrite"], "holds the working directory"),
    "a repository": (["--out", "repository", "--overwrite"], "holds a repository"),
    "a null byte": (["--out", "a\0b"], "null"),
    "too long a name": (["--out", "x" * 300], "x" * 100),
    "a seed below zero": (["--seed", "-1"], "--seed"),
    "too large a seed": (["--seed", str(2**32)], "--seed"),
    "half a seed": (["--seed", "0.5"], "--seed"),
    "a seed in words": (["--seed", "one"], "--seed"),
    "no value": (["--out"], "--out"),
    "an unknown option": (["--fast"], "--fast"),
    "an argument": (["smollm2-135m"], "smollm2-135m"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_one_line_and_cost_nothing(call, home, case):
    given, word = BAD[case]
    before = everything(home)
    result = call("demo", *given)
    refused(result, word)
    assert "fetched" not in result[2] and everything(home) == before


@pytest.mark.parametrize("out", ["empty", "new", "deep/er", "mit Ümlaut und Leerzeichen", "full --overwrite"])
def test_a_model_that_cannot_be_fetched_leaves_all_as_it_was(call, home, out):
    before = everything(home)
    name, _, overwrite = out.partition(" --")
    refused(call("demo", "--out", name, *([f"--{overwrite}"] if overwrite else [])), "fetched")
    assert everything(home) == before


def test_too_little_room_is_said_before_the_old_folder_goes(call, home, monkeypatch, tiny_llama, tok):
    monkeypatch.setattr("editlib.jobs.demo.fetch", lambda _: None)
    monkeypatch.setattr("editlib.jobs.demo.load", lambda _: (tiny_llama, tok))
    monkeypatch.setattr("editlib.files.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    before = everything(home)
    refused(call("demo", "--out", "full", "--overwrite"), "0 MB are free")
    assert everything(home) == before
