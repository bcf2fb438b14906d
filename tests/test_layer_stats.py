"""Second moments against plain hooks on unpadded windows; checkpoints; the store of the ROME family."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import SENTENCES

from editlib import layer_stats as module
from editlib.errors import StatsError
from editlib.layer_stats import layer_stats, token_windows
from editlib.models.anatomy import anatomy
from editlib.stats_store import (
    LayerStats,
    StatsHeader,
    find_stats,
    read_stats,
    save_stats,
    spelling,
    stats_hash,
    stats_path,
)

DOCUMENTS = [
    " ".join(itertools.islice(itertools.cycle(SENTENCES[i % 4 :] + SENTENCES), 1 + i % 3)) for i in range(12)
] + ["a", "", "東京 is a city."]
HEADER = StatsHeader(
    model="org/tiny",
    module="",
    d_ff=64,
    tokens=0,
    documents=0,
    corpus="wiki",
    corpus_sha256="c0",
    max_length=32,
    skip_first=1,
    model_sha256="ab" * 32,
)
ALL = 10**6


@torch.no_grad()
def dense(anat, tok, layer, *, max_length=32, skip_first=1, limit=ALL):
    """`sum k k^T` in fp64 and the number of keys: every window by itself, full forward passes."""
    keys = []
    hook = anat.mlp_output(layer).register_forward_hook(lambda _, args, __: keys.append(args[0][0].double()))
    for text in DOCUMENTS:
        ids = tok(text)["input_ids"]
        for window in (ids[i : i + max_length] for i in range(0, len(ids), max_length)):
            if len(window) > 1:
                anat.model(torch.tensor([window]), use_cache=False)
                keys[-1] = keys[-1][skip_first:]
    hook.remove()
    flat = torch.cat(keys)[:limit]
    return flat.T @ flat, len(flat)


def run(anat, tok, layers=(1, 3), documents=DOCUMENTS, **options):
    return layer_stats(
        anat,
        tok,
        list(layers),
        documents,
        **{"tokens": ALL, "header": HEADER, "max_length": 32, "progress": False, **options},
    )


def close(got, wanted):
    scale = float(wanted.abs().max())
    assert float((got.double() - wanted).abs().max()) < 1e-5 * scale


@pytest.mark.parametrize("batch_tokens", [1, 70, 4096])
@pytest.mark.parametrize("skip_first", [0, 1, 3])
def test_sums_of_every_real_token_once(anat, tok, batch_tokens, skip_first):
    found = run(anat, tok, batch_tokens=batch_tokens, skip_first=skip_first)
    assert list(found) == [1, 3]
    for layer, stats in found.items():
        wanted, count = dense(anat, tok, layer, skip_first=skip_first)
        assert stats.count == count
        close(stats.mom2, wanted)
        torch.testing.assert_close(stats.moment(), stats.mom2.double() / count)
        assert stats.header.module == anat.mlp_output_names[layer]
        assert (stats.header.tokens, stats.sample_size) == (count, len(DOCUMENTS))


@pytest.mark.parametrize("limit", [1, 37, 200])
def test_exactly_as_many_tokens_as_asked(tiny_llama, tok, limit):
    anat = anatomy(tiny_llama)
    found = run(anat, tok, tokens=limit, batch_tokens=100)[3]
    wanted, count = dense(anat, tok, 3, limit=limit)
    assert found.count == count == limit
    close(found.mom2, wanted)
    begun = 0
    for number, ids in token_windows(tok, DOCUMENTS, 32):
        if begun < limit:
            begun, last = begun + len(ids) - 1, number
    assert found.sample_size == last + 1


def test_windows_cover_the_documents(tok_bos):
    windows = list(token_windows(tok_bos, DOCUMENTS, 16))
    for number, text in enumerate(DOCUMENTS):
        ids = tok_bos(text)["input_ids"]
        joined = [i for n, window in windows if n == number for i in window]
        assert joined == (ids if len(ids) % 16 != 1 else ids[:-1])
    assert all(2 <= len(window) <= 16 for _, window in windows)


def test_nothing_to_count(tiny_llama, tok):
    with pytest.raises(StatsError, match="corpus wiki gave no token"):
        run(anatomy(tiny_llama), tok, documents=["", "a"])


def test_the_pass_stops_behind_the_last_layer(tiny_llama, tok):
    anat, calls = anatomy(tiny_llama), []
    hook = anat.layers[4].register_forward_hook(lambda *_: calls.append(1))
    run(anat, tok)
    hook.remove()
    assert not calls


def test_training_mode_does_not_matter(tiny_gpt2, tok):
    wanted = run(anatomy(tiny_gpt2), tok)[3].mom2
    assert torch.equal(run(anatomy(tiny_gpt2.train()), tok)[3].mom2, wanted)
    assert tiny_gpt2.training


# --- checkpoints ------------------------------------------------------------------------------------


class Cut(Exception):
    pass


def interrupted(anat, tok, path, monkeypatch, after, **options):
    """A run that dies after some batches, with a checkpoint after each."""
    record, done = module.record_moments, []

    def dies(*args):
        if len(done) == after:
            raise Cut
        done.append(1)
        return record(*args)

    monkeypatch.setattr(module, "record_moments", dies)
    with pytest.raises(Cut):
        run(anat, tok, checkpoint=path, checkpoint_seconds=-1, batch_tokens=100, **options)
    monkeypatch.setattr(module, "record_moments", record)
    assert path.exists()


@pytest.mark.parametrize("limits", itertools.product([1, 3], [ALL, 330]))
def test_a_continued_run_equals_one_in_a_piece(tiny_llama, tok, tmp_path, monkeypatch, limits):
    after, limit = limits
    anat, path = anatomy(tiny_llama), tmp_path / "stats.part"
    whole = run(anat, tok, batch_tokens=100, tokens=limit)
    interrupted(anat, tok, path, monkeypatch, after, tokens=limit)
    windows = []
    pad = module.pad
    monkeypatch.setattr(module, "pad", lambda rows, **kwargs: windows.extend(rows) or pad(rows, **kwargs))
    again = run(anat, tok, batch_tokens=100, checkpoint=path, tokens=limit)
    assert len(windows) < len(list(token_windows(tok, DOCUMENTS, 32)))  # the first ones were not run again
    for layer, stats in whole.items():
        assert (again[layer].count, again[layer].sample_size) == (stats.count, stats.sample_size)
        assert again[layer].header == stats.header
        assert float((again[layer].mom2 - stats.mom2).abs().max() / stats.mom2.abs().max()) < 1e-6
    assert list(tmp_path.iterdir()) == []


def damage_sums(path):
    """Flips bytes inside the last array; the arrays before it stay readable."""
    raw = bytearray(path.read_bytes())
    at = raw.rfind(b"sum.3.npy", 0, raw.find(b"PK\x01\x02"))
    raw[at + 600 : at + 608] = b"\xff" * 8
    path.write_bytes(bytes(raw))


def rewrite(path, **change):
    with np.load(path) as found:
        arrays = {**found, **change}
    with path.open("wb") as out:
        np.savez(out, **arrays)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a zip"),
    "bytes in the last array": damage_sums,
    "other shape": lambda path: rewrite(path, **{"sum.3": np.zeros((3, 3))}),
    "state is a list": lambda path: rewrite(path, state=np.array("[1]")),
    "state lacks a field": lambda path: rewrite(path, state=np.array(json.dumps(without_tokens(path)))),
    "a bare array": lambda path: np.save(path.open("wb"), np.zeros(3)),
}


def without_tokens(path):
    with np.load(path) as found:
        state = json.loads(str(found["state"]))
    return {key: value for key, value in state.items() if key != "tokens"}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_costs_time_never_correctness(tiny_llama, tok, tmp_path, monkeypatch, kind):
    anat, path = anatomy(tiny_llama), tmp_path / "stats.part"
    interrupted(anat, tok, path, monkeypatch, 3)
    DAMAGE[kind](path)
    again = run(anat, tok, batch_tokens=100, checkpoint=path)
    for layer in (1, 3):
        wanted, count = dense(anat, tok, layer)
        assert again[layer].count == count
        close(again[layer].mom2, wanted)


@pytest.mark.parametrize(
    "change", [{"layers": (1, 2)}, {"header": StatsHeader(**{**vars(HEADER), "corpus_sha256": "c1"})}]
)
def test_a_checkpoint_of_another_job_is_refused(tiny_llama, tok, tmp_path, monkeypatch, change):
    anat, path = anatomy(tiny_llama), tmp_path / "stats.part"
    interrupted(anat, tok, path, monkeypatch, 1)
    content = path.read_bytes()
    with pytest.raises(StatsError, match=r"stats\.part is the checkpoint of another job"):
        run(anat, tok, checkpoint=path, **change)
    assert path.read_bytes() == content


# --- the store --------------------------------------------------------------------------------------

MODULE = "model.layers.3.mlp.down_proj"


@pytest.fixture
def stats():
    keys = torch.randn(100, 64, generator=torch.Generator().manual_seed(1))
    header = StatsHeader(**{**vars(HEADER), "module": MODULE, "tokens": 100, "documents": 7})
    return LayerStats(keys.T @ keys, 100, 7, header)


def family_file(folder, mom2, count=50, name=f"{MODULE}_float32_mom2_100000.npz", **more):
    """What ROME's `tally` saves through `runningstats.SecondMoment.state_dict`."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = {"dtype": object} if more.pop("pickled", False) else {}
    arrays = {
        "mom2.constructor": np.array("util.runningstats.SecondMoment()", **kind),
        "mom2.count": np.array(count),
        "mom2.mom2": mom2,
        "sample_size": np.array(100000),
    }
    np.savez(folder / name, **{**arrays, **more})
    return folder / name


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
    assert stats_hash({3: found}) == stats_hash({3: stats}) != stats_hash({4: stats})
    again = find_stats(tmp_path, "org/tiny", "wiki", MODULE, 64, model_sha256="ab" * 32)
    assert torch.equal(again.mom2, stats.mom2)


