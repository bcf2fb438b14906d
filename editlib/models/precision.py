"""Run a model in another dtype inside a block, without losing a bit of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel


@contextmanager
def cast_params(model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    """Casts the parameters of `model` to `dtype` inside the block; afterwards the original tensors are restored.

    Statistics and the training of [UNL] tolerate bf16 products, which are several times faster than fp32 on processors
    that have them. Weights written inside the block are lost: write them after it. `None` changes nothing.
    """
    if dtype is None:
        yield
        return
    # References, not copies: fp32 weights and their cast exist side by side only inside the block.
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
    """Computes attention on the CPU by plain products and a softmax inside the block.

    The gradient of the fused kernel in bf16 is several times slower if few tokens attend to a long prefix.
    """
    if device.type != "cpu":
        yield
        return
    with sdpa_kernel([SDPBackend.MATH]):
        yield


def wide_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype that solves run in: fp64 where the device has it, fp32 otherwise."""
    return torch.float32 if device.type == "mps" else torch.float64


def fast_dtype(model: PreTrainedModel) -> torch.dtype | None:
    """Returns bf16 for an fp32 model on a processor whose bf16 products are faster; `None` (no cast) otherwise.

    An offloaded model is not cast either: its hooks would bring fp32 weights into a bf16 pass. Nor is one of an
    architecture that does not run in bf16.
    """
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return None
    if next(model.parameters()).dtype != torch.float32 or not bf16_is_faster():
        return None
    return torch.bfloat16 if _runs_in(model, torch.bfloat16) else None


@torch.no_grad()
def _runs_in(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Returns whether a pass of two tokens runs in `dtype`.

    Some architectures mix fp32 buffers (a mask, sinusoidal positions) into narrower products. No attribute tells which
    ones, so it is tried.
    """
    with cast_params(model, dtype):
        try:
            model(torch.zeros(1, 2, dtype=torch.long), use_cache=False)
        except RuntimeError:
            return False
    return True


def bf16_is_faster() -> bool:
    """Returns whether bf16 products are faster, from the processor's features.

    Not timed, so that two runs on one machine use the same dtype.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    # Intel's AVX-512 has bf16 products too, but at half the speed of fp32; AMX is faster than both.
    return bool(known.get("amx_bf16")) or "Intel" not in known.get("cpu_name", "")


@contextmanager
def exact_bf16_products(dtype: torch.dtype) -> Iterator[None]:
    """Multiplies fp32 matrices whose numbers came from `dtype` in bf16 arithmetic inside the block, if `dtype` is bf16.

    Nothing is lost: bf16 numbers widened to fp32 are bf16 numbers, and products are summed in fp32. It matters on CPUs
    whose bf16 products are faster; elsewhere, and for other dtypes, nothing changes. The setting applies to the whole
    process.
    """
    units: Any = getattr(torch.backends.mkldnn, "matmul", None)  # PyTorch 2.9 and later
    if dtype != torch.bfloat16 or not hasattr(units, "fp32_precision") or not bf16_is_faster():
        yield
        return
    before = units.fp32_precision
    units.fp32_precision = "bf16"
    try:
        yield
    finally:
        units.fp32_precision = before


@contextmanager
def fp32_params(model: PreTrainedModel) -> Iterator[None]:
    """Casts the parameters of `model` to fp32 inside the block, so that small steps add up.

    Afterwards they are rounded to their own dtypes, once. An fp32 model is not changed.
    """
    narrow = {p: p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    for parameter in narrow:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in narrow.items():
            parameter.data = parameter.data.to(dtype)
