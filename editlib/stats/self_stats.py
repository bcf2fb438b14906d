"""Compute statistics without a corpus: the model generates text, and its keys are recorded meanwhile."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedTokenizerBase

from editlib.distributed import ALONE, Process
from editlib.errors import StatsError
from editlib.models.anatomy import Anatomy
from editlib.models.forward import forward
from editlib.models.freezing import no_param_grad
from editlib.models.generation import end_tokens
from editlib.models.placement import input_device
from editlib.models.positions import check_prompts, positions_of
from editlib.models.prompt_settings import PromptSettings
from editlib.models.prompts import PromptFormat, TokenBatch, TokenRow, pad
from editlib.stats.file import LayerStats, StatsHeader
from editlib.stats.moments import MomentCheckpoint, MomentSums, finish, held_interrupts

log = logging.getLogger(__name__)

MUTE_BATCHES = 8
BATCH_TOKENS = 32_768  # of a batch, prompts and samples: long prompts make it fewer rows


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
    shard: Process = ALONE,
    how: PromptSettings | None = None,
) -> dict[int, LayerStats]:
    """Samples answers to `prompts` at temperature 1 and sums the keys of every sampled token, in the same passes.

    Every batch has its own seed, so the text depends neither on interruptions nor on the number of processes.

    Args:
        prompts: questions and instructions, asked through the chat template if there is one, otherwise as plain text.
        batch_rows: samples per batch; fewer if the prompts are long (see `BATCH_TOKENS`).
        length: most tokens of a sample, limited by the model's positions; a sample that ends earlier leaves the batch.
        header: `seed` and `corpus` are filled in here.
        checkpoint: as in `layer_stats`.
        how: how questions are asked; part of the recorded hash of the text.

    Raises:
        RequestError: a prompt that leaves no position for an answer.
        StatsError: a checkpoint of another job; a model that generates nothing.
    """
    form = PromptFormat.of(tok, how)
    check_prompts(anat.model, form, zip(prompts, prompts, strict=True), answer_tokens=1)
    asked = [form.encode(prompt) for prompt in prompts]
    longest = max(map(len, asked))
    length = min(length, (positions_of(anat.model) or longest + length) - longest)
    batch_rows = max(1, min(batch_rows, BATCH_TOKENS // (longest + length)))
    header = replace(header, corpus="self", corpus_sha256=_hash_of(prompts, how), seed=seed)
    sums = MomentSums(layers, anat.d_ff)
    job = {"tokens": tokens, "batch_rows": batch_rows, "length": length, "rank": shard.rank, "world": shard.world}
    place = None if checkpoint is None else shard.own(checkpoint)
    keeper = MomentCheckpoint(place, header, sums, job=job, seconds=checkpoint_seconds)
    number, done = _resume(keeper, sums, shard)
    with (
        no_param_grad(anat.model),
        torch.no_grad(),
        held_interrupts() as stop,
        tqdm(total=tokens, initial=done, desc="statistics (self)", unit="tok", disable=not progress) as bar,
    ):
        while done < tokens:
            # As long as no batch can be the last one, each process samples its own; then they take turns, since how
            # far a batch may go depends on all before it.
            at_once = shard.world if tokens - done > shard.world * batch_rows * length else 1
            before = sums.tokens
            mine = number + (shard.rank - number) % shard.world
            if mine < number + at_once:
                _sample(anat, asked, batch_rows, sums, seed * 1_000_003 + mine, min(length, tokens - done))
            number += at_once
            reports = shard.gather((sums.tokens - before, stop(), keeper.due))
            done += sum(counted for counted, _, _ in reports)
            if not done and number >= MUTE_BATCHES:
                raise StatsError(
                    f"{header.model} ended {number * batch_rows} answers before their first token; give --corpus a file"
                )
            bar.update(done - bar.n)
            stopped = any(pressed for _, pressed, _ in reports)
            if stopped or any(due for _, _, due in reports):  # all at the same batch, so that the checkpoints agree
                keeper.save(number, number * batch_rows)
            if stopped:
                raise KeyboardInterrupt
    sums.add_up(shard)
    return finish(sums, anat, header, number * batch_rows)


def _hash_of(prompts: Sequence[str], how: PromptSettings | None) -> str:
    """Hashes the prompts, and the prompt settings if they were given."""
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    return digest if how is None else how.key(digest)


def _resume(keeper: MomentCheckpoint, sums: MomentSums, shard: Process) -> tuple[int, int]:
    """Returns (next batch, tokens so far of all processes); starts over unless all stopped at the same batch."""
    with shard.together():
        number, _ = keeper.resume()
    numbers = shard.gather(number)
    if len(set(numbers)) > 1:
        if shard.first:
            log.warning("the processes' checkpoints stop at different batches: starting from the beginning")
        sums.clear()
        return 0, 0
    return number, sum(shard.gather(sums.tokens))


def _sample(anat: Anatomy, asked: Sequence[TokenRow], count: int, sums: MomentSums, seed: int, length: int) -> None:
    """Samples answers to `count` of the prompts, drawn with `seed`, and records their keys during generation."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(asked), (count,), generator=generator).tolist()
    ends, device = end_tokens(anat), input_device(anat.model)
    batch = pad([asked[i] for i in drawn], side="left", device=device)
    ids, mask, cache = batch.input_ids, batch.attention_mask, DynamicCache()
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
            key_layers=tuple(sums.sums),
        )
        sums.tokens += len(ids) if step else 0
        picks = torch.multinomial(logits.float().softmax(1).cpu(), 1, generator=generator)[:, 0]
        keep = torch.tensor([j for j, pick in enumerate(picks.tolist()) if pick not in ends], dtype=torch.long)
        if not len(keep):
            break
        if len(keep) < len(ids):
            cache.batch_select_indices(keep)  # on the CPU: the layers of a split model lie on several devices
        ids = picks[keep][:, None].to(device)
        mask = torch.cat([mask[keep.to(device)], mask.new_ones(len(keep), 1)], dim=1)
    sums.flush()
