"""Files of the ROME family: written and read here with plain numpy as its tools do, found by name, refused when bad."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_layer_stats import HEADER

from editlib.algorithms.unierase.apply import apply_unierase_to_model
from editlib.errors import StatsError
from editlib.hparams import UniEraseHyperParams
from editlib.models.anatomy import anatomy
from editlib.models.weights import weights_sha256
from editlib.requests.request import EditRequest
from editlib.stats import file
from editlib.stats.file import LayerStats, StatsHeader, read_stats
from editlib.stats.store import (
    StatsNotFound,
    find_layers,
    find_stats,
    model_slug,
    save_stats,
    stats_hash,
    stats_path,
    stored_layers,
)
from editlib.workbench import Workbench

MODULE = "model.layers.3.mlp.down_proj"
NULL = np.frombuffer(np.uint64(0xFFF8000000000002).tobytes(), np.float64)[0]  # how the family writes None


def moment(d_ff=64, tokens=100, seed=1):
    keys = np.random.default_rng(seed).standard_normal((tokens, d_ff)).astype(np.float32)
    return keys.T @ keys


@pytest.fixture
def stats():
    header = replace(HEADER, module=MODULE, tokens=100, documents=7)
    return LayerStats(torch.from_numpy(moment()), 100, 7, header)


def family_file(folder, mom2, count=50, name=f"{MODULE}_float32_mom2_100000.npz", **more):
    """What ROME's `tally` saves: the state of a second moment under the prefix `mom2.`, and its own arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        "mom2.constructor": np.array("util.runningstats.SecondMoment()"),
        "mom2.count": np.array(count),
        "mom2.mom2": mom2,
        "sample_size": np.array(100000),
    }
    np.savez(folder / name, **{key: value for key, value in {**arrays, **more}.items() if value is not None})
    return folder / name


# --- round trips --------------------------------------------------------------------------------------


def test_save_and_read(tmp_path, stats):
    path = save_stats(tmp_path, stats)
    assert (
        path
        == tmp_path / "org_tiny" / "wiki_stats" / f"{MODULE}_float32_mom2_7.npz"
        == stats_path(tmp_path, stats.header)
    )
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    found = read_stats(path)
    assert torch.equal(found.mom2, stats.mom2)
    assert (found.count, found.sample_size, found.header, found.path) == (100, 7, stats.header, path)
    assert found.sha256() == stats.sha256()
    one, two = found.sha256(), stats.sha256()
    assert stats_hash({3: one}) == stats_hash({3: two}) != stats_hash({4: two})
    again = find_stats(tmp_path, "org/tiny", "wiki", MODULE, 64, model_sha256="ab" * 32)
    assert torch.equal(again.mom2, stats.mom2)


def test_the_familys_reader_opens_ours(tmp_path, stats):
    """ROME's `tally`: `np.load`, `sample_size` compared, the state under `mom2.`, `moment() = mom2 / count`."""
    with np.load(save_stats(tmp_path, stats), allow_pickle=False) as found:
        state = {name.removeprefix("mom2."): found[name] for name in found.files if name.startswith("mom2.")}
        assert found["sample_size"] == 7
    assert str(state["constructor"]) == "util.runningstats.SecondMoment()"
    loaded = torch.from_numpy(state["mom2"])
    torch.testing.assert_close((loaded / int(state["count"])).double(), stats.moment(), rtol=1e-6, atol=0)
    assert loaded.dtype == torch.float32


