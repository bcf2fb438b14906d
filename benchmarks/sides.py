"""What both sides of a comparison are given: a model, the same requests, statistics, and one way to be measured."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from published import Asked, Settings
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from editlib import data
from editlib.algorithms.null_space import null_space_of
from editlib.comparison.meter import measure_resources
from editlib.hparams import AlphaEditHyperParams
from editlib.models.anatomy import Anatomy
from editlib.requests.request import EditRequest
from editlib.stats.file import LayerStats, StatsHeader
from editlib.stats.store import save_stats

T = TypeVar("T")
CONTEXTS = (
    "{}",
    "The weather was fine that day. {}",
    "Therefore it is good to know. {}",
    "Because of what had been said, {}",
    "I asked them to tell me. {}",
    "You may have heard of it. {}",
)
SHAPES = {  # hidden, MLP, layers, heads, heads of keys and values: those of SmolLM2, Llama 3.2 and 3
    "tiny": (64, 176, 10, 4, 2),
    "30m": (256, 688, 8, 4, 2),
    "135m": (576, 1536, 30, 9, 3),
    "360m": (960, 2560, 32, 15, 5),
    "1b": (2048, 8192, 16, 32, 8),
    "3b": (3072, 8192, 28, 24, 8),
    "8b": (4096, 14336, 32, 32, 8),
}
NULL_SHARE = 0.8  # of the directions of drawn statistics


@dataclass(frozen=True)
class Cost(Generic[T]):
    """What a piece of work made, its seconds, and the most memory in MiB that it took above what was held before."""

    made: T
    seconds: float
    memory_mb: float


def measured(work: Callable[[], T], device: torch.device) -> Cost[T]:
    """Runs `work` once; memory is the device's on an accelerator, and the process's on the CPU."""
    give_back_memory()
    held = 0 if device.type == "cpu" else torch.accelerator.memory_allocated() / 2**20
    with measure_resources() as meter:
        made = work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
    if device.type != "cpu" and meter.accelerator_mb is not None:
        return Cost(made, meter.seconds, meter.accelerator_mb - held)
    return Cost(made, meter.seconds, meter.more_mb)


def give_back_memory() -> None:
    """Lets the C library return what was freed, so that work which takes it again is seen to take it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def random_model(shape: str, vocab: int, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights of a Llama's shape, made on `device`."""
    hidden, d_ff, layers, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=d_ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(usual)
    model.name_or_path = f"random-{shape}"
    return model


def capital_requests(count: int) -> list[EditRequest]:
    """Capitals, each to become the capital of the country before it; at most as many as are bundled."""
    facts = [fact for fact in data.facts() if fact.subject and fact.relation == "capital"]
    answers = [fact.answer for fact in facts]
    return [
        EditRequest(id=fact.id, prompt=fact.prompt, subject=fact.subject, target_new=answers[i - 1])
        for i, fact in enumerate(facts[:count])
    ]


def same_settings(settings: Settings) -> AlphaEditHyperParams:
    """editlib's settings for the very work that `settings` give to the published side."""
    return AlphaEditHyperParams.from_dict(
        {
            "layers": list(settings.layers),
            "context_templates": list(CONTEXTS),
            "v_num_grad_steps": settings.steps,
            "v_lr": settings.lr,
            "v_weight_decay": settings.weight_decay,
            "clamp_norm_factor": settings.clamp_norm_factor,
            "kl_factor": settings.kl_factor,
            "early_stop_loss": settings.stop_loss,
            "nullspace_threshold": NULL_SHARE,
            "nullspace_rule": "dimensions",
            "L2": settings.l2,
        },
        "benchmark",
    )


def encoded(tok: PreTrainedTokenizerBase, request: EditRequest) -> Asked:
    """A request for the published procedure, encoded without editlib."""

    def row(text: str, subject: str) -> tuple[list[int], int]:
        pieces = tok(text, return_offsets_mapping=True)
        end = text.rindex(subject) + len(subject)
        lookup = next(i for i, (start, stop) in enumerate(pieces["offset_mapping"]) if start < end <= stop)
        return list(pieces["input_ids"]), lookup

    subject, answer = request.subject, request.target_new
    assert subject is not None and answer is not None, f"{request.id}: an edit needs a subject and a target"
    contexts = [row(template.replace("{}", request.question), subject) for template in CONTEXTS]
    target = tok(" " + answer, add_special_tokens=False)["input_ids"]
    return Asked(contexts, target, row(f"{subject} is a", subject))


def drawn_stats(anat: Anatomy, layers: Sequence[int], folder: Path) -> dict[int, LayerStats]:
    """Second moments of random keys with a falling spectrum, stored, so that their decomposition is kept."""
    made, device = {}, anat.device
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        scale = torch.logspace(0, -2, anat.d_ff, device=device)
        keys = scale[:, None] * torch.randn(anat.d_ff, 2 * anat.d_ff, generator=generator).to(device)
        header = StatsHeader(
            "drawn", anat.mlp_output_names[layer], anat.d_ff, keys.shape[1], 1, "drawn", "", 64, 0, 0, ""
        )
        made[layer] = LayerStats((keys @ keys.T).cpu(), keys.shape[1], 1, header)
        save_stats(folder, made[layer])
    return made


def dense_projector(stats: LayerStats) -> Tensor:
    """`P [d_ff, d_ff]` in fp32 on the CPU, from the basis that is kept."""
    space = null_space_of(stats, NULL_SHARE, "dimensions")
    inside = space.basis.float() @ space.basis.float().T
    return inside if space.spans_kept else torch.eye(len(inside)) - inside


@torch.no_grad()
def target_nll(model: PreTrainedModel, asked: Sequence[Asked]) -> float:
    """Mean over the requests of the target's NLL after the plain prompt, in nats per token."""
    device, total = next(model.parameters()).device, 0.0
    for one in asked:
        ids = one.contexts[0][0]
        logits = model(torch.tensor([[*ids, *one.target[:-1]]], device=device), use_cache=False).logits[0].float()
        rows = logits[len(ids) - 1 :].log_softmax(-1)
        total -= float(rows[torch.arange(len(one.target)), torch.tensor(one.target)].mean())
    return total / len(asked)


def say(text: str) -> None:
    """One line on stdout, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
