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
    """What a machine does a second.

    Operations of passes in the model's dtype (`model`) and in the faster one (`fast`), of products in fp32 (`product`)
    and in the solve's dtype (`wide`), of eigen-decompositions (`eigen`); bytes of memory read or written (`bandwidth`)
    and written to disk (`disk`). `call` is the seconds that a layer takes however little it is given.
    """

    model: float
    fast: float
    product: float
    wide: float
    eigen: float
    bandwidth: float
    disk: float
    call: float = 0.0

    def rate(self, name: str) -> float:
        """Operations a second of one kind, by its field."""
        return float(getattr(self, name))

    def scaled(self, flops: float | None, bandwidth: float | None) -> Machine:
        """Another machine: every rate of operations grows as `flops` over the `fast` rate measured here.

        Args:
            flops: operations a second in the fast dtype; `None`: those of this machine.
            bandwidth: bytes a second; `None`: those of this machine.
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
    block = torch.ones(64 * MIB, dtype=torch.float32, device=device)
    place = torch.empty_like(block)
    return Machine(
        model=model_rate,
        fast=fast_rate,
        product=2 * SQUARE**3 / _seconds(lambda: narrow @ narrow, device),
        wide=2 * SQUARE**3 / _seconds(lambda: square @ square, device),
        eigen=EIGEN * SQUARE**3 / _seconds(lambda: torch.linalg.eigh(moment), device),
        bandwidth=2 * block.nbytes / _seconds(lambda: place.copy_(block), device),
        disk=_disk_rate(),
        call=call,
    )


def _pass_rate(model: PreTrainedModel, parameters: int) -> tuple[float, float]:
    """Operations a second of a pass over many tokens, and the seconds of one over a single token, which are left out of
    the rate."""
    call = _pass_seconds(model, 1)
    return 2 * (TOKENS - 1) * parameters / max(_pass_seconds(model, TOKENS) - call, 1e-9), call


@torch.no_grad()
def _pass_seconds(model: PreTrainedModel, tokens: int) -> float:
    ids = torch.zeros(max(1, tokens // 128), min(tokens, 128), dtype=torch.long, device=model.device)
    return _seconds(lambda: model(input_ids=ids, use_cache=False), model.device)


def _seconds(work: Callable[[], object], device: torch.device, at_least: float = 0.3) -> float:
    """Seconds of one run, the fastest of several."""
    best, begun = float("inf"), time.perf_counter()
    work()
    while best == float("inf") or time.perf_counter() - begun < at_least:
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _disk_rate() -> float:
    """Bytes a second into a file of the folder for temporary ones."""
    block = bytes(64 * MIB)
    with tempfile.TemporaryFile() as file:
        begun = time.perf_counter()
        file.write(block)
        file.flush()
        return len(block) / (time.perf_counter() - begun)
