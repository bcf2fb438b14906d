"""What each step of an edit takes: floating-point operations, bytes moved and bytes held, counted from sizes alone.

A product of `[m, k]` and `[k, n]` counts `2 m k n` operations. A forward pass over a token costs two operations a
parameter; its gradient towards the inputs, weights left out, two more. A piece of work takes its operations at the
machine's rate and, for every call of a layer, what that takes however few tokens it is given; or its bytes at the
memory's rate, if that is longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from editlib.algorithms.machine import EIGEN, Machine
from editlib.models.size import ModelSize

Rate = Literal["model", "fast", "product", "wide", "eigen", "disk"]
"""Which of the rates of `Machine` a piece of work runs at."""

ITEM = 4  # bytes of a fp32 number
WIDE = 8  # of a fp64 number


@dataclass(frozen=True)
class Work:
    """Describes a piece of work that runs at one of the machine's rates."""

    rate: Rate
    flops: float  # operations
    moved: float = 0.0  # bytes read and written
    calls: float = 0.0  # calls of a layer, each with its overhead

    def by_rate(self, machine: Machine) -> bool:
        """Returns whether it is bound by the machine's rate of operations, not by its memory (the roofline model)."""
        return self.rate != "disk" and self.flops / machine.rate(self.rate) >= self.moved / machine.bandwidth

    def seconds(self, machine: Machine) -> float:
        """Estimates the seconds on `machine`: the slower of computing and moving the bytes."""
        if self.rate == "disk":
            return self.moved / machine.disk
        return max(self.flops / machine.rate(self.rate) + self.calls * machine.call, self.moved / machine.bandwidth)


@dataclass(frozen=True)
class Step:
    """Describes one step of a job."""

    name: str
    work: list[Work] = field(default_factory=list)
    held: float = 0.0  # the most bytes that it holds in addition to the weights

    @property
    def flops(self) -> float:
        """Operations of all its work."""
        return sum(work.flops for work in self.work)

    def seconds(self, machine: Machine) -> float:
        """Estimates the seconds of all its work on `machine`, one piece after another."""
        return sum(work.seconds(machine) for work in self.work)

    def bound(self, machine: Machine) -> str:
        """Returns the resource that most of its time goes into: "matrix rate", "memory" or "disk"."""
        shares = {"matrix rate": 0.0, "memory": 0.0, "disk": 0.0}
        for work in self.work:
            kind = "disk" if work.rate == "disk" else "matrix rate" if work.by_rate(machine) else "memory"
            shares[kind] += work.seconds(machine)
        return max(shares, key=lambda name: shares[name])


@dataclass(frozen=True)
class Job:
    """Describes the size of an edit: layers, requests, prompts and steps.

    A request has `contexts` prompts of `prompt_tokens` tokens, `suffix_tokens` of them from the subject's last token
    on, followed by `target_tokens` of the target. `kl_prompts` more prompts are compared at `kl_tokens` positions each.
    `steps` are those of a value, `past` the keys of earlier edits and anchors, `kept_out` the directions outside the
    null space. `v_rate` is the arithmetic rate while values are found.
    """

    layers: Sequence[int]
    requests: int
    contexts: int = 1
    prompt_tokens: int = 16
    suffix_tokens: int = 6
    target_tokens: int = 3
    kl_prompts: int = 1
    kl_tokens: int = 1
    steps: int = 25
    past: int = 0
    kept_out: int = 64
    v_rate: Rate = "model"


def statistics(size: ModelSize, layers: Sequence[int], tokens: int, batch_tokens: int = 4096) -> Step:
    """Estimates one pass over a corpus through the last of `layers`, the sums of `k k^T` of each, and their
    decompositions."""
    square = size.d_ff**2
    batches = max(1, round(tokens / batch_tokens))
    held = len(layers) * square * WIDE + batch_tokens * (size.d_ff * len(layers) * ITEM + 8 * size.d_model * ITEM)
    return Step(
        "statistics",
        [
            forward_pass(size, tokens, max(layers) + 1, "fast", passes=batches),
            # fp32 products of the upper half, in eight slabs, summed in fp64: sums are read and written once per batch
            Work("product", 1.125 * square * tokens * len(layers), 3 * square * WIDE * len(layers) * batches),
            decomposition(size, len(layers)),
        ],
        max(held, 3 * square * WIDE),
    )


def decomposition(size: ModelSize, layers: int) -> Work:
    """Estimates the eigenvectors of the second moment `[d_ff, d_ff]` of so many layers, in fp64."""
    return Work("eigen", EIGEN * size.d_ff**3 * layers)