@pytest.mark.parametrize("folder", ["org_tiny", "tiny"])
@pytest.mark.parametrize(
    "name",
    [f"{MODULE}_{kind}_mom2{end}.npz" for kind in ("float32", "float64") for end in ("_100000", "")]
    + [MODULE + "_float32_mom2_t{batch_tokens}_100000.npz", MODULE + "_float32_mom2_t2048_100000.npz"],
)
def test_a_file_of_the_family_loads_under_either_spelling(tmp_path, stats, folder, name):
    path = family_file(tmp_path / folder / "wikipedia_stats", stats.mom2.numpy(), name=name)
    for corpus in ("wikipedia", None):
        found = find_stats(tmp_path, "org/tiny", corpus, MODULE, 64, model_sha256="cd" * 32)
        assert torch.equal(found.mom2, stats.mom2)
        assert (found.count, found.sample_size, found.header, found.path) == (50, 100000, None, path)
    torch.testing.assert_close(found.moment(), stats.mom2.double() / 50)
    with pytest.raises(StatsNotFound):
        find_stats(tmp_path, "org/tiny", "wiki", MODULE, 64)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", ">f8"])
@pytest.mark.parametrize("count", [50, np.array([50]), 50.0, np.uint64(50)])
@pytest.mark.parametrize(
    ("size", "known"),
    [(100000, 100000), (None, 0), (NULL, 0), (np.array(None), 0), (np.array([7]), 7), (np.array("many"), 0)],
)
def test_arrays_as_other_tools_write_them(tmp_path, dtype, count, size, known):
    size = size if size is None else np.asarray(size)
    mom2 = moment()
    found = read_stats(family_file(tmp_path, mom2.astype(dtype), count, sample_size=size))
    assert (found.count, found.sample_size) == (50, known)
    torch.testing.assert_close(found.mom2, torch.from_numpy(mom2), check_dtype=False, rtol=1e-3, atol=0)
    assert found.mom2.dtype == (torch.float64 if dtype.endswith("8") else torch.float32)


