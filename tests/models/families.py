"""One tiny model of each family whose layers differ in how they are laid out or what they return."""

from __future__ import annotations

import torch
from conftest import VOCAB, randomise
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

# family: (its own options, where its MLP output matrix of layer 1 is)
FAMILIES: dict[str, tuple[dict, str]] = {
    "llama": ({}, "model.layers.1.mlp.down_proj"),
    "mistral": ({"sliding_window": 4}, "model.layers.1.mlp.down_proj"),
    "qwen2": ({}, "model.layers.1.mlp.down_proj"),
    "gemma2": ({"head_dim": 8, "sliding_window": 4}, "model.layers.1.mlp.down_proj"),
    "gemma3_text": ({"head_dim": 8, "sliding_window": 4}, "model.layers.1.mlp.down_proj"),
    "granite": ({"logits_scaling": 3.0}, "model.layers.1.mlp.down_proj"),
    "phi": ({}, "model.layers.1.mlp.fc2"),
    "gpt_neox": ({}, "gpt_neox.layers.1.mlp.dense_4h_to_h"),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, "model.decoder.layers.1.fc2"),
    "gpt2": (GPT_NAMES, "transformer.h.1.mlp.c_proj"),
    # Their layers return tuples.
    "gptj": ({**GPT_NAMES, "rotary_dim": 4}, "transformer.h.1.mlp.fc_out"),
    "bloom": ({"n_layer": 4, "n_head": 4}, "transformer.h.1.mlp.dense_4h_to_h"),
    "falcon": ({"ffn_hidden_size": 64}, "transformer.h.1.mlp.dense_4h_to_h"),
}


def make(family: str, **options) -> torch.nn.Module:
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES.get(family, ({}, ""))[0], **options})
    return randomise(AutoModelForCausalLM.from_config(config), seed=3)
