"""A delta file put on its base gives the edited folder to the byte, and nothing else is taken for one."""

from __future__ import annotations

import dataclasses
import json
from collections import namedtuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import LAYERS, make_gpt2, make_llama, train_tokenizer

from editlib import files
from editlib.algorithms.edit import restore
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.unierase.token import TokenHeader, UnlearningToken
from editlib.errors import DeltaError, OutputError
from editlib.export import Delta, make_delta, save_edited
from editlib.export.apply import apply_delta, apply_delta_file
from editlib.models.anatomy import anatomy
from editlib.models.loading import load
from editlib.models.weights import save_model, weights_sha256

KINDS = {"tied": make_llama, "untied": lambda: make_llama(tied=False, seed=1), "conv1d": make_gpt2}


def token(width=32, seed=3):
    generator = torch.Generator().manual_seed(seed)
    row_in, row_out = torch.randn(2, width, generator=generator)
    return UnlearningToken(row_in, row_out, TokenHeader("[UNL]", "tiny", "", 0, 8, 2))


def edited_by_hand(model, tok, updates, unl, base="the base", base_sha256=None):
    """Writes `updates` into `model` as an edit does; (delta, receipt)."""
    sha = base_sha256 or weights_sha256(model)
    anat = anatomy(model)
    if unl is not None:
        unl.add_to(model, tok)
    originals = {layer: anat.weight(layer).clone() for layer in updates}
    for layer, update in updates.items():
        update.add_to(anat.weight(layer))
    receipt = {
        "editlib": "0", "algorithm": "hand", "base": {"name": base, "sha256": sha}, "requests": [{"id": "a"}],
        "layers": {str(layer): {} for layer in updates}, "token": unl and {"token": unl.header.token},
    }  # fmt: skip
    result = weights_sha256(model)
    receipt["result_sha256"] = result
    given = {"base": base, "base_sha256": sha, "result_sha256": result, "token": unl, "receipt": receipt}
    return make_delta(anat, updates, originals, **given), receipt


