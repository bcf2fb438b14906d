"""A model before its weights are read: the same modules, and the same faults as loading finds."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, SLOW, make
from safetensors.torch import load_file, save_file
from tiny_models import train_tokenizer
from transformers import AutoConfig

from editlib.errors import ModelError, RequestError
from editlib.models import loading
from editlib.models.loading import load
from editlib.models.outline import load_checked, outline_of
from editlib.models.prompts import PromptFormat
from editlib.models.weights import save_model, stored_bytes, weights_sha256


@pytest.mark.parametrize("family", [*FAMILIES, *SLOW])
def test_an_outline_has_the_shapes_of_the_model(family, tmp_path):
    model = make(family)
    save_model(model, train_tokenizer(), tmp_path)
    outline = outline_of(str(tmp_path))
    assert all(tensor.is_meta for tensor in outline.model.parameters())
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in outline.model.state_dict().items()} == shapes
    assert stored_bytes(outline.model) == stored_bytes(model)
    loaded, tok = load_checked(str(tmp_path), lambda seen: None)
    assert weights_sha256(loaded) == weights_sha256(load(str(tmp_path))[0])
    assert tok("a text")["input_ids"] == outline.tok("a text")["input_ids"]


def test_a_kind_that_cannot_be_edited_is_refused_by_its_configuration(tmp_path):
    """Nothing but a configuration is there: its weights may be a hundred gigabytes."""
    config = AutoConfig.for_model(
        "mixtral",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=300,
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="mixture-of-experts layer"):
        outline_of(str(tmp_path))


def test_what_does_not_fit_is_said_before_weights_are_read(folder, monkeypatch):
    monkeypatch.setattr(loading, "open_weights", None)  # whoever calls it fails otherwise

    def refuse(outline):
        raise RequestError(PromptFormat(outline.tok).render("Who?"))

    with pytest.raises(RequestError, match="Who"):
        load_checked(str(folder), refuse)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.3.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"],
)
def test_weights_that_are_not_finite_are_refused(pristine, tok, tmp_path, name, dtype, value):
    save_model(copy.deepcopy(pristine["untied"]).to(dtype), tok, tmp_path)
    load(str(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name} holds numbers that are not finite"):
        load(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_largest_numbers_of_a_dtype_are_finite(pristine, tok, tmp_path, dtype):
    model = copy.deepcopy(pristine["llama"]).to(dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(torch.finfo(dtype).max)
    save_model(model, tok, tmp_path)
    load(str(tmp_path))