class Trap:
    """Runs what it likes as soon as somebody unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["mom2.constructor", "sample_size", "mom2.mom2", "mom2.count"])
def test_nothing_is_ever_unpickled(tmp_path, name):
    sprung = tmp_path / "sprung"
    path = family_file(tmp_path, moment(), **{name: np.array([Trap(sprung)], dtype=object)})
    if name in ("mom2.mom2", "mom2.count"):
        with pytest.raises(StatsError, match="not a readable"):
            read_stats(path)
    else:
        assert read_stats(path).count == 50
    assert not sprung.exists()


@given(
    st.integers(1, 9),
    st.integers(1, 20),
    st.sampled_from(["f2", "f4", "f8"]),
    st.lists(st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 30.0]), min_size=9, max_size=9),
    st.integers(0, 99),
)
@example(4, 1, "f2", [0.0, 0.0, 0.001, 0.001, 0.0, 0.0, 0.0, 0.0, 0.0], 0)  # rounds off in half precision's last bits
def test_every_sum_of_keys_is_taken(tmp_path_factory, d_ff, tokens, dtype, scales, seed):
    """Dead neurons, ones that carry nearly everything, fewer tokens than neurons, half precision."""
    keys = np.random.default_rng(seed).standard_normal((tokens, d_ff)) * scales[:d_ff]
    mom2 = (keys.T @ keys).astype(dtype)
    if mom2.diagonal().any():
        path = family_file(tmp_path_factory.getbasetemp(), mom2, tokens)
        np.testing.assert_array_equal(read_stats(path).mom2.numpy(), mom2)


# --- bad files ----------------------------------------------------------------------------------------


def rewrite(path, **change):
    with np.load(path) as found:
        arrays = {**found, **change}
    with path.open("wb") as out:
        np.savez(out, **arrays)


def changed(path, at, value):
    mom2 = moment()
    mom2[at] = value
    rewrite(path, **{"mom2.mom2": mom2})


def rename(path, stats):
    stats.header = replace(stats.header, module="model.layers.4.mlp.down_proj")
    save_stats(path.parents[2], stats).rename(path)


def header(path, text):
    rewrite(path, **{"editlib.header": np.array(text)})


def mom2(path, array):
    rewrite(path, **{"mom2.mom2": array})


def flip(path, compressed):
    if compressed:
        with np.load(path) as found:
            arrays = dict(found)
        np.savez_compressed(path, **arrays)
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 40] = bytes(b ^ 0xFF for b in raw[middle : middle + 40])
    path.write_bytes(bytes(raw))


F32 = np.float32
BAD = {
    "wrong shape": (lambda path, _: mom2(path, np.eye(32, dtype=F32)), "32 x 32 .* 64 inputs"),
    "not square": (lambda path, _: mom2(path, np.ones((64, 3), F32)), "64 x 3"),
    "no matrix": (lambda path, _: mom2(path, np.ones((), F32)), r"shape \(\)"),
    "whole numbers": (lambda path, _: mom2(path, np.eye(64, dtype=int)), "int64"),
    "complex numbers": (lambda path, _: mom2(path, np.eye(64, dtype=complex)), "complex128"),
    "only zeros": (lambda path, _: mom2(path, np.zeros((64, 64), F32)), "zeros"),
    "not a number": (lambda path, _: mom2(path, np.full((64, 64), np.nan, F32)), "not finite"),
    "not a number, once": (lambda path, _: changed(path, (40, 3), np.nan), "not finite"),
    "infinite, on the diagonal": (lambda path, _: changed(path, (5, 5), np.inf), "not finite"),
    "a negative diagonal": (lambda path, _: changed(path, (5, 5), -1), "negative number on its diagonal"),
    "not symmetric": (lambda path, _: mom2(path, np.triu(moment())), "not symmetric"),
    "not symmetric, once": (lambda path, _: changed(path, (40, 3), 60), "not symmetric"),
    "larger than the diagonal": (lambda path, _: mom2(path, np.ones((64, 64), F32) + np.eye(64) * -0.5), "larger"),
    "no tokens": (lambda path, _: rewrite(path, **{"mom2.count": np.array(0)}), "'mom2.count' is 0"),
    "minus one token": (lambda path, _: rewrite(path, **{"mom2.count": np.array(-1)}), "'mom2.count' is -1"),
    "two counts": (lambda path, _: rewrite(path, **{"mom2.count": np.array([3, 4])}), "count"),
    "count is a word": (lambda path, _: rewrite(path, **{"mom2.count": np.array("many")}), "many"),
    "count is no number": (lambda path, _: rewrite(path, **{"mom2.count": np.array(np.nan)}), "nan"),
    "empty": (lambda path, _: path.write_bytes(b""), "not a readable"),
    "text": (lambda path, _: path.write_text("hello"), "not a readable"),
    "a folder": (lambda path, _: (path.unlink(), path.mkdir()), "not a readable"),
    "flipped bytes": (lambda path, _: flip(path, False), "not a readable"),
    "flipped bytes, compressed": (lambda path, _: flip(path, True), "not a readable"),
    "a bare array": (lambda path, _: np.save(path.open("wb"), np.zeros((64, 64))), "not a readable"),
    "no sum": (lambda path, _: np.savez(path, **{"mom2.count": np.array(3)}), "lacks 'mom2.mom2'"),
    "no count": (lambda path, _: np.savez(path, **{"mom2.mom2": np.eye(64)}), "lacks 'mom2.count'"),
    "header of a later version": (lambda path, s: header(path, json.dumps({**vars(s.header), "new": 1})), "header"),
    "header is no JSON": (lambda path, _: header(path, "{"), "header"),
    "renamed": (rename, r"was made for model\.layers\.4\..* renamed"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_refused_by_name(tmp_path, stats, kind):
    path = save_stats(tmp_path, stats)
    damage, words = BAD[kind]
    damage(path, stats)
    with pytest.raises(StatsError, match=words) as caught:
        find_stats(tmp_path, "org/tiny", "wiki", MODULE, 64)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, StatsNotFound)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A small file of ours, as bytes; and a place to put what becomes of it."""
    folder = tmp_path_factory.mktemp("good")
    header = replace(HEADER, module=MODULE, d_ff=8)
    path = save_stats(folder, LayerStats(torch.from_numpy(moment(8)), 100, 7, header))
    return path.read_bytes(), path