def update(rank, seed=0, size=0.05, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(32, rank, generator=generator), torch.randn(rank, 64, generator=generator)
    return LowRank((left * size).to(dtype), right.to(dtype))


def same_files(one, other):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder of each kind in each dtype."""
    found = {}
    for kind, make in KINDS.items():
        for dtype in (torch.float32, torch.bfloat16):
            path = tmp_path_factory.mktemp(f"{kind}-{str(dtype)[6:]}")
            save_model(make().to(dtype), train_tokenizer(chat=True), path)
            found[kind, dtype] = path
    return found


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from([*KINDS]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    with_token=st.booleans(),
    ranks=st.dictionaries(st.integers(0, LAYERS - 1), st.integers(1, 5), min_size=1, max_size=3),
    seed=st.integers(0, 999),
)
def test_base_and_delta_give_the_edited_folder_byte_for_byte(
    bases, tmp_path_factory, kind, dtype, with_token, ranks, seed
):
    work, base = tmp_path_factory.mktemp("one"), bases[kind, dtype]
    model, tok = load(str(base))
    assert model.dtype == dtype
    updates = {layer: update(rank, seed + layer) for layer, rank in ranks.items()}
    delta, receipt = edited_by_hand(model, tok, updates, token(seed=seed) if with_token else None)
    save_edited(model, tok, work / "edited", receipt)
    delta.save(work / "d.safetensors")
    apply_delta_file(str(base), work / "d.safetensors", work / "again")
    same_files(work / "edited", work / "again")
    assert [*delta.factors] == sorted(ranks) or dtype == torch.bfloat16  # 4 kB as bf16: less than the factors of rank 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_that_no_factors_give_are_kept_as_the_matrix_once(bases, tmp_path, dtype):
    """A dense update, and one that was rounded after every step."""
    model, tok = load(str(bases["tied", dtype]))
    anat, sha = anatomy(model), weights_sha256(model)
    steps = [update(1, seed) for seed in range(4)]
    originals = {layer: anat.weight(layer).clone() for layer in (1, 2)}
    updates = {1: LowRank.full(update(3).dense()), 2: sum(steps[1:], steps[0])}
    updates[1].add_to(anat.weight(1))
    for step in steps:
        step.add_to(anat.weight(2))
    edited = {layer: anat.weight(layer).clone() for layer in originals}
    given = {"base_sha256": sha, "result_sha256": weights_sha256(model), "token": None, "receipt": {}}
    delta = make_delta(anat, updates, originals, base="x", **given)
    assert [*delta.matrices] == [1, 2] and not delta.factors
    delta.save(tmp_path / "d")
    assert (tmp_path / "d").stat().st_size < 2 * edited[1].nbytes + 2000
    restore(anat, originals)
    apply_delta(model, tok, Delta.load(tmp_path / "d"))
    assert all(torch.equal(anat.weight(layer), edited[layer]) for layer in edited)


@pytest.fixture
def saved(bases, tmp_path):
    """(path of a small delta file, folder of its base)."""
    base = bases["tied", torch.float32]
    model, tok = load(str(base))
    delta, _ = edited_by_hand(model, tok, {1: update(1)}, token(), base=str(base))
    delta.save(tmp_path / "d.safetensors")
    return tmp_path / "d.safetensors", base


def test_what_is_read_is_what_was_written(saved):
    delta = Delta.load(saved[0])
    assert torch.equal(delta.factors[1].left, update(1).left) and delta.factors[1].left.dtype == torch.float64
    assert torch.equal(delta.token.row_out, token().row_out) and delta.token.header == token().header
    assert delta.modules == {1: "model.layers.1.mlp.down_proj"} and delta.receipt["algorithm"] == "hand"


def test_any_flipped_bit_and_any_cut_is_found(saved, tmp_path):
    whole, other = saved[0].read_bytes(), tmp_path / "other"
    places = torch.randint(len(whole), (120,), generator=torch.Generator().manual_seed(0)).tolist()
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in {*range(10), *range(header - 3, header + 3), len(whole) - 1, *places, *range(100, header, 7)}:
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        other.write_bytes(changed)
        with pytest.raises(DeltaError, match="other: "):
            Delta.load(other)
    for length in {0, 4, 8, 100, header, len(whole) // 2, len(whole) - 1}:
        other.write_bytes(whole[:length])
        with pytest.raises(DeltaError, match="other: "):
            Delta.load(other)


def test_other_files_are_no_deltas(tmp_path, bases):
    for path in (tmp_path / "none", tmp_path, bases["tied", torch.float32] / "model.safetensors"):
        with pytest.raises(DeltaError):
            Delta.load(path)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(DeltaError, match="not a delta file"):
        Delta.load(tmp_path / "text")


def test_a_file_of_a_later_format_says_so(saved, monkeypatch):
    monkeypatch.setattr("editlib.export.delta.FORMAT", 2)
    with pytest.raises(DeltaError, match="format 1"):
        Delta.load(saved[0])


def test_another_base_is_refused_and_nothing_is_written(saved, bases, tmp_path):
    out = tmp_path / "out"
    for kind, dtype, words in (
        ("untied", torch.float32, "other weights"),
        ("conv1d", torch.float32, "belongs to a LlamaForCausalLM"),
        ("tied", torch.bfloat16, "in another dtype"),
    ):
        with pytest.raises(DeltaError, match=words):
            apply_delta_file(str(bases[kind, dtype]), saved[0], out)
    assert not out.exists()
    (out / "mine").mkdir(parents=True)
    with pytest.raises(OutputError, match="--overwrite"):
        apply_delta_file(str(saved[1]), saved[0], out)


def test_a_model_of_another_size_is_named(saved, tmp_path):
    delta = Delta.load(saved[0])
    wide = {1: LowRank(torch.zeros(48, 1), torch.zeros(1, 64))}
    model, tok = load(str(saved[1]))
    for other, words in (
        (dataclasses.replace(delta, factors=wide), "48 x 64"),
        (dataclasses.replace(delta, modules={9: "model.layers.9.mlp.down_proj"}, factors={9: update(1)}), "layer 9"),
        (dataclasses.replace(delta, dtype="bfloat16"), "loaded in float32"),
    ):
        with pytest.raises(DeltaError, match=words):
            apply_delta(model, tok, other)


def test_a_result_that_differs_is_taken_back(saved):
    model, tok = load(str(saved[1]))
    before = anatomy(model).weight(1).clone()
    with pytest.raises(DeltaError, match="rounds differently"):
        apply_delta(model, tok, dataclasses.replace(Delta.load(saved[0]), result_sha256="0" * 64))
    assert torch.equal(anatomy(model).weight(1), before)


def test_no_place_to_write(saved, tmp_path):
    delta = Delta.load(saved[0])
    with pytest.raises(OutputError, match="is a folder"):
        delta.save(tmp_path)
    with pytest.raises(OutputError, match="cannot write"):
        delta.save(saved[0] / "below" / "d")


def test_a_full_disk_is_told_before_the_model_is_changed(saved, bases, tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: namedtuple("Usage", "total used free")(10, 5, 1000))
    with pytest.raises(OutputError, match="0 MB are free"):
        apply_delta_file(str(saved[1]), saved[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_terms_go_with_the_folder(bases, tmp_path, tiny_llama, tok):
    base = tmp_path / "base"
    base.mkdir()
    save_model(tiny_llama, tok, base)
    (base / "NOTICE").write_text("provided under terms\n")
    (base / "GEMMA_TERMS.html").write_text("<p>terms</p>")
    (base / "notes.txt").write_text("mine")
    (base / "README.md").write_text("---\nlicense: some terms\ntags:\n- x\n---\nlicense: not this\n")
    model, tok = load(str(base))
    _, receipt = edited_by_hand(model, tok, {1: update(1)}, None)
    save_edited(model, tok, tmp_path / "one", receipt)
    model, tok = load(str(tmp_path / "one"))
    save_edited(model, tok, tmp_path / "two", receipt)
    for out in (tmp_path / "one", tmp_path / "two"):
        card = (out / "README.md").read_text()
        assert (out / "NOTICE").read_text() == "provided under terms\n" and (out / "GEMMA_TERMS.html").exists()
        assert card.split("---")[1].count("license: some terms\n") == 1 and "`GEMMA_TERMS.html`, `NOTICE`" in card
        assert not (out / "notes.txt").exists() and "not this" not in card
    assert json.loads((tmp_path / "two" / "editlib.json").read_text())["algorithm"] == "hand"


@pytest.mark.parametrize("kind", [*KINDS])
def test_an_unlearned_model_comes_again_from_its_delta(call, bases, tmp_path, kind):
    """From the command line, with the gate and the token, in another dtype than the base is stored in."""
    base, delta = bases[kind, torch.float32], tmp_path / "d.safetensors"
    (tmp_path / "requests.jsonl").write_text(json.dumps({"id": "a", "prompt": "Where is {}?", "subject": "Basel"}))
    (tmp_path / "text.txt").write_text("\n\n".join(f"The river {i} flows through Basel and Bonn." for i in range(60)))
    given = {"layers": [1, 2], "gate_layer": 3, "anchors": False, "nullspace_threshold": 0.9, "L2": 1e-3}
    given |= {"nullspace_rule": "dimensions", "v_num_grad_steps": 5}
    (tmp_path / "h.json").write_text(json.dumps(given))
    token().save(tmp_path / "token.safetensors")
    options = {"requests": "requests.jsonl", "corpus": "text.txt", "hparams": "h.json", "token": "token.safetensors"}
    args = [text for name, file in options.items() for text in (f"--{name}", tmp_path / file)]
    args += ["--stats-dir", tmp_path / "stats", "--dtype", "bfloat16", "--delta", delta]
    code, _, err = call("unlearn", base, *args, "--out", tmp_path / "edited")
    assert code == 0, err
    assert call("apply", base, delta, "--out", tmp_path / "again")[0] == 0
    same_files(tmp_path / "edited", tmp_path / "again")
    assert "[UNL]" in load(str(tmp_path / "again"))[1].get_vocab()
    assert [*Delta.load(delta).modules] == [1, 2, 3]
