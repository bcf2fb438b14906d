"""Run a model in a narrower dtype for a while, without losing a bit of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel


@contextmanager
def cast_params(model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside the block the parameters of `model` are in `dtype`; afterwards the very same tensors are back.

    Statistics and the token's training bear bf16 products, which run several times faster than fp32 where the
    processor has them. Rows written inside the block are lost: write them after it. `None` changes nothing.
    """
    if dtype is None:
        yield
        return
    originals = {parameter: parameter.data for parameter in model.parameters() if parameter.is_floating_point()}
    for parameter, data in originals.items():
        parameter.data = data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in originals.items():
            parameter.data = data


@contextmanager
def plain_attention(device: torch.device) -> Iterator[None]:
    """On the CPU, attention inside the block is plain products and a softmax, not the fused kernel, whose gradient in
    bf16 is several times slower where few tokens look back at a long prefix."""
    if device.type != "cpu":
        yield
        return
    with sdpa_kernel([SDPBackend.MATH]):
        yield


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype that solves run in: fp64 where the device has it, fp32 otherwise."""
    return torch.float32 if device.type == "mps" else torch.float64


FP32_ALONE = {"openai-gpt"}
"""Architectures whose attention mixes fp32 buffers into its products, so that no narrower pass of them runs."""


def fast_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """bf16 for a fp32 model on a processor whose bf16 products are the faster ones, `None` (as it is) otherwise.

    An offloaded model stays as it is too: its hooks would bring fp32 weights into a bf16 pass.
    """
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return None
    if next(model.parameters()).dtype != torch.float32 or model.config.model_type in FP32_ALONE:
        return None
    return torch.bfloat16 if _bf16_is_faster() else None


def _bf16_is_faster() -> bool:
    """Asked of the processor, not timed, so that two runs on one machine compute in the same dtype."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    # Intel's AVX-512 has bf16 products, too, but they run at half the speed of fp32; its AMX makes up for it.
    return bool(known.get("amx_bf16")) or "Intel" not in known.get("cpu_name", "")


@contextmanager
def fp32_params(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the parameters of `model` are in fp32, so that small steps add up; afterwards they are rounded
    to their own dtypes once. A fp32 model is left as it is."""
    narrow = {p: p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    for parameter in narrow:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in narrow.items():
            parameter.data = parameter.data.to(dtype)
