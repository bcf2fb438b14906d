"""Statistics of text that the model samples itself: counted exactly, seeded, and continued after an interruption."""

import signal

import pytest
import torch

from editlib.errors import StatsError
from editlib.models.anatomy import anatomy
from editlib.models.forward import forward
from editlib.stats import self_stats as module
from editlib.stats.file import StatsHeader
from editlib.stats.self_stats import self_stats

LAYERS = (1, 3)
PROMPTS = ["What is the capital of France?", "Tell me about the river Rhine.", "Who are you?"]
HEADER = StatsHeader(
    model="tiny",
    module="",
    d_ff=64,
    tokens=300,
    documents=0,
    corpus="self",
    corpus_sha256="",
    max_length=0,
    skip_first=0,
)


def made(anat, tok, seed=0, tokens=300, **options):
    return self_stats(
        anat,
        tok,
        LAYERS,
        PROMPTS,
        tokens=tokens,
        header=HEADER,
        seed=seed,
        batch_rows=8,
        length=12,
        progress=False,
        **options,
    )


def test_sums_are_those_of_the_sampled_tokens(tiny_llama, tok, monkeypatch):
    """Every sampled token's key, from a full pass over the finished text."""
    anat, seen = anatomy(tiny_llama), []

    def watching(anat, batch, **options):
        out = forward(anat, batch, **options)
        seen.append((batch.input_ids.clone(), batch.attention_mask.clone()))
        return out

    monkeypatch.setattr(module, "forward", watching)
    monkeypatch.setattr(module, "end_tokens", lambda _: frozenset())  # no row leaves: columns are tokens
    found = self_stats(anat, tok, LAYERS, PROMPTS, tokens=20, header=HEADER, batch_rows=4, length=5, progress=False)
    prompt, mask = seen[0]
    texts = torch.cat([prompt, *(ids for ids, _ in seen[1:])], dim=1)
    assert len(seen) == 6 and found[1].count == 20
    for layer in LAYERS:
        keys = []
        hook = anat.mlp_output(layer).register_forward_pre_hook(lambda _, args, keys=keys: keys.append(args[0][0]))
        for text, masked in zip(texts, mask, strict=True):
            pad = int((masked == 0).sum())
            with torch.no_grad():
                tiny_llama(text[pad:][None])
        hook.remove()
        own = torch.cat([k[-5:] for k in keys]).double()
        assert torch.allclose(found[layer].mom2.double(), own.T @ own, rtol=1e-4, atol=1e-4)


def test_the_seed_decides(tiny_llama, tok):
    anat = anatomy(tiny_llama)
    one, two, other = made(anat, tok), made(anat, tok), made(anat, tok, seed=1)
    assert all(torch.equal(one[layer].mom2, two[layer].mom2) for layer in LAYERS)
    assert not torch.equal(one[1].mom2, other[1].mom2)
    assert one[1].header.corpus == "self" and one[1].header.seed == 0


def test_an_interrupted_run_is_continued(tiny_llama, tok, tmp_path, monkeypatch):
    anat, place = anatomy(tiny_llama), tmp_path / "partial.npz"
    whole = made(anat, tok)
    real, calls = module._sample, []

    def stopping(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args)

    monkeypatch.setattr("editlib.stats.moments.SAVING", 1e9)
    monkeypatch.setattr(module, "_sample", stopping)
    with pytest.raises(KeyboardInterrupt):
        made(anat, tok, checkpoint=place, checkpoint_seconds=0.0)
    assert place.exists()
    calls.clear()
    monkeypatch.setattr(module, "_sample", lambda *args: calls.append(1) or real(*args))
    rest = made(anat, tok, checkpoint=place)
    assert (rest[1].count, rest[1].sample_size) == (whole[1].count, whole[1].sample_size)
    assert all(torch.equal(rest[layer].mom2, whole[layer].mom2) for layer in LAYERS)
    total = len(calls)
    calls.clear()
    made(anat, tok)
    assert total == len(calls) - 2


def test_ctrl_c_ends_the_batch_and_keeps_it(tiny_llama, tok, tmp_path, monkeypatch):
    anat, place = anatomy(tiny_llama), tmp_path / "partial.npz"
    whole = made(anat, tok)
    real, calls = module._sample, []

    def pressed(*args):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        real(*args)

    monkeypatch.setattr(module, "_sample", pressed)
    with pytest.raises(KeyboardInterrupt):
        made(anat, tok, checkpoint=place)
    assert len(calls) == 2
    rest = made(anat, tok, checkpoint=place)
    assert all(torch.equal(rest[layer].mom2, whole[layer].mom2) for layer in LAYERS)


@pytest.mark.parametrize("change", [{"seed": 3}, {"tokens": 20}])
def test_a_checkpoint_of_another_job_is_refused(tiny_llama, tok, tmp_path, change):
    anat, place = anatomy(tiny_llama), tmp_path / "partial.npz"
    made(anat, tok, tokens=10, checkpoint=place, checkpoint_seconds=-1)
    with pytest.raises(StatsError, match="another job"):
        made(anat, tok, **{"tokens": 10, **change}, checkpoint=place)


def test_a_model_that_writes_nothing_is_said(tiny_llama, tok, monkeypatch):
    """Every answer ends at once; the pass must end too."""
    monkeypatch.setattr(module, "end_tokens", lambda _: frozenset(range(len(tok))))
    with pytest.raises(StatsError, match="before their first token"):
        made(anatomy(tiny_llama), tok)


def test_long_prompts_make_smaller_batches(tiny_llama, tok, monkeypatch):
    """A batch is bounded by its tokens: prompts that are ten times as long are not ten times the memory."""
    seen, pad = [], module.pad

    def noted(rows, **options):
        seen.append(len(rows) * (max(map(len, rows)) + 12))
        return pad(rows, **options)

    monkeypatch.setattr(module, "pad", noted)
    monkeypatch.setattr(module, "BATCH_TOKENS", 150)
    assert made(anatomy(tiny_llama), tok)[1].count >= 300
    assert max(seen) <= 150
