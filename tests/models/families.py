"""One tiny model of each family whose layers differ in how they are laid out or what they return."""

from __future__ import annotations

import torch
from tiny_models import VOCAB, randomise
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
}
GPT_NAMES = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "n_inner": 64}

GEMMA = {"head_dim": 8, "sliding_window": 4}
LLAMA_MATRIX = "model.layers.1.mlp.down_proj"

# family: (its own options, where its MLP output matrix of layer 1 is)
FAMILIES: dict[str, tuple[dict, str]] = {
    "llama": ({}, LLAMA_MATRIX),
    "mistral": ({"sliding_window": 4}, LLAMA_MATRIX),
    "qwen2": ({}, LLAMA_MATRIX),
    "qwen3": ({"head_dim": 8}, LLAMA_MATRIX),
    "gemma2": (GEMMA, LLAMA_MATRIX),
    "gemma3_text": (GEMMA, LLAMA_MATRIX),
    "granite": ({"logits_scaling": 3.0, "residual_multiplier": 0.22}, LLAMA_MATRIX),
    "olmo2": ({}, LLAMA_MATRIX),
    "stablelm": ({}, LLAMA_MATRIX),
    "smollm3": ({}, LLAMA_MATRIX),
    "phi": ({}, "model.layers.1.mlp.fc2"),
    "phi3": ({}, LLAMA_MATRIX),
    "gpt_neox": ({}, "gpt_neox.layers.1.mlp.dense_4h_to_h"),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, "model.decoder.layers.1.fc2"),
    "gpt2": (GPT_NAMES, "transformer.h.1.mlp.c_proj"),
    "gpt_neo": (
        {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 4},
        "transformer.h.1.mlp.c_proj",
    ),
    # ALiBi over columns.
    "mpt": (
        {"d_model": 32, "n_heads": 4, "n_layers": 4, "expansion_ratio": 2, "max_seq_len": 128},
        "transformer.blocks.1.ffn.down_proj",
    ),
    # Sinusoidal positions in fp32.
    "xglm": (
        {"d_model": 32, "num_layers": 4, "attention_heads": 4, "ffn_dim": 64},
        "model.layers.1.fc2",
    ),
    # Their layers return tuples.
    "gptj": ({**GPT_NAMES, "rotary_dim": 4}, "transformer.h.1.mlp.fc_out"),
    "bloom": ({"n_layer": 4, "n_head": 4}, "transformer.h.1.mlp.dense_4h_to_h"),
    "falcon": ({"ffn_hidden_size": 64}, "transformer.h.1.mlp.dense_4h_to_h"),
}
# Not continued from keys and values alone: short convolutions, a list of states, recurrence.
SLOW: dict[str, tuple[dict, str]] = {
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 2}, "model.layers.1.feed_forward.w2"),
    "openai-gpt": (GPT_NAMES, "transformer.h.1.mlp.c_proj"),
    "rwkv": ({}, "rwkv.blocks.1.feed_forward.value"),
}
# OPT-350m: embeddings narrower than the residual stream, and norms behind the sums.
OPT_350M = {"word_embed_proj_dim": 16, "do_layer_norm_before": False}


def make(family: str, **options) -> torch.nn.Module:
    config = AutoConfig.for_model(family, **{**COMMON, **{**FAMILIES, **SLOW}.get(family, ({}, ""))[0], **options})
    return randomise(AutoModelForCausalLM.from_config(config), seed=3)
