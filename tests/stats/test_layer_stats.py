"""Second moments against plain hooks on unpadded windows; what a window and a batch may hold."""

import itertools

import pytest
import torch
from tiny_models import SENTENCES

from editlib.errors import StatsError
from editlib.models.anatomy import anatomy
from editlib.stats.file import StatsHeader
from editlib.stats.layer_stats import batches, document_windows, layer_stats
from editlib.workbench import Workbench

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
    for number, ids in document_windows(tok, DOCUMENTS, 32):
        if begun < limit:
            begun, last = begun + len(ids) - 1, number
    assert found.sample_size == last + 1


def test_windows_cover_the_documents(tok_bos):
    windows = list(document_windows(tok_bos, DOCUMENTS, 16))
    for number, text in enumerate(DOCUMENTS):
        ids = tok_bos(text, add_special_tokens=False)["input_ids"]
        joined = [i for n, window in windows if n == number for i in window[1:]]
        assert joined == ids
    assert all(window[0] == tok_bos.bos_token_id and 2 <= len(window) <= 16 for _, window in windows)


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


# --- windows and batches ------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [256, 131072])
def test_a_batch_holds_no_more_than_it_may_whatever_the_model_could_read(tiny_llama, tok, positions):
    """Windows as long as the model's maximum, or as many of them as documents, ran others out of memory."""
    tiny_llama.config.max_position_embeddings = positions
    seen = []
    hook = tiny_llama.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    text = " ".join(SENTENCES * 40)
    layer_stats(
        anatomy(tiny_llama),
        tok,
        [1],
        [text, "a short one.", *SENTENCES] * 3,
        tokens=ALL,
        header=HEADER,
        max_length=128,
        batch_tokens=600,
        progress=False,
    )
    hook.remove()
    seen = seen[1:]  # the first one is how `anatomy` finds out what a layer returns
    assert max(rows * width for rows, width in seen) <= 600
    assert max(width for _, width in seen) == 128
    assert (600 // 128, 128) in seen  # and no fewer than fit


def test_batches_keep_the_order_and_lose_nothing():
    windows = [(i, [0] * length) for i, length in enumerate([5, 3, 9, 2, 2, 2, 30, 1])]
    found = list(batches(windows, 20))
    assert [window for group in found for window in group] == windows
    assert [len(group) for group in found] == [2, 2, 2, 1, 1]


def test_a_stream_without_end_is_read_no_further_than_needed(tiny_llama, tok):
    drawn = []
    endless = (drawn.append(1) or text for text in itertools.cycle(SENTENCES))
    found = run(anatomy(tiny_llama), tok, documents=endless, tokens=500)
    assert found[1].count == 500
    assert len(drawn) < 100


def test_windows_end_where_the_model_does(tiny_gpt2, tok, tmp_path):
    """GPT-2 has a row for each of 256 positions and no more; a window of 512 would end in an index error."""
    corpus = tmp_path / "long.txt"
    corpus.write_text(" ".join(SENTENCES * 20))
    bench = Workbench.of(tiny_gpt2, tok, tmp_path, name="tiny", progress=False)
    made = bench.make_stats([1], corpus=str(corpus), tokens=600)
    assert made[1].count == 600
    assert made[1].header.max_length == 256


def test_a_corpus_that_is_too_short_is_said(tiny_llama, tok, caplog):
    found = run(anatomy(tiny_llama), tok)
    assert f"has only {found[1].count} of the {ALL} requested tokens" in caplog.text
