"""Measure how fast this machine runs the parts of an edit, in a few seconds on one layer of a model's shape."""

from __future__ import annotations

import bisect
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from editlib.models.layer_passes import Pass, one_layer, step_pass, text_pass, without_grad
from editlib.models.precision import cast_params, fast_dtype, plain_attention, wide_dtype
from editlib.models.size import model_size
from editlib.stats.moments import GRAM_SHARE, Buffers, add_gram

PassKind = Literal["text", "step", "gradient"]
"""A kind of forward pass: "text", over many tokens of running text; "step", over a few tokens after a cached prefix;
"gradient", the same with the gradient of its inputs."""

EIGEN = 9  # operations of a symmetric eigendecomposition with all vectors, per cubed dimension
TEXT, SUFFIX, PREFIX = 128, 6, 12  # tokens of a row of running text; of a row of a step; of the cached prefix before it
SIZES = {"text": (1, 128, 1024), "step": (6, 48, 192, 768), "gradient": (6, 48, 192, 768)}
"""Tokens of the passes that are timed."""
VOCAB = 8192  # rows of the output head that is timed
LONG = 1.0  # seconds; after a pass as long as this no larger one is timed
SQUARE = 1024  # dimension of the linear systems that are timed
MIB = 1024 * 1024


@dataclass(frozen=True)
class Curve:
    """Holds the seconds of a piece of work by its number of tokens, measured at some numbers in rising order."""

    tokens: tuple[float, ...]
    seconds: tuple[float, ...]

    def at(self, tokens: float) -> float:
        """Interpolates between the measured numbers, and extrapolates from the last two."""
        i = min(max(bisect.bisect_left(self.tokens, tokens), 1), len(self.tokens) - 1)
        share = (tokens - self.tokens[i - 1]) / (self.tokens[i] - self.tokens[i - 1])
        return max(self.seconds[i - 1] + share * (self.seconds[i] - self.seconds[i - 1]), 0.0)

    def times(self, factor: float) -> Curve:
        """Returns the curve of a machine that takes `factor` times as long."""
        return Curve(self.tokens, tuple(factor * second for second in self.seconds))


@dataclass(frozen=True)
class Machine:
    """Describes the speed of a machine: operations per second of each kind, bytes per second, and the overhead of a
    call.

    `layer` has the seconds of a pass through one layer by its tokens, `head` those of logits and log probabilities, by
    positions, over `VOCAB` tokens, each by the name of a rate and a kind. Without them a pass takes its operations at
    the rate, and `call` for each layer.
    """

    model: float  # passes in the model's dtype
    fast: float  # passes in the faster of the model's dtype and bf16
    product: float  # sums of products of keys
    wide: float  # matrix products in the solve's dtype
    eigen: float  # eigen-decompositions
    bandwidth: float  # bytes of memory read or written
    disk: float  # bytes written to disk
    call: float = 0.0  # seconds that a layer takes for a single token
    layer: Mapping[tuple[str, PassKind], Curve] = field(default_factory=dict)
    head: Mapping[tuple[str, PassKind], Curve] = field(default_factory=dict)

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
            layer={key: curve.times(1 / factor) for key, curve in self.layer.items()},
            head={key: curve.times(1 / factor) for key, curve in self.head.items()},
        )


