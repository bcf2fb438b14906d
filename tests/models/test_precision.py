"""Which dtype is the fast one is asked of the processor."""

from __future__ import annotations

import pytest
import torch
from families import make

from editlib.models.precision import fast_dtype

INTEL, AMD, ARM = "Intel Xeon", "AMD EPYC", "Neoverse-V2"


@pytest.mark.parametrize(
    ("name", "products", "amx", "fast"),
    [
        (INTEL, True, True, torch.bfloat16),
        (INTEL, True, False, None),  # half the speed of fp32
        (AMD, True, False, torch.bfloat16),
        (ARM, True, False, torch.bfloat16),
        (AMD, False, False, None),
    ],
)
def test_bf16_where_it_is_faster(tiny_llama, monkeypatch, name, products, amx, fast):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: products)
    known = {"cpu_name": name, "amx_bf16": amx}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert fast_dtype(tiny_llama) is fast


def test_a_half_precision_model_stays_as_it_is(tiny_llama):
    assert fast_dtype(tiny_llama.bfloat16()) is None


@pytest.mark.parametrize(("family", "fast"), [("xglm", None), ("openai-gpt", None), ("opt", torch.bfloat16)])
def test_an_architecture_that_mixes_fp32_in_is_not_cast(monkeypatch, family, fast):
    """Sinusoidal positions, a mask: buffers that a cast of the parameters leaves in fp32."""
    monkeypatch.setattr("editlib.models.precision.bf16_is_faster", lambda: True)
    model = make(family)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    assert fast_dtype(model) is fast
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.float32 and torch.equal(weight, before[name]), name
