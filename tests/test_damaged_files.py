"""Files of ours that are cut, mixed up or of other content: each is read as it is, or refused in one line."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict, fields

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from test_cli import refused
from test_hostile_inputs import changed, paths

from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.unierase.token import TokenHeader, UnlearningToken
from editlib.chain.record import BatchEntry, ChainRecord, Revocation
from editlib.chain.store import Store
from editlib.errors import EditlibError
from editlib.export import read_receipt
from editlib.export.delta import Delta
from editlib.export.receipt import prompts_of
from editlib.reports.receipt import read_metrics

often = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)

HEADER = TokenHeader("[UNL]", "tiny", "ab", 0, 3, 4, {"steps": 3}, {"chat": True}, {"refusal_nll": 0.5})
ROWS = torch.linspace(-1, 1, 8)
RECEIPT = {
    "editlib": "0.2.0", "algorithm": "UniErase", "base": {"name": "x", "sha256": "y"}, "requests": [{"id": "a"}],
    "anchors": ["b"], "token": {"token": "[UNL]", "seed": 0}, "prompts": {"chat": True, "system": "x"},
    "requests_sha256": "z", "layers": {"1": {"update": 0.1}}, "timings": {"edit": 1.0},
    "guessed_subjects": {"a": "France"}, "left_out": {"f.jsonl": ["line 3"]},
}  # fmt: skip
METRICS = {"edited": {"sha256": "x"}, "efficacy": 1.0, "groups": {"efficacy": {"n": 1, "interval": [0, 1]}}}
ENTRY = BatchEntry(
    1, f"batches/0001-{'a' * 12}.safetensors", "b", "t0", "0.2.0", 5, 2, ("a",),
    {"1": {"sha256": "c", "update": 0.5, "ratio": 0.1}}, {"f.jsonl": ["line 3"]}, {"a": "France"},
)  # fmt: skip
CHAIN = ChainRecord(
    1, "t0", {"name": "x", "sha256": "y", "dtype": None, "layers": {"1": "z"}}, "MEMIT", {"layers": [1]}, None, 0,
    ("{}",), {"1": {"path": "p", "sha256": "q"}}, {}, (ENTRY,), (Revocation("t1", ("r",), (1,)),),
)  # fmt: skip


def token_bytes(header=None, row_in=ROWS, row_out=ROWS):
    text = json.dumps(asdict(HEADER) if header is None else header)
    return save({"row_in": row_in.clone(), "row_out": row_out.clone()}, metadata={"editlib": text})


def chain_bytes(content):
    """`chain.json` with a hash of its own, made anew."""

    def rendered(value):
        return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()

    return rendered({**content, "sha256": hashlib.sha256(rendered(content)).hexdigest()})


def chain_content():
    content = json.loads(CHAIN.to_bytes())
    del content["sha256"]
    return content


def delta_bytes(folder):
    delta = Delta(
        "x", "y", "z", "LlamaForCausalLM", "float32", {1: "m.1"}, {1: LowRank(ROWS[:, None], ROWS[None])},
        token=UnlearningToken(ROWS, ROWS, HEADER), receipt=RECEIPT,
    )  # fmt: skip
    delta.save(folder / "made.safetensors")
    return (folder / "made.safetensors").read_bytes()


def read_chain(path):
    record = Store(path.parent).record()
    assert isinstance(record.ids, dict) and record.settings.layers


def read_receipt_of(path):
    prompts_of(read_receipt(path.parent))


READERS = {
    "editlib.json": read_receipt_of,
    "metrics.json": read_metrics,
    "chain.json": read_chain,
    "token.safetensors": UnlearningToken.load,
    "edit.safetensors": Delta.load,
}
JSON_FILES = {
    "editlib.json": (RECEIPT, lambda value: json.dumps(value).encode()),
    "metrics.json": (METRICS, lambda value: json.dumps(value).encode()),
    "chain.json": (chain_content(), chain_bytes),
    "token.safetensors": (json.loads(json.dumps(asdict(HEADER))), token_bytes),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The bytes of a sound file of each kind."""
    made = {name: render(value) for name, (value, render) in JSON_FILES.items()}
    return {**made, "edit.safetensors": delta_bytes(tmp_path_factory.mktemp("delta"))}


def read(path, raw):
    """Reads a file with these bytes; returns whether it was refused, which is in one line that names it."""
    path.write_bytes(raw)
    try:
        READERS[path.name](path)
    except EditlibError as error:
        assert len(str(error).splitlines()) == 1 and path.name in str(error), error
        found = True
    else:
        found = False
    assert [one.name for one in path.parent.iterdir()] == [path.name] and path.read_bytes() == raw
    return found


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    return folder