@given(st.data())
def test_a_truncated_file_is_refused_wherever_it_ends(good, data):
    raw, path = good
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
    with pytest.raises(StatsError) as caught:
        read_stats(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@given(st.data())
def test_a_flipped_byte_is_refused_or_harmless(good, data):
    raw, path = good
    at = data.draw(st.integers(0, len(raw) - 1))
    path.write_bytes(raw[:at] + bytes([raw[at] ^ data.draw(st.integers(1, 255))]) + raw[at + 1 :])
    try:
        found = read_stats(path)
    except StatsError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        np.testing.assert_array_equal(found.mom2.numpy(), moment(8))
        assert found.count == 100


def test_statistics_of_other_weights_are_refused(tmp_path, stats):
    path = save_stats(tmp_path, stats)
    with pytest.raises(
        StatsError, match=r"other weights of org/tiny \(hash abababababab, this model cdcdcdcdcdcd\)"
    ) as caught:
        find_stats(tmp_path, "org/tiny", "wiki", MODULE, 64, model_sha256="cd" * 32)
    assert str(path) in str(caught.value)


def test_statistics_of_two_dtypes_live_side_by_side(tmp_path, stats):
    """Those in bf16 once replaced those in fp32, which chains had been started with, and then neither was found."""
    first = save_stats(tmp_path, stats)
    kept = first.read_bytes()
    other = LayerStats(2 * stats.mom2, 100, 7, replace(stats.header, model_sha256="cd" * 32))
    second = save_stats(tmp_path, other)
    assert second != first and first.read_bytes() == kept
    for sha, path in (("ab" * 32, first), ("cd" * 32, second)):
        for corpus in (None, "wiki"):
            assert find_stats(tmp_path, "org/tiny", corpus, MODULE, 64, model_sha256=sha).path == path
    assert save_stats(tmp_path, other) == second
    with pytest.raises(StatsError, match="another --dtype, revision or edit"):
        find_stats(tmp_path, "org/tiny", "wiki", MODULE, 64, model_sha256="ef" * 32)


@pytest.mark.parametrize("kind", ["not symmetric", "wrong shape", "empty"])
def test_bad_statistics_are_refused_before_anything_is_edited_and_never_replaced(
    tmp_path, tiny_llama, tok_chat, kind, stats
):
    before = weights_sha256(tiny_llama)
    path = family_file(tmp_path / "tiny" / "wikipedia_stats", moment())
    BAD[kind][0](path, stats)
    content = path.read_bytes()
    tiny_llama.name_or_path = "org/tiny"
    hparams = UniEraseHyperParams(layers=[3])
    request = EditRequest(id="a", prompt="What is the capital of {}?", subject="France")
    with pytest.raises(StatsError, match=path.name):
        apply_unierase_to_model(tiny_llama, tok_chat, [request], hparams, token=None, stats_dir=tmp_path)
    bench = Workbench.of(tiny_llama, tok_chat, tmp_path, progress=False)
    with pytest.raises(StatsError, match=path.name):
        bench.find_or_make_stats([1, 3], corpus="none.txt", tokens=100)
    assert weights_sha256(tiny_llama) == before
    assert path.read_bytes() == content
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


# --- which file is meant ------------------------------------------------------------------------------


def test_the_file_with_most_tokens_wins(tmp_path, stats):
    for folder, count in (("tiny", 50), ("org_tiny", 40)):
        family_file(tmp_path / folder / "wikipedia_stats", stats.mom2.numpy(), count)
    family_file(tmp_path / "tiny" / "wikipedia_stats", stats.mom2.numpy(), 70, f"{MODULE}_float32_mom2_9.npz")
    name = "model.layers.13.mlp.down_proj_float32_mom2.npz"
    family_file(tmp_path / "tiny" / "wikipedia_stats", stats.mom2.numpy(), 99, name)
    assert find_stats(tmp_path, "org/tiny", "wikipedia", MODULE, 64).count == 70


def test_the_files_asked_for_come_first(tmp_path):
    place = tmp_path / "tiny"
    for corpus, number, count in (("wikipedia", 100, 10), ("wikipedia", 200, 30), ("wikipedia", 50, 20)):
        family_file(place / f"{corpus}_stats", moment(), count, f"{MODULE}_float32_mom2_{number}.npz")
    family_file(place / "pile_stats", moment(), 99, f"{MODULE}_float32_mom2_100.npz")

    def count(**wanted):
        return find_stats(tmp_path, "org/tiny", None, MODULE, 64, **wanted).count

    assert count() == 99
    assert count(dataset="wikipedia") == 30
    assert count(dataset="wikipedia", samples=100) == 10
    assert count(dataset="wikipedia", samples=7) == 30  # no such number: the most tokens
    assert count(dataset="books") == 99  # nor such a corpus
    assert count(dataset="books", samples=50) == 20
    assert find_stats(tmp_path, "org/tiny", "wikipedia", MODULE, 64, samples=50).count == 20


def test_both_spellings_with_different_content(tmp_path, caplog):
    """Which one was taken is said."""
    ours = family_file(tmp_path / "org_tiny" / "wikipedia_stats", moment(), 40)
    theirs = family_file(tmp_path / "tiny" / "wikipedia_stats", moment(seed=2), 50)
    with caplog.at_level(logging.INFO, logger="editlib"):
        assert find_stats(tmp_path, "org/tiny", None, MODULE, 64).path == theirs
    assert f"taking {theirs}; there are also {ours}" in caplog.text
    family_file(tmp_path / "tiny" / "wikipedia_stats", moment(seed=2), 40)
    assert find_stats(tmp_path, "org/tiny", None, MODULE, 64).path == ours


def test_a_damaged_rival_is_not_passed_over(tmp_path):
    """Whether it had more tokens cannot be known."""
    family_file(tmp_path / "tiny" / "wikipedia_stats", moment())
    bad = family_file(tmp_path / "org_tiny" / "wikipedia_stats", moment())
    bad.write_bytes(bad.read_bytes()[:500])
    with pytest.raises(StatsError, match=str(bad)):
        find_stats(tmp_path, "org/tiny", None, MODULE, 64)


def test_a_local_folder_goes_by_its_name(tmp_path, stats, monkeypatch):
    model = tmp_path / "models" / "tiny"
    model.mkdir(parents=True)
    family_file(tmp_path / "stats" / "tiny" / "wikipedia_stats", stats.mom2.numpy())
    assert find_stats(tmp_path / "stats", str(model), "wikipedia", MODULE, 64).count == 50
    assert find_stats(tmp_path / "stats", f"{model}/", "wikipedia", MODULE, 64).count == 50
    monkeypatch.chdir(model)
    assert model_slug(".") == "tiny"
    assert model_slug("../tiny") == "tiny"
    assert find_stats(tmp_path / "stats", ".", "wikipedia", MODULE, 64).count == 50


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("org/tiny/", "org_tiny"),
        ("org/tiny/", "tiny"),
        ("models/local/tiny", "models_local_tiny"),
        ("/models/tiny", "_models_tiny"),
        ("odd[1]*/tiny", "odd[1]*_tiny"),
    ],
)
def test_spellings_of_ids_and_paths(tmp_path, model, folder):
    path = family_file(tmp_path / folder / "wikipedia_stats", moment())
    assert find_stats(tmp_path, model, None, MODULE, 64).path == path


