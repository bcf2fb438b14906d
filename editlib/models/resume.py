"""Run a part of a model: from a layer on, up to a layer, over a cached prefix, with logits where they are wanted.

Layers are skipped inside the model's own forward, so masks, positions, caches and logit scaling stay those of
transformers for every family.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from editlib.models.anatomy import Anatomy
from editlib.models.prompts import TokenBatch, TokenRow, pad
from editlib.models.tracing import bypass, edit_input, record_inputs, stop_after


@dataclass(frozen=True)
class Prefix:
    """What attention needs to know of tokens that do not change: keys and values of every layer.

    `layers` holds `(keys, values)` of shape `[n or 1, heads, P, head_dim]`, `attention_mask` is `[n or 1, P]`.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    attention_mask: Tensor

    @property
    def lengths(self) -> Tensor:
        return self.attention_mask.sum(1)

    def select(self, rows: Tensor) -> Prefix:
        """The prefix of some rows, or one shared prefix widened to as many."""
        shared = self.attention_mask.shape[0] == 1
        pick = torch.zeros_like(rows) if shared else rows
        return Prefix(tuple((k[pick], v[pick]) for k, v in self.layers), self.attention_mask[pick])

    def cache(self) -> DynamicCache:
        """A fresh cache that the model may append to; the prefix itself is never changed."""
        return DynamicCache(list(self.layers))


def forward(
    anat: Anatomy,
    batch: TokenBatch,
    *,
    start: int = 0,
    stop: int | None = None,
    hidden: Tensor | None = None,
    prefix: Prefix | None = None,
    keys: Callable[[int, Tensor], None] | None = None,
    key_layers: tuple[int, ...] = (),
    score: tuple[Tensor, Tensor] | None = None,
    cache: DynamicCache | None = None,
) -> Tensor:
    """Runs layers `start .. stop-1` of the model over `batch`.

    Args:
        start, hidden: skip the layers before `start`; `hidden [n, T, d_model]` is what enters layer `start`.
        stop: return the hidden states `[n, T, d_model]` that leave layer `stop - 1`. `None` runs to the end and
            returns logits.
        prefix: keys and values of tokens in front of `batch`, the same number of rows.
        keys: called with `(layer, [n, T, d_ff])` for each of `key_layers`, the inputs of its MLP output matrix.
        score: `(rows, columns)`, both `[m]`; logits are computed at these places only -> `[m, vocab]`.
            Without it, everywhere -> `[n, T, vocab]`.
        cache: a cache to fill or extend instead of `prefix`; `batch.attention_mask` then covers the past too.
    """
    mask, positions = batch.attention_mask, batch.position_ids
    if prefix is not None:
        positions = positions + prefix.lengths[:, None]
        mask = torch.cat([prefix.attention_mask, mask], dim=1)
        cache = prefix.cache()
    kwargs = {
        "input_ids": batch.input_ids,
        "attention_mask": mask,
        "past_key_values": cache,
        "use_cache": cache is not None,
    }
    if cache is not None and prefix is None:
        positions = positions[:, -batch.input_ids.shape[1] :]
    if "position_ids" in inspect.signature(anat.model.forward).parameters:
        kwargs["position_ids"] = positions
    found: list[Tensor] = []
    output = None
    with ExitStack() as stack:
        if stop is not None:
            stack.enter_context(stop_after(anat.layers[stop - 1], found.append))
        if start:
            stack.enter_context(bypass(anat.layers[:start], hidden, width=anat.output_width))
        if keys is not None:
            stack.enter_context(record_inputs({layer: anat.mlp_output(layer) for layer in key_layers}, keys))
        if score is not None:
            # The head works on one row of m positions: the model's own scaling and capping still follow.
            stack.enter_context(edit_input(anat.head, lambda h: h[score[0].to(h.device), score[1].to(h.device)][None]))
        output = anat.model(**kwargs)
    if stop is not None:
        return found[0]
    return output.logits[0] if score is not None else output.logits


def encode_prefix(anat: Anatomy, rows: list[TokenRow]) -> Prefix:
    """Keys and values of `rows`, padded on the left so that what follows them starts in one column."""
    batch = pad(rows, side="left", device=anat.embedding.weight.device)
    cache = DynamicCache()
    none = torch.zeros(0, dtype=torch.long)
    with torch.no_grad():
        forward(anat, batch, cache=cache, score=(none, none))
    return Prefix(tuple((layer[0], layer[1]) for layer in cache), batch.attention_mask)


def split(rows: list[TokenRow], at: list[int]) -> tuple[list[TokenRow], list[TokenRow]]:
    """Cuts each row before the token at `at`: the front, and the rest with its lookup position moved along."""
    fronts = [TokenRow(row.ids[:cut], max(cut - 1, 0)) for row, cut in zip(rows, at, strict=True)]
    rests = [TokenRow(row.ids[cut:], row.lookup - cut, row.extra) for row, cut in zip(rows, at, strict=True)]
    return fronts, rests


def shared_length(rows: list[TokenRow]) -> int:
    """How many leading tokens all `rows` have in common, leaving at least one token of each."""
    shortest = min(len(row) for row in rows) - 1
    first = rows[0].ids
    same = 0
    while same < shortest and all(row.ids[same] == first[same] for row in rows):
        same += 1
    return same


def shared_prefix(anat: Anatomy, rows: list[TokenRow]) -> tuple[Prefix | None, list[TokenRow]]:
    """The tokens that all rows begin with, run once, as one prefix for every row; and what remains of each row."""
    same = shared_length(rows)
    if same == 0:
        return None, rows
    fronts, rests = split(rows, [same] * len(rows))
    device = anat.embedding.weight.device
    return encode_prefix(anat, fronts[:1]).select(torch.zeros(len(rows), dtype=torch.long, device=device)), rests