def without(value, path):
    """A copy without the key or number at a place."""
    found = copy.deepcopy(value)
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return found


def at(value, path):
    for key in path:
        value = value[key]
    return value


@pytest.mark.parametrize("name", READERS)
def test_a_sound_file_is_read(place, sound, name):
    assert not read(place / name, sound[name])


@pytest.mark.parametrize("name", READERS)
@often
@given(data=st.data())
def test_a_truncated_file_is_refused(place, sound, name, data):
    raw = sound[name]
    assert read(place / name, raw[: data.draw(st.integers(0, len(raw) - 2), "bytes left")])


@pytest.mark.parametrize("name", READERS)
@often
@given(data=st.data())
def test_bytes_that_are_changed_swapped_or_gone(place, sound, name, data):
    raw = bytearray(sound[name])
    spots = st.integers(0, len(raw) - 1)
    kind = data.draw(st.sampled_from(["changed", "swapped", "gone", "more"]), "kind")
    start, end = sorted((data.draw(spots, "start"), data.draw(spots, "end")))
    if kind == "changed":
        raw[start] = data.draw(st.integers(0, 255), "byte")
    elif kind == "swapped":
        middle = (start + end) // 2
        raw = raw[:start] + raw[middle:end] + raw[start:middle] + raw[end:]
    elif kind == "gone":
        del raw[start:end]
    else:
        raw[start:start] = data.draw(st.binary(max_size=9), "more")
    read(place / name, bytes(raw))


@pytest.mark.parametrize("name", JSON_FILES)
@often
@given(data=st.data())
def test_values_of_other_kinds_swapped_or_missing(place, name, data):
    """Under hashes made anew, where a file has one."""
    value, render = JSON_FILES[name]
    everywhere = st.sampled_from([path for path in paths(value) if path])
    where = data.draw(everywhere, "place")
    kind = data.draw(st.sampled_from(["other", "missing", "swapped"]), "kind")
    if kind == "other":
        made = changed(value, where, data.draw(VALUES, "value"))
    elif kind == "missing":
        made = without(value, where)
    else:
        other = data.draw(everywhere.filter(lambda path: path[: len(where)] != where != path), "other place")
        if where[: len(other)] == other:
            where, other = other, where
        made = changed(changed(value, other, at(value, where)), where, at(value, other))
    read(place / name, render(made))


@pytest.mark.parametrize("name", [field.name for field in fields(TokenHeader) if field.name != "names"])
def test_a_token_that_lacks_what_has_no_default_is_refused(place, name):
    header = asdict(HEADER)
    del header[name]
    assert read(place / "token.safetensors", token_bytes(header)) == (name not in ("hparams", "prompts", "metrics"))


@pytest.mark.parametrize(
    ("row_in", "row_out", "names"),
    [
        (ROWS, ROWS[:4], []),
        (ROWS[None, None], ROWS[None, None], []),
        (ROWS.int(), ROWS.int(), []),
        (ROWS[:0], ROWS[:0], []),
        (torch.tensor(1.0), torch.tensor(1.0), []),
        (ROWS.view(2, 4), ROWS.view(2, 4), []),
        (ROWS.view(2, 4), ROWS.view(2, 4), ["[UNL]"]),
        (ROWS, ROWS, ["[UNL]", "[UNL2]"]),
        (ROWS, ROWS, [7]),
        (ROWS, ROWS, [""]),
        (ROWS, ROWS, "[UNL]"),
    ],
)
def test_rows_that_do_not_fit_their_header_are_refused(place, row_in, row_out, names):
    header = {**asdict(HEADER), "names": names}
    assert read(place / "token.safetensors", token_bytes(header, row_in, row_out))


@pytest.mark.parametrize(
    "raw",
    [b"", b"{}", b"[" * 9999, token_bytes({**asdict(HEADER), "token": 3}), token_bytes()[:-3]],
    ids=["empty", "JSON", "deep", "a number for a token", "cut"],
)
def test_a_damaged_token_stops_an_edit_before_a_model_is_loaded(call, folder, tmp_path, monkeypatch, raw):
    monkeypatch.setattr("editlib.workbench.load_checked", None)
    (tmp_path / "token.safetensors").write_bytes(raw)
    (tmp_path / "f.jsonl").write_text('{"prompt": "What is the capital of {}?", "subject": "France"}\n')
    before = sorted(tmp_path.rglob("*"))
    common = ("--token", tmp_path / "token.safetensors", "--stats-dir", tmp_path / "s")
    given_files = ("--requests", tmp_path / "f.jsonl", "--out", tmp_path / "out")
    refused(call("unlearn", folder, *given_files, *common), "token.safetensors: not an unlearning token")
    assert sorted(tmp_path.rglob("*")) == before