def test_the_familys_reader_opens_ours(tmp_path, stats):
    """ROME's `tally`: `np.load`, the state dict under the prefix `mom2.`, `moment() = mom2 / count`."""
    with np.load(save_stats(tmp_path, stats), allow_pickle=False) as found:
        state = {name.removeprefix("mom2."): found[name] for name in found.files if name.startswith("mom2.")}
        assert int(found["sample_size"]) == 7
    assert str(state["constructor"]) == "util.runningstats.SecondMoment()"
    np.testing.assert_allclose(state["mom2"] / int(state["count"]), stats.moment().numpy(), rtol=1e-6)
    assert state["mom2"].dtype == np.float32


@pytest.mark.parametrize("folder", ["org_tiny", "tiny"])
@pytest.mark.parametrize("pickled", [False, True])
def test_a_file_of_the_family_loads_under_either_spelling(tmp_path, stats, folder, pickled):
    path = family_file(tmp_path / folder / "wikipedia_stats", stats.mom2.numpy(), pickled=pickled)
    for corpus in ("wikipedia", None):
        found = find_stats(tmp_path, "org/tiny", corpus, MODULE, 64, model_sha256="cd" * 32)
        assert torch.equal(found.mom2, stats.mom2)
        assert (found.count, found.sample_size, found.header, found.path) == (50, 100000, None, path)
    torch.testing.assert_close(found.moment(), stats.mom2.double() / 50)