def measure(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> Machine:
    """Times one random layer of the configuration's shape, a head, products, a decomposition, a copy and a file."""
    size, model = model_size(config), one_layer(config, dtype, device)
    wide, fast = wide_dtype(device), fast_dtype(model)
    layer: dict[tuple[str, PassKind], Curve] = {}
    head: dict[tuple[str, PassKind], Curve] = {}
    for rate, narrow in (("model", None), ("fast", fast)):
        if rate == "model" or narrow is not None:
            with cast_params(model, narrow):
                layers, heads = _layer_curves(model), _head_curves(size.d_model, narrow or dtype, device)
        layer |= {(rate, kind): curve for kind, curve in layers.items()}
        head |= {(rate, kind): curve for kind, curve in heads.items()}
    square = torch.randn(SQUARE, SQUARE, dtype=wide, device=device)
    moment = square @ square.T
    keys = torch.randn(2 * SQUARE, SQUARE, dtype=torch.bfloat16 if fast else torch.float32, device=device)
    block = torch.ones(64 * MIB, dtype=torch.float32, device=device)  # larger than a processor's cache
    place = torch.empty_like(block)
    return Machine(
        model=_rate(layer["model", "text"], size.layer),
        fast=_rate(layer["fast", "text"], size.layer),
        product=_product_rate(keys),
        wide=2 * SQUARE**3 / _seconds(lambda: square @ square, device),
        eigen=EIGEN * SQUARE**3 / _seconds(lambda: torch.linalg.eigh(moment), device),
        # A copy reads and writes every byte.
        bandwidth=2 * block.nbytes / _seconds(lambda: place.copy_(block), device),
        disk=_disk_rate(),
        call=layer["model", "text"].at(1),
        layer=layer,
        head=head,
    )


def _rate(curve: Curve, parameters: int) -> float:
    """Computes the operations per second of a pass over many tokens: a product and a sum per parameter and token."""
    return 2 * (curve.tokens[-1] - 1) * parameters / max(curve.seconds[-1] - curve.seconds[0], 1e-9)


def _product_rate(keys: Tensor) -> float:
    """Measures the operations per second of the sums over `keys [m, d]`, of which half a product is computed."""
    total, buffers = torch.zeros(keys.shape[1], keys.shape[1], dtype=torch.float64), Buffers()
    operations = 2 * len(keys) * keys.shape[1] ** 2 * GRAM_SHARE
    return operations / _seconds(lambda: add_gram(total, [keys], buffers), keys.device)


def _layer_curves(model: PreTrainedModel) -> dict[PassKind, Curve]:
    """Times a pass through the one layer of `model`, by kind."""
    device = model.device

    def text(tokens: int) -> Pass:
        return text_pass(model, max(1, tokens // TEXT), min(tokens, TEXT))

    def step(tokens: int) -> Pass:
        return step_pass(model, tokens // SUFFIX, SUFFIX, PREFIX, grad=False)

    def gradient(tokens: int) -> Pass:
        return step_pass(model, tokens // SUFFIX, SUFFIX, PREFIX, grad=True)

    with plain_attention(device):
        steps: dict[PassKind, Curve] = {
            "step": _curve("step", step, device),
            "gradient": _curve("gradient", gradient, device),
        }
    return {"text": _curve("text", text, device), **steps}


def _head_curves(d_model: int, dtype: torch.dtype, device: torch.device) -> dict[PassKind, Curve]:
    """Times logits over `VOCAB` tokens and of their log probabilities, by positions and kind."""
    # Logits of a realistic size: with larger ones, probabilities become denormal numbers, which are slow.
    weight = torch.randn(VOCAB, d_model, dtype=dtype, device=device) / d_model**0.5

    def read(positions: int, grad: bool) -> Callable[[], object]:
        states = torch.randn(positions, d_model, dtype=dtype, device=device, requires_grad=grad)

        def run() -> object:
            log_probs = (states @ weight.T).float().log_softmax(1)
            return torch.autograd.grad(log_probs[:, 0].sum(), states) if grad else log_probs

        return run if grad else without_grad(run)

    return {
        "step": _curve("step", lambda positions: read(positions, False), device),
        "gradient": _curve("gradient", lambda positions: read(positions, True), device),
    }


def _curve(kind: PassKind, work: Callable[[int], Callable[[], object]], device: torch.device) -> Curve:
    """Times `work(tokens)` at the sizes of its kind, as far as they take less than `LONG`."""
    tokens: list[float] = []
    seconds: list[float] = []
    for size in SIZES[kind]:
        seconds.append(_seconds(work(size), device, at_least=0.1))
        tokens.append(size)
        if len(tokens) > 1 and seconds[-1] > LONG:
            break
    # A larger pass that was faster than a smaller one is noise.
    return Curve(tuple(tokens), tuple(accumulate(seconds, max)))


def _seconds(work: Callable[[], object], device: torch.device, at_least: float = 0.3) -> float:
    """Measures the seconds of one run, the median of several: the fastest would be that of a warm cache."""
    each: list[float] = []
    begun = time.perf_counter()
    work()  # the first run allocates memory and chooses kernels
    while not each or time.perf_counter() - begun < at_least:
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        each.append(time.perf_counter() - start)
    return statistics.median(each)


def _disk_rate() -> float:
    """Measures the bytes per second written to a temporary file."""
    block = bytes(64 * MIB)
    with tempfile.TemporaryFile() as file:
        begun = time.perf_counter()
        file.write(block)
        file.flush()
        return len(block) / (time.perf_counter() - begun)
