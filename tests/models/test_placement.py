"""Models that accelerate has split or offloaded: the same hash, the same statistics as the whole ones."""

import copy
import itertools

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from tiny_models import SENTENCES

from editlib.errors import ModelError
from editlib.models.anatomy import anatomy
from editlib.models.loading import load
from editlib.models.placement import input_device, stored_tensors
from editlib.models.precision import fast_dtype
from editlib.models.weights import save_model, weights_sha256
from editlib.workbench import Workbench

CPU = torch.device("cpu")


def device_map(model):
    """The first two layers in memory, the others on the disk."""
    base = model.base_model_prefix
    parts = {}
    for name, child in getattr(model, base).named_children():
        if isinstance(child, torch.nn.ModuleList):
            parts |= {f"{base}.{name}.{i}": "cpu" if i < 2 else "disk" for i in range(len(child))}
        else:
            parts[f"{base}.{name}"] = "cpu"
    return {**parts, "lm_head": "cpu"}


KINDS = {
    "offloaded to memory": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "offloaded to disk": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
    "whole blocks offloaded": lambda model, folder: cpu_offload(
        model, execution_device=CPU, preload_module_classes=[type(anatomy(model).layers[0]).__name__]
    ),
    "split": lambda model, folder: dispatch_model(
        model, device_map(model), main_device="cpu", offload_dir=str(folder), force_hooks=True
    ),
}


@pytest.fixture(params=itertools.product(KINDS, ["llama", "gpt2"]), ids=", ".join)
def pair(request, pristine, tmp_path):
    """(a model in a piece, the same one with parts elsewhere)."""
    kind, family = request.param
    model = KINDS[kind](copy.deepcopy(pristine[family]), tmp_path / "offload")
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    return copy.deepcopy(pristine[family]), model


def test_the_hash_is_that_of_the_whole_model(pair):
    whole, split = pair
    assert weights_sha256(split) == weights_sha256(whole)
    for (name, tensor), (wanted, data) in zip(stored_tensors(split), sorted(whole.state_dict().items()), strict=True):
        assert name == wanted
        assert torch.equal(tensor, data)
    with torch.no_grad():
        next(iter(whole.parameters())).view(-1)[0] += 1
    assert weights_sha256(split) != weights_sha256(whole)


@pytest.mark.parametrize("corpus", ["c.txt", "self"])
def test_statistics_are_those_of_the_whole_model(pair, tok, tmp_path, monkeypatch, corpus):
    tokens = 5
    if corpus != "self":
        tokens, corpus = 300, tmp_path / corpus
        corpus.write_text("\n\n".join(SENTENCES * 5))
    monkeypatch.setattr("editlib.workbench.fast_dtype", lambda _: None)  # the whole one would run in bf16
    made = [
        Workbench.of(model, tok, tmp_path / f"{i}", name="tiny", progress=False).make_stats(
            [1, 3], corpus=str(corpus), tokens=tokens
        )
        for i, model in enumerate(pair)
    ]
    for layer, stats in made[0].items():
        assert made[1][layer].header == stats.header
        assert torch.equal(made[1][layer].mom2, stats.mom2)


def test_an_offloaded_model_keeps_its_dtype(pair):
    """Its hooks bring fp32 weights, which do not go with bf16 states."""
    assert fast_dtype(pair[1]) is None


def test_a_model_loaded_with_a_device_map(tiny_llama_untied, tok, tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    save_model(tiny_llama_untied, tok, folder)
    model, _ = load(str(folder), device_map=device_map(tiny_llama_untied))
    assert weights_sha256(model) == weights_sha256(tiny_llama_untied)


def test_where_token_ids_go(tiny_llama, pair):
    assert input_device(tiny_llama) == CPU
    assert input_device(pair[1]) == CPU
    assert anatomy(pair[1]).output_width == anatomy(pair[0]).output_width


def test_weights_that_are_nowhere(tiny_llama):
    with pytest.raises(ModelError, match=r"lm_head\.weight of LlamaForCausalLM holds no data"):
        weights_sha256(tiny_llama.to("meta"))