def test_the_file_with_most_tokens_wins(tmp_path, stats):
    for folder, count in (("tiny", 50), ("org_tiny", 40)):
        family_file(tmp_path / folder / "wikipedia_stats", stats.mom2.numpy(), count)
    family_file(tmp_path / "tiny" / "wikipedia_stats", stats.mom2.numpy(), 70, f"{MODULE}_float32_mom2_9.npz")
    family_file(
        tmp_path / "tiny" / "wikipedia_stats",
        stats.mom2.numpy(),
        99,
        "model.layers.13.mlp.down_proj_float32_mom2.npz",
    )
    assert find_stats(tmp_path, "org/tiny", "wikipedia", MODULE, 64).count == 70


def test_a_local_folder_goes_by_its_name(tmp_path, stats, monkeypatch):
    model = tmp_path / "models" / "tiny"
    model.mkdir(parents=True)
    family_file(tmp_path / "stats" / "tiny" / "wikipedia_stats", stats.mom2.numpy())
    assert find_stats(tmp_path / "stats", str(model), "wikipedia", MODULE, 64).count == 50
    assert find_stats(tmp_path / "stats", f"{model}/", "wikipedia", MODULE, 64).count == 50
    monkeypatch.chdir(model)
    assert spelling(".") == "tiny"
    assert spelling("../tiny") == "tiny"