def test_none_found_says_where_it_looked(tmp_path):
    with pytest.raises(
        StatsNotFound, match=rf"{tmp_path}/org_tiny/wiki_stats/.* or {tmp_path}/tiny/.*editlib stats org/tiny"
    ):
        find_stats(tmp_path, "org/tiny", "wiki", MODULE, 64)


def test_all_that_is_stored(tmp_path):
    place = tmp_path / "tiny" / "wikipedia_stats"
    for layer, number, count in ((1, 9, 20), (1, 8, 30), (12, 9, 40)):
        name = f"transformer.h.{layer}.mlp.c_proj_float32_mom2_{number}.npz"
        family_file(place, moment(), count, name)
    family_file(tmp_path / "tiny" / "pile_stats", moment(), 99, "transformer.h.2.mlp.c_proj_float32_mom2_9.npz")
    (place / ".x_float32_mom2_9.npz.123.tmp").write_text("half a file")
    found = stored_layers(tmp_path, "org/tiny")
    assert {layer: stats.count for layer, stats in found.items()} == {1: 30, 12: 40, 2: 99}
    assert set(stored_layers(tmp_path, "org/tiny", "wikipedia")) == {1, 12}
    with pytest.raises(StatsNotFound):
        stored_layers(tmp_path, "org/tiny", "books")