def values(size: ModelSize, job: Job, *, chunk_rows: int = 64, itemsize: int = ITEM) -> Step:
    """Estimates the values of all requests: one pass up to the edited layer, then `steps` passes from there up and
    back."""
    rows = job.requests * (job.contexts + job.kl_prompts)
    above = size.n_layers - max(job.layers) - 1
    suffix = job.requests * (job.contexts * (job.suffix_tokens + job.target_tokens - 1) + job.kl_prompts * 3)
    scored = job.requests * (job.contexts * job.target_tokens + job.kl_prompts * job.kl_tokens)
    groups = max(1, -(-rows // chunk_rows))
    per_step = 4 * (suffix * above * size.layer + scored * size.head)  # forwards, and gradients of the inputs
    read = 2 * groups * (above * size.layer + size.head) * itemsize  # the weights are read both ways
    logits = 6 * ITEM * size.vocab * scored / groups  # log-softmax, targets and their gradients
    graph = suffix / groups * above * (12 * size.d_model + 6 * size.d_ff) * itemsize
    prefix = rows / groups * job.prompt_tokens * size.n_layers * size.kv_width * itemsize
    return Step(
        "values",
        [
            forward_pass(size, rows * job.prompt_tokens, size.n_layers, job.v_rate, passes=2 * groups),
            Work(
                job.v_rate,
                job.steps * per_step,
                job.steps * (read + 8 * ITEM * size.vocab * scored),
                job.steps * 3 * groups * above,
            ),
        ],
        logits + graph + prefix,
    )


def solve(size: ModelSize, job: Job) -> Step:
    """Estimates keys, residuals, the closed form and the update of each layer."""
    first, last, n = min(job.layers), max(job.layers), job.requests
    tokens = n * job.contexts * job.prompt_tokens
    m = n + job.past  # keys in the linear system
    # One pass up to the first layer; then each layer for its keys, once more to advance, and up to the last for H.
    layers_run = first + sum(2 + last - layer + 1 for layer in job.layers)
    system = 2 * size.d_ff * m**2 + m**3 / 3 + 2 * m**2 * n + 2 * size.d_ff * m * n
    project = 4 * size.d_ff * job.kept_out * m
    square = size.d_model * size.d_ff
    return Step(
        "solve",
        [
            forward_pass(size, tokens, layers_run, "model", passes=1),
            Work("wide", (system + project + 2 * square * n) * len(job.layers)),
            Work("wide", 0, 6 * square * WIDE * len(job.layers)),  # the update multiplied out, summed and written
        ],
        2 * square * WIDE + (3 * m + job.kept_out) * size.d_ff * WIDE + len(job.layers) * square * ITEM,
    )


def token(
    size: ModelSize,
    *,
    steps: int,
    batch: int,
    questions: int = 318,
    guard_prompts: int = 180,
    question_tokens: int = 20,
    answer_tokens: int = 24,
    refusal_tokens: int = 12,
) -> Step:
    """Estimates phase I: prefixes of the questions, the guard's answers, and `steps` passes forwards and back."""
    seen = questions * question_tokens
    answered = guard_prompts * (question_tokens + answer_tokens)
    scored = seen // 4 + guard_prompts * answer_tokens
    decoding = Work("fast", 2 * guard_prompts * answer_tokens * (size.total), answer_tokens * 3 * size.total * 2)
    trained = batch * (refusal_tokens + 1)
    step = 4 * (trained * size.n_layers * size.layer + batch * refusal_tokens * size.head)
    return Step(
        "token",
        [
            forward_pass(size, seen + answered, size.n_layers, "fast", passes=2),
            Work("fast", 2 * scored * size.head, 4 * ITEM * scored * size.vocab),
            decoding,
            Work("fast", steps * step, steps * (2 * size.total * 2 + 6 * ITEM * batch * refusal_tokens * size.vocab)),
        ],
        questions * question_tokens * size.n_layers * size.kv_width * 2 + 2 * size.total + scored * size.vocab * 2,
    )


def save(size: ModelSize, itemsize: int) -> Step:
    """Estimates the writing of the edited model to disk."""
    return Step("save", [Work("disk", 0, size.bytes(itemsize))])


def forward_pass(size: ModelSize, tokens: int, layers: float, rate: Rate, *, passes: int) -> Work:
    """Estimates a pass of `tokens` through `layers` layers in so many `passes`, each of which reads the weights
    once."""
    return Work(rate, 2 * tokens * layers * size.layer, passes * layers * size.layer * ITEM, passes * layers)
