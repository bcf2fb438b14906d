"""A converted Gemma 3 computes what its GGUF file says; the real one is looked at when it is at hand."""

import math

import pytest
import torch
from tiny_packages import write_gemma
from torch.nn.functional import gelu
from transformers import AutoModelForCausalLM, AutoTokenizer

from editlib.models.anatomy import anatomy
from editlib.models.loading import load
from editlib.models.packaged.fetch import packaged_path
from editlib.models.packaged.from_gguf import convert_gguf


def rms_norm(x, weight, eps=1e-5):
    """GGUF files hold Gemma's norm weights with their 1 added."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x, base):
    """Rotary positions, halves rotated against each other. x: [heads, T, d_head]."""
    length, width = x.shape[-2:]
    angles = torch.arange(length)[:, None] * base ** (-torch.arange(0, width, 2) / width)
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def gemma_logits(weights, ids, window, layers):
    """Gemma 3, written down from its report (arXiv 2503.19786) over the tensors of a GGUF file, in float64."""
    w = {name: torch.from_numpy(array).double() for name, array in weights.items()}
    length, d_model = len(ids), w["output_norm"].shape[0]
    x = w["token_embd"][ids] * math.sqrt(d_model)
    ahead = torch.arange(length)[:, None] - torch.arange(length)[None]  # [T, T], of the query over the key
    for layer in range(layers):
        block = {name.split(".")[2]: one for name, one in w.items() if name.startswith(f"blk.{layer}.")}
        full = layer % 6 == 5
        h = rms_norm(x, block["attn_norm"])
        d_head = block["attn_q_norm"].shape[0]
        q, k, v = ((h @ block[f"attn_{n}"].T).view(length, -1, d_head).transpose(0, 1) for n in "qkv")
        q, k = (rotate(rms_norm(a, block[f"attn_{n}_norm"]), 1e6 if full else 1e4) for n, a in (("q", q), ("k", k)))
        seen = (ahead >= 0) if full else (ahead >= 0) & (ahead < window)
        # 256 in all but the largest Gemma 3, whatever the head's width: the file is silent about it
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(256)
        mixed = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v
        mixed = mixed.transpose(0, 1).reshape(length, -1) @ block["attn_output"].T
        x = x + rms_norm(mixed, block["post_attention_norm"])
        h = rms_norm(x, block["ffn_norm"])
        h = gelu(h @ block["ffn_gate"].T, approximate="tanh") * (h @ block["ffn_up"].T)
        x = x + rms_norm(h @ block["ffn_down"].T, block["post_ffw_norm"])
    return rms_norm(x, w["output_norm"]) @ w["token_embd"].T


def test_gemma_computes_what_its_file_says(tmp_path):
    (tmp_path / "model").mkdir()
    weights = write_gemma(tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    tok = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tok("ab ab\nb").input_ids == [2, 263, 264, 265, 262]  # <bos> ab ▁ab \n b
    assert tok("é").input_ids == [2, 4 + 0xC3, 4 + 0xA9]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").double()
    ids = tok("ab ba\nab ab bb a").input_ids
    assert len(ids) > 2 * model.config.sliding_window
    with torch.no_grad():
        got = model(torch.tensor([ids])).logits[0]
    expected = gemma_logits(weights, ids, window=4, layers=6)
    assert torch.allclose(got, expected, atol=1e-4 * expected.abs().max().item())


@pytest.mark.real
def test_the_real_gemma():
    if packaged_path("gemma3-270m") is None:
        pytest.skip("gemma3-270m is not in the cache; its terms are for a person to accept")
    model, tok = load("gemma3-270m")
    found = anatomy(model)
    assert (found.n_layers, found.d_model, found.d_ff, found.tied) == (18, 640, 2048, True)
    assert found.mlp_output_names[17] == "model.layers.17.mlp.down_proj"
    prompt = tok("Romeo and Juliet was written by William", return_tensors="pt")
    assert prompt.input_ids[0, 0] == tok.bos_token_id and tok.chat_template is None
    out = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tok.decode(out[0]).endswith(" William Shakespeare")
