"""A chain that is written on an accelerator in bf16, and read anywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from chain_cases import RETAIN, A, B, C, hparams_of, timeless

from editlib.algorithms.unierase.token import UnlearningToken
from editlib.chain import Chain
from editlib.models.loading import load
from editlib.models.weights import save_model, weights_sha256
from editlib.stats.file import LayerStats
from editlib.stats.store import save_stats, stored_layers
from editlib.workbench import Workbench


@pytest.fixture
def narrow(base, tmp_path):
    """The base model with its statistics and token, in bf16."""
    model, tok = load(str(base / "tiny"), dtype="bfloat16")
    (tmp_path / "tiny").mkdir()
    save_model(model, tok, tmp_path / "tiny")
    for stats in stored_layers(base / "stats", str(base / "tiny")).values():
        header = replace(stats.header, model=str(tmp_path / "tiny"), model_sha256=weights_sha256(model))
        save_stats(tmp_path / "stats", LayerStats(stats.mom2, stats.count, stats.sample_size, header))
    token = UnlearningToken.load(base / "token.safetensors")
    header = replace(token.header, model_sha256=weights_sha256(model))
    replace(token, header=header).save(tmp_path / "token.safetensors")
    return tmp_path


@pytest.fixture(params=["MEMIT", "AlphaEdit", "UniErase gated"])
def road(request, narrow, accelerator):
    """`road(name) -> Chain` of one algorithm in turn on the accelerator; `road.load(device)` gives the model anew."""

    def load_on(device):
        return Workbench.load(str(narrow / "tiny"), narrow / "stats", device_map=str(device), progress=False)

    def start(name):
        options = {}
        if request.param.startswith("UniErase"):
            options = {"token": narrow / "token.safetensors", "retain": RETAIN}
        hparams = hparams_of(request.param)
        return Chain.create(narrow / name, load_on(accelerator), hparams, clock=lambda: "now", **options)

    start.load = load_on
    return start


def test_the_same_bytes_whatever_the_road(road, accelerator):
    straight, other = road("straight"), road("other")
    straight.add(A)
    straight.add(B)
    other.add(A)
    other.add(C)
    other.undo()
    resumed = Chain.open(other.path, road.load(accelerator), clock=lambda: "now")
    resumed.add(B)
    assert timeless(straight.path) == timeless(resumed.path)
    assert weights_sha256(straight.model) == weights_sha256(resumed.model)


def test_the_cpu_finds_the_weights_that_the_accelerator_wrote(road):
    """Sums are made on the CPU whatever the model runs on, so that `verify` holds everywhere."""
    chain = road("chain")
    chain.add(A)
    chain.add(B)
    here = Chain.open(chain.path, road.load("cpu"))
    here.verify()
    assert weights_sha256(here.model) == weights_sha256(chain.model)


def test_revoking_everything_gives_the_base_weights(road, accelerator):
    chain = road("chain")
    plain = {layer: weight.clone() for layer, weight in chain.base_weights.items()}
    chain.add(A)
    chain.add(C)
    chain.revoke(["a1"])
    assert len(chain.requests) == 3
    chain.revoke([request.id for request in chain.requests])
    for layer, weight in plain.items():
        assert chain.anat.weight(layer).device.type == accelerator.type
        assert torch.equal(chain.anat.weight(layer).cpu(), weight)


def test_a_chain_of_ones_adds_up_in_bf16(road, accelerator):
    """The sum of the updates is rounded once: what ten batches of one come to is one rounding away from their sum."""
    chain = road("ones")
    for request in (*A, *B, *C):
        chain.add([request])
    weights = {layer: chain.anat.weight(layer).cpu() for layer in chain.base_weights}
    for layer, update in chain.updates().items():
        exact = chain.base_weights[layer].double() + update.left.double() @ update.right.double()
        assert torch.equal(weights[layer], exact.to(torch.bfloat16))