def test_none_found_says_where_it_looked(tmp_path):
    with pytest.raises(
        StatsError, match=rf"{tmp_path}/org_tiny/wiki_stats/.* or {tmp_path}/tiny/.*editlib stats org/tiny"
    ):
        find_stats(tmp_path, "org/tiny", "wiki", MODULE, 64)


def rename(path, stats):
    stats.header = StatsHeader(**{**vars(stats.header), "module": "model.layers.4.mlp.down_proj"})
    save_stats(path.parents[2], stats).rename(path)


def header(path, text):
    rewrite(path, **{"editlib.header": np.array(text)})


def no_sum(path):
    np.savez(path, **{"mom2.count": np.array(3)})


def flip(path, compressed):
    if compressed:
        with np.load(path) as found:
            arrays = dict(found)
        np.savez_compressed(path, **arrays)
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 40] = bytes(b ^ 0xFF for b in raw[middle : middle + 40])
    path.write_bytes(bytes(raw))


BAD = {
    "wrong shape": (
        lambda path, _: rewrite(path, **{"mom2.mom2": np.zeros((32, 32), np.float32)}),
        "32 x 32 .* 64 inputs",
    ),
    "not square": (lambda path, _: rewrite(path, **{"mom2.mom2": np.zeros((64, 3), np.float32)}), "64 x 3"),
    "no matrix": (lambda path, _: rewrite(path, **{"mom2.mom2": np.zeros(())}), ""),
    "truncated": (lambda path, _: path.write_bytes(path.read_bytes()[:-50]), "not a readable"),
    "empty": (lambda path, _: path.write_bytes(b""), "not a readable"),
    "text": (lambda path, _: path.write_text("hello"), "not a readable"),
    "flipped bytes": (lambda path, _: flip(path, False), "not a readable"),
    "flipped bytes, compressed": (lambda path, _: flip(path, True), "not a readable"),
    "a bare array": (lambda path, _: np.save(path.open("wb"), np.zeros((64, 64))), ""),
    "no sum": (lambda path, _: no_sum(path), "lacks 'mom2.mom2'"),
    "no tokens": (lambda path, _: rewrite(path, **{"mom2.count": np.array(0)}), ""),
    "not finite": (lambda path, _: rewrite(path, **{"mom2.mom2": np.full((64, 64), np.nan, np.float32)}), ""),
    "header of a later version": (lambda path, s: header(path, json.dumps({**vars(s.header), "new": 1})), ""),
    "header is no JSON": (lambda path, _: header(path, "{"), ""),
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


def test_statistics_of_other_weights_are_refused(tmp_path, stats):
    path = save_stats(tmp_path, stats)
    with pytest.raises(
        StatsError, match=r"other weights of org/tiny \(hash abababababab, this model cdcdcdcdcdcd\)"
    ) as caught:
        find_stats(tmp_path, "org/tiny", "wiki", MODULE, 64, model_sha256="cd" * 32)
    assert str(path) in str(caught.value)
