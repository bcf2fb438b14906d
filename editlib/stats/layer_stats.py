"""Compute second moments of MLP keys over a corpus: one pass for all layers, shared by processes, resumable."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from editlib.distributed import ALONE, Process
from editlib.errors import StatsError
from editlib.models.anatomy import Anatomy
from editlib.models.forward import forward
from editlib.models.freezing import no_param_grad
from editlib.models.placement import input_device
from editlib.models.prompts import TokenBatch, TokenRow, pad, token_windows
from editlib.stats.file import LayerStats, StatsHeader
from editlib.stats.moments import MomentCheckpoint, MomentSums, finish, held_interrupts

log = logging.getLogger(__name__)

Window = tuple[int, list[int]]
"""`(document number, token ids)`."""


def document_windows(tok: PreTrainedTokenizerBase, documents: Iterable[str], max_length: int) -> Iterator[Window]:
    """Yields `(document number, token ids)` for every window of at most `max_length` tokens of every document."""
    for number, text in enumerate(documents):
        for ids in token_windows(tok, text, max_length):
            yield number, ids


def counted_windows(windows: Iterable[Window], tokens: int, skip_first: int) -> Iterator[Window]:
    """Yields windows whose tokens after the first `skip_first` add up to `tokens`, the last one cut to fit.

    No further windows are drawn, so a streamed corpus may be endless.
    """
    for number, ids in windows:
        ids = ids[: tokens + skip_first]
        if len(ids) > skip_first:
            yield number, ids
            tokens -= len(ids) - skip_first
        if tokens <= 0:
            return


def batches(windows: Iterable[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Yields windows in order, in batches of at most `batch_tokens` tokens with padding, but at least one window."""
    group: list[Window] = []
    width = 0
    for window in windows:
        wider = max(width, len(window[1]))
        if group and wider * (len(group) + 1) > batch_tokens:
            yield group
            group, wider = [], len(window[1])
        group.append(window)
        width = wider
    if group:
        yield group


def layer_stats(
    anat: Anatomy,
    tok: PreTrainedTokenizerBase,
    layers: Sequence[int],
    documents: Iterable[str],
    *,
    tokens: int,
    header: StatsHeader,
    checkpoint: Path | None = None,
    max_length: int = 512,
    batch_tokens: int = 4096,
    skip_first: int = 1,
    checkpoint_seconds: float = 30.0,
    progress: bool = True,
    shard: Process = ALONE,
) -> dict[int, LayerStats]:
    """Collects second moments of `layers` in one forward pass over `documents`, stopped after the last layer.

    Several processes share the batches of one list and add up their sums: the batches, and up to fp64 rounding the
    result, are those of a single process.

    Args:
        tokens: stop after this many counted tokens.
        skip_first: leave out this many tokens at the start of each window; the first token of a text has keys up to
            10^4 times larger than the rest and would dominate the sum. 0 counts them, as ROME and MEMIT do.
        checkpoint: a file for the sums while the pass runs, also after Ctrl-C; an existing one is resumed. Each of
            several processes has its own. Remove it (`drop_checkpoint`) once the result is saved.
        max_length, batch_tokens: most tokens of a window and of a padded batch, independent of the model's own maximum;
            a window longer than `batch_tokens` is a batch by itself.

    Raises:
        StatsError: a checkpoint of another job; no token to count.
    """
    anat.check_layers(list(layers))
    sums = MomentSums(layers, anat.d_ff)
    job = {"tokens": tokens, "batch_tokens": batch_tokens, "rank": shard.rank, "world": shard.world}
    place = None if checkpoint is None else shard.own(checkpoint)
    keeper = MomentCheckpoint(place, header, sums, job=job, seconds=checkpoint_seconds)
    windows = counted_windows(document_windows(tok, documents, max_length), tokens, skip_first) if tokens else ()
    device = input_device(anat.model)
    with shard.together():
        at, used = keeper.resume()
        with (
            held_interrupts() as stop,
            tqdm(
                total=tokens // shard.world,
                initial=sums.tokens,
                desc=shard.label("statistics"),
                unit="tok",
                disable=not progress,
            ) as bar,
        ):
            for group in islice(shard.share(batches(windows, batch_tokens)), at, None):
                batch = pad([TokenRow(tuple(ids), 0) for _, ids in group], device=device)
                bar.update(record_moments(anat, batch, layers, sums, skip_first))
                at, used = at + 1, group[-1][0] + 1
                if stop() or keeper.due:
                    keeper.save(at, used)
                if stop():
                    break
    sums.add_up(shard)
    if not sums.tokens:
        raise StatsError(f"corpus {header.corpus} gave no token to count; give a longer text")
    if sums.tokens < tokens and shard.first:
        log.warning("corpus %s has only %d of the %d requested tokens", header.corpus, sums.tokens, tokens)
    return finish(sums, anat, header, max(shard.gather(used)))


def record_moments(anat: Anatomy, batch: TokenBatch, layers: Sequence[int], sums: MomentSums, skip_first: int) -> int:
    """Adds the keys of every real token of `batch` after the first `skip_first` to `sums`; returns their number."""
    counted = batch.attention_mask.bool() & (batch.position_ids >= skip_first)  # [n, T]
    # Padding is on one side only, so the counted positions of a row are contiguous: a view, without a copy.
    pieces = [(row, int(c.int().argmax()), int(c.sum())) for row, c in enumerate(counted)]

    def add(layer: int, k: Tensor) -> None:
        for row, first, number in pieces:
            sums.add(layer, k[row, first : first + number])
        sums.flush(layer)  # so that only one layer's keys are held at a time

    with no_param_grad(anat.model), torch.no_grad():
        forward(anat, batch, stop=max(layers) + 1, keys=add, key_layers=tuple(layers))
    tokens = sum(number for *_, number in pieces)
    sums.tokens += tokens
    return tokens