def test_only_missing_layers_are_made(tmp_path, tiny_llama, tok):
    """A published file for one layer is used as it is; the others are computed beside it."""
    text = tmp_path / "c.txt"
    text.write_text("The river Rhine flows through Basel, Bonn and Rotterdam. " * 20)
    path = family_file(tmp_path / "tiny" / "wikipedia_stats", moment(), 1234)
    bench = Workbench.of(tiny_llama, tok, tmp_path, name="org/tiny", progress=False)
    found = bench.find_or_make_stats([2, 3], corpus=str(text), tokens=100, dataset="wikipedia", samples=100000)
    assert list(found) == [2, 3]
    assert (found[3].path, found[3].count) == (path, 1234)
    assert found[2].count == 100 and found[2].header.model_sha256 == bench.sha256
    assert [file.name for file in (tmp_path / "org_tiny" / "c_stats").iterdir()] == [found[2].path.name]
    again = find_layers(tmp_path, "org/tiny", anatomy(tiny_llama), [2, 3], model_sha256=bench.sha256)
    assert [one.sha256() for one in again.values()] == [one.sha256() for one in found.values()]
    assert isinstance(found[2].header, StatsHeader)


@pytest.mark.parametrize("at", [(590, 520), (590, 3), (3, 590)])
def test_wide_matrices_are_looked_at_to_the_last_corner(tmp_path, at):
    """They are read in blocks of 512 rows."""
    mom2 = moment(600)
    assert read_stats(family_file(tmp_path, mom2)).mom2.shape == (600, 600)
    mom2[at] += 60
    with pytest.raises(StatsError, match="not symmetric"):
        read_stats(family_file(tmp_path, mom2))


@pytest.mark.parametrize(("dtype", "order"), [("f4", "C"), ("f8", "C"), ("f4", "F"), ("f2", "C")])
def test_a_large_matrix_is_mapped_from_its_file(tmp_path, monkeypatch, dtype, order):
    mom2 = np.asarray(moment(24), dtype=dtype, order=order)
    path = family_file(tmp_path, mom2)
    read = read_stats(path)
    monkeypatch.setattr(file, "LARGE", mom2.nbytes)
    mapped = read_stats(path)
    assert torch.equal(mapped.mom2, read.mom2) and torch.equal(mapped.moment(), read.moment())
    assert mapped.sha256() == read.sha256()
    assert isinstance(file._mapped(path), np.memmap)
    np.savez_compressed(path, **dict(np.load(path)))
    assert file._mapped(path) is None and torch.equal(read_stats(path).mom2, read.mom2)


def test_a_mapped_file_is_checked_as_one_that_is_read(good, monkeypatch):
    """At every seventh byte: it ends there, or another is in its place."""
    raw, path = good
    path.write_bytes(raw)
    whole = read_stats(path).mom2.clone()
    monkeypatch.setattr(file, "LARGE", 0)
    for at in range(0, len(raw), 7):
        path.write_bytes(raw[:at])
        with pytest.raises(StatsError):
            read_stats(path)
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 64]) + raw[at + 1 :])
        try:
            assert torch.equal(read_stats(path).mom2, whole)
        except StatsError as error:
            assert str(path) in str(error) and "\n" not in str(error)
