"""Statistics without a corpus: the model writes the text, and its keys are recorded while it does."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedTokenizerBase

from editlib.layer_stats import MomentSums, continue_from, finish, save_checkpoint
from editlib.models.anatomy import Anatomy
from editlib.models.freezing import frozen
from editlib.models.generation import end_tokens
from editlib.models.prompts import PromptFormat, TokenBatch, TokenRow, pad
from editlib.models.resume import forward
from editlib.stats_store import LayerStats, StatsHeader


def self_stats(
    anat: Anatomy,
    tok: PreTrainedTokenizerBase,
    layers: Sequence[int],
    prompts: Sequence[str],
    *,
    tokens: int,
    header: StatsHeader,
    seed: int = 0,
    batch_rows: int = 64,
    length: int = 96,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30.0,
    progress: bool = True,
) -> dict[int, LayerStats]:
    """Samples answers to `prompts` at temperature 1 and sums the keys of every sampled token, in the same passes.

    Args:
        prompts: questions and instructions, asked through the chat template when there is one and bare otherwise.
        length: tokens a sample may have; a sample that ends earlier leaves its row.
        header: `seed` and `corpus` are filled in here.
        checkpoint: a file that keeps the sums while the pass runs; found again, it is continued. Every batch draws
            from its own seed, so the text does not depend on interruptions.

    Raises:
        StatsError: a checkpoint of another job.
    """
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    header = replace(header, corpus="self", corpus_sha256=digest, seed=seed)
    sums = MomentSums(layers, anat.d_ff)
    number, samples = continue_from(checkpoint, header, sums)
    saved = time.monotonic()
    form, ends, device = PromptFormat(tok), end_tokens(anat), anat.embedding.weight.device
    with (
        frozen(anat.model),
        torch.no_grad(),
        tqdm(total=tokens, initial=sums.tokens, desc="statistics (self)", unit="tok", disable=not progress) as bar,
    ):
        while sums.tokens < tokens:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            picks = torch.randint(len(prompts), (batch_rows,), generator=generator).tolist()
            rows = [form.encode(prompts[i]) for i in picks]
            bar.update(_sample(anat, layers, rows, sums, ends, generator, min(length, tokens - sums.tokens), device))
            samples += batch_rows
            number += 1
            if checkpoint is not None and time.monotonic() - saved > checkpoint_seconds:
                save_checkpoint(checkpoint, header, sums, number, samples)
                saved = time.monotonic()
    sums.flush()
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return finish(sums, anat, header, samples)


def _sample(
    anat: Anatomy,
    layers: Sequence[int],
    rows: list[TokenRow],
    sums: MomentSums,
    ends: frozenset[int],
    generator: torch.Generator,
    length: int,
    device: torch.device,
) -> int:
    """One batch of samples; how many tokens were recorded."""
    batch = pad(rows, side="left", device=device)
    ids, mask, cache, before = batch.input_ids, batch.attention_mask, DynamicCache(), sums.tokens
    for step in range(length + 1):
        at = torch.arange(len(ids), device=device)
        view = TokenBatch(ids, mask, at * 0, at * 0)
        recorded = (lambda layer, k: sums.add(layer, k[:, -1])) if step else None
        logits = forward(
            anat,
            view,
            cache=cache,
            score=(at, at * 0 + ids.shape[1] - 1),
            keys=recorded,
            key_layers=tuple(layers),
        )
        sums.tokens += len(ids) if step else 0
        picks = torch.multinomial(logits.float().softmax(1).cpu(), 1, generator=generator)[:, 0]
        keep = torch.tensor([j for j, pick in enumerate(picks.tolist()) if pick not in ends], dtype=torch.long)
        if not len(keep):
            break
        if len(keep) < len(ids):
            cache.batch_select_indices(keep.to(device))
        ids = picks[keep][:, None].to(device)
        mask = torch.cat([mask[keep.to(device)], mask.new_ones(len(keep), 1)], dim=1)
    return sums.tokens - before
