"""Second moments of MLP keys over a corpus: one pass for all layers, interrupted and resumed at will."""

from __future__ import annotations

import json
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from einops import einsum
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from editlib.errors import StatsError
from editlib.models.anatomy import Anatomy
from editlib.models.files import atomic_path
from editlib.models.freezing import frozen
from editlib.models.prompts import TokenBatch, TokenRow, pad
from editlib.models.resume import forward
from editlib.stats_store import LayerStats, StatsHeader


class MomentSums:
    """Running sums of `k k^T` for several layers, in fp32 blocks added up in fp64.

    Keys are collected until a block is full, so that the product is one large matrix multiplication a layer.
    """

    def __init__(self, layers: Sequence[int], d_ff: int, *, block: int = 4096) -> None:
        self.sums = {layer: torch.zeros(d_ff, d_ff, dtype=torch.float64) for layer in layers}
        self.tokens = 0
        self._block = block
        self._waiting: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def add(self, layer: int, keys: Tensor) -> None:
        """Adds `keys [tokens, d_ff]` of one layer."""
        self._waiting[layer].append(keys.to(torch.float32))
        if sum(len(k) for k in self._waiting[layer]) >= self._block:
            self._flush(layer)

    def _flush(self, layer: int) -> None:
        if self._waiting[layer]:
            keys = torch.cat(self._waiting[layer])
            self.sums[layer] += einsum(keys, keys, "token i, token j -> i j").to(self.sums[layer])
            self._waiting[layer] = []

    def flush(self) -> None:
        """Adds everything that still waits."""
        for layer in self._waiting:
            self._flush(layer)


def token_windows(
    tok: PreTrainedTokenizerBase, documents: Iterable[str], max_length: int
) -> Iterator[tuple[int, list[int]]]:
    """`(document number, token ids)` for every window of at most `max_length` tokens of every document."""
    for number, text in enumerate(documents):
        ids = tok(text, add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
        for start in range(0, len(ids), max_length):
            if len(ids) - start > 1:
                yield number, ids[start : start + max_length]


def layer_stats(
    anat: Anatomy,
    tok: PreTrainedTokenizerBase,
    layers: Sequence[int],
    documents: Sequence[str],
    *,
    tokens: int,
    header: StatsHeader,
    checkpoint: Path | None = None,
    max_length: int = 512,
    batch_tokens: int = 4096,
    skip_first: int = 1,
    checkpoint_seconds: float = 30.0,
    progress: bool = True,
) -> dict[int, LayerStats]:
    """One forward pass over `documents` for all `layers`, stopped behind the last one.

    Args:
        tokens: stop after this many counted tokens.
        skip_first: leave out this many tokens at the start of each window; the first token of a text carries keys
            up to 10^4 times larger than the rest and would swamp the sum. 0 counts them, as ROME and MEMIT do.
        checkpoint: a file that keeps the sums while the pass runs; found again, it is continued.
        max_length, batch_tokens: tokens a window and a batch may hold, whatever the model's own maximum.

    Raises:
        StatsError: a checkpoint of another job; no token to count.
    """
    anat.check_layers(list(layers))
    windows = list(token_windows(tok, documents, max_length)) if tokens else []
    sums = MomentSums(layers, anat.d_ff)
    at, used_documents = continue_from(checkpoint, header, sums)
    saved = time.monotonic()
    device = anat.embedding.weight.device
    with tqdm(total=tokens, initial=sums.tokens, desc="statistics", unit="tok", disable=not progress) as bar:
        while sums.tokens < tokens and at < len(windows):
            group, at = _next_batch(windows, at, batch_tokens, tokens - sums.tokens, skip_first)
            batch = pad([TokenRow(tuple(ids), 0) for _, ids in group], device=device)
            counted = record_moments(anat, batch, layers, sums, skip_first)
            used_documents = group[-1][0] + 1
            bar.update(counted)
            if checkpoint is not None and time.monotonic() - saved > checkpoint_seconds:
                save_checkpoint(checkpoint, header, sums, at, used_documents)
                saved = time.monotonic()
    sums.flush()
    if not sums.tokens:
        raise StatsError(f"corpus {header.corpus} gave no token to count; give a longer text")
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return finish(sums, anat, header, used_documents)


def record_moments(anat: Anatomy, batch: TokenBatch, layers: Sequence[int], sums: MomentSums, skip_first: int) -> int:
    """Adds the keys of every real token of `batch` behind the first `skip_first` to `sums`; how many there were."""
    counted = batch.attention_mask.bool() & (batch.position_ids >= skip_first)
    with frozen(anat.model), torch.no_grad():
        forward(
            anat,
            batch,
            stop=max(layers) + 1,
            keys=lambda layer, k: sums.add(layer, k[counted]),
            key_layers=tuple(layers),
        )
    sums.tokens += int(counted.sum())
    return int(counted.sum())


def finish(sums: MomentSums, anat: Anatomy, header: StatsHeader, documents: int) -> dict[int, LayerStats]:
    """Turns running sums into one `LayerStats` a layer, each with its own header."""
    done = {}
    for layer, total in sums.sums.items():
        own = {
            **asdict(header),
            "module": anat.mlp_output_names[layer],
            "tokens": sums.tokens,
            "documents": documents,
        }
        done[layer] = LayerStats(total.to(torch.float32), sums.tokens, documents, StatsHeader(**own))
    return done


def _next_batch(
    windows: list[tuple[int, list[int]]], at: int, batch_tokens: int, left: int, skip_first: int
) -> tuple[list[tuple[int, list[int]]], int]:
    """The next windows that fit a batch; the last one is cut so that exactly `left` tokens are counted."""
    group: list[tuple[int, list[int]]] = []
    width = 0
    while at < len(windows) and left > 0:
        number, ids = windows[at]
        width = max(width, len(ids))
        if group and width * (len(group) + 1) > batch_tokens:
            break
        ids = ids[: left + skip_first]
        group.append((number, ids))
        left -= max(len(ids) - skip_first, 0)
        at += 1
    return group, at


def save_checkpoint(path: Path, header: StatsHeader, sums: MomentSums, at: int, documents: int) -> None:
    """Writes the sums so far; `at` is the next window or batch."""
    sums.flush()
    arrays = {f"sum.{layer}": total.numpy() for layer, total in sums.sums.items()}
    state = {"header": asdict(header), "window": at, "tokens": sums.tokens, "documents": documents}
    with atomic_path(path) as temporary, temporary.open("wb") as out:
        np.savez(out, state=np.array(json.dumps(state)), **arrays)


def continue_from(path: Path | None, header: StatsHeader, sums: MomentSums) -> tuple[int, int]:
    """Fills `sums` from a checkpoint of the same job; (next window, documents begun)."""
    if path is None or not path.exists():
        return 0, 0
    try:
        with np.load(path, allow_pickle=False) as found:
            state = json.loads(str(found["state"]))
            same = state["header"] == asdict(header) and {f"sum.{layer}" for layer in sums.sums} | {"state"} == set(
                found.files
            )
            if same:
                totals = {layer: torch.from_numpy(found[f"sum.{layer}"]) for layer in sums.sums}
                if any(totals[layer].shape != total.shape for layer, total in sums.sums.items()):
                    return 0, 0
                place = int(state["tokens"]), int(state["window"]), int(state["documents"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zlib.error, zipfile.BadZipFile):
        return 0, 0  # a damaged checkpoint costs time, never correctness
    if not same:
        raise StatsError(f"{path} is the checkpoint of another job (other model, corpus, layers or options); remove it")
    sums.sums.update(totals)
    sums.tokens = place[0]
    return place[1:]
