"""Whatever happens to a chain's files, every command says it in one line and changes nothing."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
from chain_cases import A, B, C, files
from test_cli import refused

from editlib.requests.reading import write_requests


@pytest.fixture(scope="module")
def kept():
    return {}


@pytest.fixture
def chain(start, kept, tmp_path):
    """A chain of two batches; made once, copied for each case."""
    if "chain" not in kept:
        made = start("MEMIT")
        made.add(A)
        made.add(B)
        kept["chain"] = made.path
    path = tmp_path / "copy"
    shutil.copytree(kept["chain"], path)
    write_requests(tmp_path / "c.jsonl", C)
    return path


def record(change):
    """The record with other content, and the hash of that."""

    def damage(path):
        content = json.loads((path / "chain.json").read_text())
        del content["sha256"]
        change(content)

        def raw(value):
            return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()

        content["sha256"] = hashlib.sha256(raw(content)).hexdigest()
        (path / "chain.json").write_bytes(raw(content))

    return damage


def written(change):
    def damage(path):
        (path / "chain.json").write_bytes(change((path / "chain.json").read_bytes()))

    return damage


def in_place(name, put):
    def damage(path):
        place = sorted((path / "batches").iterdir())[0] if name == "batch" else path / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        put(place)

    return damage


def folder(place):
    place.mkdir()


def dangling(place):
    place.symlink_to("nowhere")


def gone(place):
    pass


def empty(place):
    place.write_bytes(b"")


DAMAGE = {
    "an empty record": (written(lambda raw: b""), "damaged"),
    "a record in UTF-16": (written(lambda raw: raw.decode().encode("utf-16")), "damaged"),
    "a record with a BOM": (written(lambda raw: b"\xef\xbb\xbf" + raw), "damaged"),
    "a record with other line ends": (written(lambda raw: raw.replace(b"\n", b"\r\n")), "damaged"),
    "a deep record": (written(lambda raw: b"[" * 100_000), "damaged"),
    "NaN": (written(lambda raw: b'{"sha256": NaN}'), "damaged"),
    "a large number": (written(lambda raw: b'{"sha256": ' + b"9" * 5000 + b"}"), "damaged"),
    "a list": (written(lambda raw: b"[]"), "damaged"),
    "a folder for a record": (in_place("chain.json", folder), "is not a chain"),
    "a dangling record": (in_place("chain.json", dangling), "is not a chain"),
    "a folder for a batch": (in_place("batch", folder), "cannot be read"),
    "a dangling batch": (in_place("batch", dangling), "missing"),
    "no batch": (in_place("batch", gone), "missing"),
    "an empty batch": (in_place("batch", empty), "damaged"),
    "a file for the batches": (in_place("batches", empty), "batches"),
    "batches that are a number": (record(lambda c: c.update(batches=5)), "not the content of a chain"),
    "a batch that is a number": (record(lambda c: c.update(batches=[5])), "not the content of a chain"),
    "a base that is a list": (record(lambda c: c.update(base=[])), "base is of another kind"),
    "a base without a name": (record(lambda c: c["base"].pop("name")), "base name is missing"),
    "a base called 7": (record(lambda c: c["base"].update(name=7)), "base name is of another kind"),
    "settings that are a list": (record(lambda c: c.update(hparams=[1])), "hparams is of another kind"),
    "an unknown algorithm": (record(lambda c: c.update(algorithm="XX")), "'XX' is not known"),
    "algorithms": (record(lambda c: c.update(algorithm=["MEMIT"])), "algorithm is of another kind"),
    "a later format": (record(lambda c: c.update(format=99)), "the version that wrote it"),
    "a key of a later version": (record(lambda c: c.update(new=1)), "'new'"),
    "layers that are a list": (record(lambda c: c["batches"][0].update(layers=[1])), "of another kind"),
    "no layers": (record(lambda c: c["batches"][0].update(layers={})), "of another kind"),
    "files that are a number": (record(lambda c: c.update(files=3)), "files is of another kind"),
    "statistics by no path": (record(lambda c: c.update(statistics={"1": 3})), "statistics 1 is of another kind"),
    "a file outside": (record(lambda c: c["batches"][0].update(file="../c.jsonl")), "batch 1 file is of another kind"),
}
COMMANDS = (
    ["status"], ["status", "--json"], ["log"], ["verify"], ["undo"], ["revoke", "a1"], ["export", "--out", "OUT"],
    ["export", "--out", "OUT", "--as", "receipt"], ["add", "--requests", "REQUESTS"],
)  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_it_is_said_by_every_command(call, chain, tmp_path, case):
    damage, word = DAMAGE[case]
    damage(chain)
    before = files(tmp_path)
    names = {"OUT": tmp_path / "out", "REQUESTS": tmp_path / "c.jsonl"}
    for command, *rest in COMMANDS:
        refused(call("chain", command, chain, *[names.get(word, word) for word in rest]), word)
    assert files(tmp_path) == before


@pytest.mark.parametrize("command", [["add", "--requests", "REQUESTS"], ["revoke", "a1"]])
def test_statistics_that_are_gone_are_missed_before_a_model_is_loaded(call, chain, tmp_path, monkeypatch, command):
    def move(content):
        for one in content["statistics"].values():
            one["path"] += ".moved"

    record(move)(chain)
    monkeypatch.setattr("editlib.workbench.load_checked", None)
    name, *rest = [tmp_path / "c.jsonl" if word == "REQUESTS" else word for word in command]
    refused(call("chain", name, chain, *rest), "statistics of layer 1 are gone", "--stats-dir")


def test_what_is_not_ours_is_left_alone(call, chain):
    """A folder under a name that only a batch has is passed over, too."""
    (chain / "batches" / "mine.txt").write_text("mine")
    (chain / "batches" / "0009-aaaaaaaaaaaa.safetensors").mkdir()
    (chain / ".lock").unlink()
    assert call("chain", "undo", chain)[0] == 0
    assert (chain / "batches" / "mine.txt").read_text() == "mine"
    assert call("chain", "status", chain)[0] == 0
