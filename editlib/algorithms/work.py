"""Describe pieces of work by their operations and bytes, and estimate the seconds that a machine takes for them.

A product of `[m, k]` and `[k, n]` counts `2 m k n` operations. A forward pass over a token costs two operations per
parameter; the gradient of its inputs, without that of the weights, two more. A pass is estimated from the time of one
layer with as many tokens on this machine (`Machine.layer`), other work from its operations at the machine's rate, or
from its bytes at the memory's rate if that takes longer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from editlib.algorithms.machine import VOCAB, Machine, PassKind
from editlib.models.size import ModelSize

Rate = Literal["model", "fast", "product", "wide", "eigen", "disk"]
"""Which of the rates of `Machine` a piece of work runs at."""

ITEM = 4  # bytes of a fp32 number
WIDE = 8  # bytes of a fp64 number
DECODE_ROWS = 64  # prompts that are answered at once
PROBE_TOKENS = 6  # tokens of a pass that probes the model's capabilities


@dataclass(frozen=True)
class Work:
    """Describes a piece of work that runs at one of the machine's rates."""

    rate: Rate
    flops: float  # operations
    moved: float = 0.0  # bytes read and written
    calls: float = 0.0  # calls of a layer, or of the head
    tokens: float = 0.0  # of each call
    kind: PassKind = "text"  # of the calls
    head: float = 0.0  # tokens of the vocabulary, if the calls are those of the head

    def by_rate(self, machine: Machine) -> bool:
        """Returns whether it is bound by the machine's rate of operations, not by its memory (the roofline model)."""
        return self.rate != "disk" and self.flops / machine.rate(self.rate) >= self.moved / machine.bandwidth

    def seconds(self, machine: Machine) -> float:
        """Estimates the seconds on `machine`: the slower of computing and moving the bytes."""
        if self.rate == "disk":
            return self.moved / machine.disk
        curve = (machine.head if self.head else machine.layer).get((self.rate, self.kind))
        if self.calls and curve is not None:
            computing = self.calls * curve.at(self.tokens) * (self.head / VOCAB if self.head else 1)
        else:
            computing = self.flops / machine.rate(self.rate) + (0 if self.head else self.calls * machine.call)
        return max(computing, self.moved / machine.bandwidth)


@dataclass(frozen=True)
class Step:
    """Describes one step of a job."""

    name: str
    work: list[Work] = field(default_factory=list)
    held: float = 0.0  # peak bytes in addition to the weights

    @property
    def flops(self) -> float:
        """Operations of all its work."""
        return sum(work.flops for work in self.work)

    def seconds(self, machine: Machine) -> float:
        """Estimates the seconds of all its work on `machine`, one piece after another."""
        return sum(work.seconds(machine) for work in self.work)

    def bound(self, machine: Machine) -> str:
        """Returns the resource that takes most of its time: "matrix rate", "memory" or "disk"."""
        shares = {"matrix rate": 0.0, "memory": 0.0, "disk": 0.0}
        for work in self.work:
            kind = "disk" if work.rate == "disk" else "matrix rate" if work.by_rate(machine) else "memory"
            shares[kind] += work.seconds(machine)
        return max(shares, key=lambda name: shares[name])


def forward_pass(
    size: ModelSize,
    tokens: float,
    layers: float,
    rate: Rate,
    *,
    passes: float,
    kind: PassKind = "text",
    moved: float | None = None,
) -> Work:
    """Estimates a total of `tokens` through `layers` layers in `passes` passes, each of which reads the weights
    once."""
    operations = (4 if kind == "gradient" else 2) * tokens * layers * size.layer  # a gradient costs as much again
    moved = passes * layers * size.layer * ITEM if moved is None else moved
    return Work(rate, operations, moved, passes * layers, tokens / max(passes, 1), kind)


def head_pass(size: ModelSize, positions: float, rate: Rate, *, passes: float, kind: PassKind) -> Work:
    """Estimates logits and log probabilities at a total of `positions`, in `passes` passes."""
    operations = (4 if kind == "gradient" else 2) * positions * size.head
    return Work(
        rate, operations, 4 * ITEM * size.vocab * positions, passes, positions / max(passes, 1), kind, size.vocab
    )


def answered(size: ModelSize, rows: int, prompt_tokens: int, new_tokens: int, rate: Rate) -> list[Work]:
    """Estimates greedy answers to `rows` prompts: one pass over the prompts, and one for each new token."""
    passes = max(1, -(-rows // DECODE_ROWS))
    decoded = forward_pass(size, rows * new_tokens, size.n_layers, rate, passes=passes * new_tokens, kind="step")
    head = head_pass(size, rows * new_tokens, rate, passes=passes * new_tokens, kind="step")
    return [forward_pass(size, rows * prompt_tokens, size.n_layers, rate, passes=passes), decoded, head]


def probes(size: ModelSize, passes: int, rate: Rate) -> list[Work]:
    """Estimates the short passes through the whole model that probe how it can be run in parts."""
    tokens = PROBE_TOKENS * passes
    return [
        forward_pass(size, tokens, size.n_layers, rate, passes=passes, kind="step"),
        head_pass(size, tokens, rate, passes=passes, kind="step"),
    ]
