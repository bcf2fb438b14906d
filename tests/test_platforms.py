"""What Windows and macOS do differently: modules that Linux alone has, handles that cannot be synced, encodings."""

import ast
import errno
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import editlib
from editlib.errors import OutputError
from editlib.evaluation import memory
from editlib.files import atomic_folder, atomic_path, sync, write_json
from editlib.hparams import load_hparams
from editlib.requests.reading import read_requests, write_requests
from editlib.requests.request import EditRequest

ROOT = Path(editlib.__file__).parent
ELSEWHERE = ("fcntl", "resource", "pwd", "grp", "termios", "syslog", "spwd", "crypt", "posix")
MODULES = [module.name for module in pkgutil.walk_packages([str(ROOT)], "editlib.") if "__main__" not in module.name]

HIDE = f"""
import builtins, importlib
real, hidden = builtins.__import__, {ELSEWHERE!r}
def guarded(name, globals=None, *rest, **more):
    if name.partition(".")[0] in hidden and str((globals or {{}}).get("__name__")).startswith("editlib"):
        raise ImportError(name + " is not there")
    return real(name, globals, *rest, **more)
builtins.__import__ = guarded
for module in {MODULES!r}:
    importlib.import_module(module)
from editlib.evaluation.memory import peak_rss_mb, resource
assert resource is None and peak_rss_mb() > 1
"""


def test_every_module_opens_without_what_linux_alone_has():
    path = os.pathsep.join([str(ROOT.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", HIDE],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_memory_is_told_with_and_without_the_module(monkeypatch):
    with_it = memory.peak_rss_mb()
    monkeypatch.setattr(memory, "resource", None)
    assert 1 < memory.peak_rss_mb() <= with_it * 2


def is_text(call):
    """Whether a call of `open` or its like reads or writes text."""
    modes = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    if any("b" in mode for mode in modes):
        return False
    if isinstance(call.func, ast.Attribute):
        if getattr(getattr(call.func.value, "func", None), "id", "") == "distribution":
            return False  # a package's metadata, always read as UTF-8
        whose = getattr(call.func.value, "id", "")
        named = call.func.attr in ("read_text", "write_text")
        return named or (call.func.attr == "fdopen") or (call.func.attr == "open" and whose not in OTHERS)
    return getattr(call.func, "id", "") == "open"


OTHERS = ("os", "Chain", "cls", "jsonlines", "archive")
"""Whose `open` is no file's, or has no encoding to give."""


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_text_is_utf8_wherever_it_is_read_or_written(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and is_text(node):
            assert "encoding" in {keyword.arg for keyword in node.keywords}, f"line {node.lineno}"


@pytest.fixture
def windows(monkeypatch):
    """Folders cannot be opened, and handles that may not be written cannot be synced."""
    fcntl = pytest.importorskip("fcntl")
    real_open, real_sync, synced = os.open, os.fsync, []

    def opened(path, flags, *rest, **more):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_open(path, flags, *rest, **more)

    def fsync(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        synced.append(handle)
        real_sync(handle)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", fsync)
    return synced


def test_what_is_written_is_synced_where_only_writable_files_can_be(tmp_path, windows):
    home = tmp_path / "Eigene Dateien Ü 模型"
    write_json(home / "a b.json", {"x": 1})
    with atomic_path(home / "c.bin") as temporary:
        temporary.write_bytes(b"x")
    with atomic_folder(home / "out") as temporary:
        (temporary / "d").write_bytes(b"x")
    assert len(windows) == 3
    sync(home)
    (home / "d").write_bytes(b"x")
    (home / "d").chmod(0o444)
    sync(home / "d")
    assert sorted(path.name for path in home.iterdir()) == ["a b.json", "c.bin", "d", "out"]


@pytest.mark.parametrize("number", [errno.EBADF, errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_a_system_that_syncs_nothing_does_without(tmp_path, monkeypatch, number):
    def refuse(handle):
        raise OSError(number, "cannot be synced")

    monkeypatch.setattr(os, "fsync", refuse)
    write_json(tmp_path / "a.json", 1)
    sync(tmp_path)


def test_a_disk_that_failed_is_told(tmp_path, monkeypatch):
    def fail(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        write_json(tmp_path / "a.json", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["mit Leerzeichen", "ünïcode", "模型 データ", "a'b", "100%"])
def test_files_of_the_user_may_be_called_anything(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    asked = [EditRequest("a", "{}在哪里", "北京", answer="中国")]
    write_requests(folder / f"{name}.jsonl", asked)
    assert read_requests(folder / f"{name}.jsonl") == asked
    write_json(folder / f"{name}.json", {"layers": [1]})
    assert load_hparams(folder / f"{name}.json", "MEMIT").layers == [1]
