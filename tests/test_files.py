"""Nobody sees half a file, and a hash that knows every bit of a model."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import make_llama
from transformers import AutoModelForCausalLM

from editlib import files
from editlib.errors import FetchError, OutputError
from editlib.files import atomic_folder, atomic_path, check_output, write_json
from editlib.models.weights import weights_sha256


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_atomic_path_replaces_only_when_whole(tmp_path):
    path = tmp_path / "a.bin"
    for content in ("old", "new"):
        with atomic_path(path) as temporary:
            temporary.write_text(content)
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == content
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_path_keeps_the_old_content_on_error(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.bin"]


def test_atomic_path_turns_a_full_disk_into_one_line(tmp_path):
    path = tmp_path / "a.bin"
    with (
        pytest.raises(OutputError, match=r"cannot write .*a\.bin: No space left"),
        atomic_path(path) as temporary,
    ):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert names(tmp_path) == []
    with pytest.raises(OutputError, match="cannot write"), atomic_path(tmp_path / "none" / "a") as temporary:
        temporary.write_text("x")


def test_errors_of_our_own_keep_their_words(tmp_path):
    with pytest.raises(FetchError, match=r"^no network$"), atomic_path(tmp_path / "a"):
        raise FetchError("no network")
    with pytest.raises(FetchError, match=r"^no network$"), atomic_folder(tmp_path / "b"):
        raise FetchError("no network")
    assert names(tmp_path) == []


def test_atomic_folder_appears_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with atomic_folder(out) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "x").write_text("1")
        assert not out.exists()
    assert (out / "sub" / "x").read_text() == "1"
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_atomic_folder_keeps_the_old_one_on_error(tmp_path, error):
    out = tmp_path / "out"
    out.mkdir()
    (out / "x").write_text("old")
    with pytest.raises((error, OutputError)), atomic_folder(out, overwrite=True) as temporary:
        (temporary / "x").write_text("half")
        raise error
    assert (out / "x").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_atomic_folder_overwrites_the_whole(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale").write_text("old")
    with atomic_folder(out, overwrite=True) as temporary:
        (temporary / "x").write_text("new")
    assert names(out) == ["x"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_the_old_folder_survives_an_interrupt_between_the_renames(tmp_path, monkeypatch, error):
    out = tmp_path / "out"
    out.mkdir()
    (out / "x").write_text("old")
    calls, replace = [], os.replace

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise error
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", second_fails)
    with pytest.raises((OutputError, KeyboardInterrupt)), atomic_folder(out, overwrite=True) as temporary:
        (temporary / "x").write_text("new")
    assert (out / "x").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_check_output(tmp_path):
    check_output(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError, match="file is a file"):
        check_output(file, overwrite=True)
    full = tmp_path / "full"
    full.mkdir()
    (full / ".hidden").write_text("")
    with pytest.raises(OutputError, match=r"not empty.*--overwrite"):
        check_output(full)
    check_output(full, overwrite=True)
    with pytest.raises(OutputError, match="not empty"), atomic_folder(full):
        raise AssertionError("nothing may be done before the check")


def test_hash_changes_with_one_bit(tiny_model):
    before = weights_sha256(tiny_model)
    assert weights_sha256(tiny_model) == before
    last = list(tiny_model.parameters())[-1].data.view(torch.int32).flatten()
    last[-1] ^= 1
    assert weights_sha256(tiny_model) != before
    last[-1] ^= 1
    assert weights_sha256(tiny_model) == before
    assert weights_sha256(tiny_model.to(torch.bfloat16)) != before


def test_hash_does_not_depend_on_files_or_order(tmp_path, monkeypatch):
    model = make_llama()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    before = weights_sha256(model)
    for folder in ("one", "many"):
        assert weights_sha256(AutoModelForCausalLM.from_pretrained(tmp_path / folder)) == before
    state = dict(reversed(model.state_dict().items()))
    monkeypatch.setattr(model, "state_dict", lambda: state)
    assert weights_sha256(model) == before


def test_hash_knows_swapped_and_renamed_weights(tiny_llama):
    before = weights_sha256(tiny_llama)
    one, two = (tiny_llama.model.layers[i].mlp.down_proj for i in (0, 1))
    one.weight, two.weight = two.weight, one.weight
    assert weights_sha256(tiny_llama) != before


def test_what_is_written_is_as_readable_as_any_new_file(tmp_path):
    """safetensors writes for its owner alone, so that a server under another user could not open a folder."""
    (tmp_path / "any").write_text("x")
    ordinary = (tmp_path / "any").stat().st_mode
    with atomic_path(tmp_path / "file") as temporary:
        save_file({"x": torch.zeros(1)}, temporary)
    with atomic_folder(tmp_path / "folder") as temporary:
        save_file({"x": torch.zeros(1)}, temporary / "file")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "folder" / "file").stat().st_mode == ordinary


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"b": [1.5, float("nan")], "a": (float("inf"), {"c": -float("inf")}), "text": "half \ud800"})
    assert json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail) == {
        "b": [1.5, None],
        "a": [None, {"c": None}],
        "text": "half ?",
    }
    write_json(path, {"b": 1, "a": 2}, sort_keys=True)
    assert path.read_text(encoding="utf-8") == '{\n "a": 2,\n "b": 1\n}\n'
