"""How fast this machine is at what an edit does, measured in a few seconds on one layer of a model's shape."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from editlib.models.precision import cast_params, fast_dtype, wide_dtype
from editlib.models.size import model_size, one_layer

EIGEN = 9  # operations of a symmetric eigen-decomposition with all vectors, a cubed dimension
TOKENS = 64  # of the pass that is timed: as many as a step of a few values has
SQUARE = 1024  # of the systems that are timed
MIB = 1024 * 1024


@dataclass(frozen=True)
class Machine:
    """Describes the speed of a machine: operations per second of each kind, bytes per second, and the overhead of a
    call."""

    model: float  # passes in the model's dtype
    fast: float  # passes in the faster of the model's dtype and bf16
    product: float  # matrix products in fp32
    wide: float  # matrix products in the solve's dtype
    eigen: float  # eigen-decompositions
    bandwidth: float  # bytes of memory read or written
    disk: float  # bytes written to disk
    call: float = 0.0  # seconds that a layer takes for a single token

    def rate(self, name: str) -> float:
        """Returns the operations per second of one kind, by the name of its field."""
        return float(getattr(self, name))

    def scaled(self, flops: float | None, bandwidth: float | None) -> Machine:
        """Estimates another machine: every rate of operations is scaled by `flops` over the `fast` rate of this one.

        Args:
            flops: operations per second in the fast dtype; `None`: those of this machine.
            bandwidth: bytes per second; `None`: those of this machine.
        """
        factor = 1.0 if flops is None else flops / self.fast
        return replace(
            self,
            **{name: self.rate(name) * factor for name in ("model", "fast", "product", "wide", "eigen")},
            bandwidth=bandwidth or self.bandwidth,
        )


def measure(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> Machine:
    """Times one random layer of the configuration's shape, a product, a decomposition, a copy and a written file."""
    size, model = model_size(config), one_layer(config, dtype, device)
    wide, fast = wide_dtype(device), fast_dtype(model)
    model_rate, call = _pass_rate(model, size.layer)
    fast_rate = model_rate
    if fast is not None:
        with cast_params(model, fast):
            fast_rate, _ = _pass_rate(model, size.layer)
    square = torch.randn(SQUARE, SQUARE, dtype=wide, device=device)
    narrow, moment = square.float(), square @ square.T
    block = torch.ones(64 * MIB, dtype=torch.float32, device=device)  # larger than a processor's cache
    place = torch.empty_like(block)
    return Machine(
        model=model_rate,
        fast=fast_rate,
        product=2 * SQUARE**3 / _seconds(lambda: narrow @ narrow, device),
        wide=2 * SQUARE**3 / _seconds(lambda: square @ square, device),
        eigen=EIGEN * SQUARE**3 / _seconds(lambda: torch.linalg.eigh(moment), device),
        # A copy reads and writes every byte.
        bandwidth=2 * block.nbytes / _seconds(lambda: place.copy_(block), device),
        disk=_disk_rate(),
        call=call,
    )


def _pass_rate(model: PreTrainedModel, parameters: int) -> tuple[float, float]:
    """Measures the operations per second of a pass over many tokens, and the seconds of a pass over one token.

    The rate excludes the seconds of one token, which are the overhead of a call.
    """
    call = _pass_seconds(model, 1)
    # Two operations, a product and a sum, per parameter and token.
    return 2 * (TOKENS - 1) * parameters / max(_pass_seconds(model, TOKENS) - call, 1e-9), call


@torch.no_grad()
def _pass_seconds(model: PreTrainedModel, tokens: int) -> float:
    ids = torch.zeros(max(1, tokens // 128), min(tokens, 128), dtype=torch.long, device=model.device)
    return _seconds(lambda: model(input_ids=ids, use_cache=False), model.device)


def _seconds(work: Callable[[], object], device: torch.device, at_least: float = 0.3) -> float:
    """Measures the seconds of one run, the fastest of several."""
    best, begun = float("inf"), time.perf_counter()
    work()  # the first run allocates memory and chooses kernels
    while best == float("inf") or time.perf_counter() - begun < at_least:
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _disk_rate() -> float:
    """Measures the bytes per second written to a temporary file."""
    block = bytes(64 * MIB)
    with tempfile.TemporaryFile() as file:
        begun = time.perf_counter()
        file.write(block)
        file.flush()
        return len(block) / (time.perf_counter() - begun)
