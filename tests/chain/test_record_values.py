"""Any value in any place of `chain.json`, under a hash made anew: read as it is, or one line; never another error."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from chain_cases import RETAIN, A, B, C, files
from safetensors.torch import load, save
from test_cli import refused
from test_hostile_inputs import STRANGE, changed, paths

from editlib.chain import Chain
from editlib.chain.batch import Batch
from editlib.errors import ChainError, EditlibError
from editlib.requests.reading import write_requests


def rendered(content):
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def put(path, content):
    own = hashlib.sha256(rendered(content)).hexdigest()
    (path / "chain.json").write_bytes(rendered({**content, "sha256": own}))


@pytest.fixture(scope="module")
def kept():
    return {}


@pytest.fixture
def chain(start, kept, tmp_path):
    """The folder and content of a UniErase chain with everything that a record may hold."""
    if "path" not in kept:
        made = start("UniErase gated", retain=RETAIN, left_out={"retain.jsonl": ["line 9"]})
        made.add(A, left_out={"a.jsonl": ["line 3"]})
        made.add(B)
        made.revoke(["a1"])
        kept["path"] = made.path
    path = tmp_path / "copy"
    shutil.copytree(kept["path"], path)
    content = json.loads((path / "chain.json").read_text())
    del content["sha256"]
    assert content["batches"] and content["revoked"] and content["left_out"] and content["files"]
    return path, content


def without(content, place):
    """A copy without the key or number at a place."""
    found = changed(content, place, None)
    inner = found
    for key in place[:-1]:
        inner = inner[key]
    del inner[place[-1]]
    return found


def test_every_place(chain):
    path, content = chain
    Chain.open(path).status()
    refusals = 0
    for place in list(paths({**content, "hparams": {}}))[1:]:
        for value in (*(changed(content, place, new) for new in STRANGE), without(content, place)):
            put(path, value)
            before = files(path)
            try:
                opened = Chain.open(path)
                json.dumps(opened.status())
                "".join(opened.record.ids)
            except ChainError as error:
                assert "\n" not in str(error) and str(path) in str(error)
                refusals += 1
            assert files(path) == before
    assert refusals > 500


HOSTILE = {
    "a null byte in the model's name": (("base", "name"), "a\0b", "base name"),
    "a folder as the model": (("base", "name"), "gone/away", "gone/away cannot be loaded"),
    "another dtype": (("base", "dtype"), "float1", "float1"),
    "another model": (("base", "sha256"), "0" * 64, "other weights"),
    "a layer in words": (("base", "layers"), {"one": "x"}, "base layers 'one'"),
    "an endless layer": (("base", "layers"), {"9" * 400: "x"}, "base layers"),
    "ids that are numbers": (("batches", 0, "ids"), [1], "batch 1 ids 1"),
    "a ratio in words": (("batches", 0, "layers", "1", "ratio"), "x", "batch 1 layers 1 ratio"),
    "a batch of another folder": (("batches", 0, "file"), "/etc/passwd", "batch 1 file"),
    "a template without a place": (("templates",), ["x"], "templates 1"),
    "an unknown setting": (("hparams", "v_lrr"), 1, "v_lrr"),
    "settings in words": (("hparams", "layers"), "4-8", "layers"),
    "prompts of another kind": (("prompts",), {"chat": 3}, "chat"),
    "an unknown prompt": (("prompts",), {"shouts": True}, "shouts"),
    "statistics elsewhere": (("statistics", "1", "path"), "x" * 5000, "too long"),
    "a file that is not ours": (("files",), {"../../x": "0"}, "files '../../x'"),
    "a large seed": (("seed",), 10**400, "seed"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_the_next_batch_is_refused_in_one_line_and_nothing_changes(call, chain, tmp_path, case):
    path, content = chain
    place, new, word = HOSTILE[case]
    value = json.loads(json.dumps(content))
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = new
    put(path, value)
    write_requests(tmp_path / "c.jsonl", C)
    before = files(tmp_path)
    refused(call("chain", "add", path, "--requests", tmp_path / "c.jsonl"), word)
    assert files(tmp_path) == before


def test_every_place_of_a_batchs_notes(chain):
    path, content = chain
    entry = content["batches"][-1]
    tensors = load((path / entry["file"]).read_bytes())
    notes = json.loads(tensors["notes"].numpy().tobytes())
    refusals = 0
    for place in paths(notes):
        for value in (*(changed(notes, place, new) for new in STRANGE), *([without(notes, place)] if place else [])):
            raw = json.dumps(value, sort_keys=True).encode()
            damaged = save({**tensors, "notes": torch.frombuffer(bytearray(raw), dtype=torch.uint8)})
            try:
                found = Batch.from_bytes(damaged, entry["file"])
                assert all(isinstance(request.question, str) for request in found.requests)
                assert all(isinstance(one, int) for ids in found.answers.values() for one in ids)
                assert all(isinstance(name, str) for name in found.anchors)
                json.dumps([found.values.steps, found.values.nll, found.values.relative_norm])
            except EditlibError as error:
                assert "\n" not in str(error) and entry["file"] in str(error)
                refusals += 1
    assert refusals > 100


@pytest.mark.parametrize("name", ["token.safetensors", "retain.jsonl"])
@pytest.mark.parametrize("raw", [b"\0" * 50, b"{}", b"[1]\n", b'{"id": 1, "prompt": []}\n', b"\xff\xfe"])
def test_files_beside_the_record_that_hold_something_else(call, chain, tmp_path, name, raw):
    """Under their own hash, made anew."""
    path, content = chain
    (path / name).write_bytes(raw)
    write_requests(tmp_path / "c.jsonl", C)
    put(path, {**content, "files": {**content["files"], name: hashlib.sha256(raw).hexdigest()}})
    before = files(tmp_path)
    refused(call("chain", "add", path, "--requests", tmp_path / "c.jsonl"), name.partition(".")[0])
    assert files(tmp_path) == before
