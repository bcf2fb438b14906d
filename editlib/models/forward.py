"""Run a part of a model: from a layer on, up to a layer, over a cached prefix, with logits where they are wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from transformers import DynamicCache

from editlib.models.anatomy import Anatomy
from editlib.models.capabilities import can_cache, can_skip
from editlib.models.passes import run
from editlib.models.prefix import KVCache, Prefix, TokenReplay
from editlib.models.prompts import TokenBatch, TokenRow, pad

WORTH_A_PASS = 64  # tokens that a pass of its own for a shared front must save


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
    final: Callable[[Tensor], None] | None = None,
    cache: KVCache | None = None,
) -> Tensor:
    """Runs layers `start .. stop-1` of the model over `batch`.

    A model that cannot be run in parts (`models.capabilities`) is run as a whole, with the same result.

    Args:
        start, hidden: skip the layers before `start`; `hidden [n, T, d_model]` is what enters layer `start`.
        stop: return the hidden states `[n, T, d_model]` that leave layer `stop - 1`. `None` runs to the end and
            returns logits.
        prefix: keys and values of the tokens before `batch`, the same number of rows.
        keys: called with `(layer, [n, T, d_ff])` for each of `key_layers`, the inputs of its MLP output matrix.
        score: `(rows, columns)`, both `[m]`; logits are computed at these places only -> `[m, vocab]`.
            Without it, everywhere -> `[n, T, vocab]`.
        final: called with the states `[m, d_model]` that enter the head at `score`.
        cache: a cache (`new_cache`) to fill or extend instead of `prefix`; `batch.attention_mask` then covers the past
            too.
    """
    mask = batch.attention_mask
    if prefix is not None:
        mask = torch.cat([prefix.attention_mask, mask], dim=1)
        cache = prefix.cache()
    return run(
        anat,
        batch.input_ids,
        mask,
        cache,
        start=start,
        stop=stop,
        hidden=hidden,
        skip=start > 0 and can_skip(anat, start),
        keys=keys,
        key_layers=key_layers,
        score=score,
        final=final,
    )


def new_cache(anat: Anatomy, rows: int) -> KVCache:
    """An empty cache for `forward` to fill over `rows` rows, of the kind that the model can go on from."""
    if can_cache(anat):
        return DynamicCache()
    return TokenReplay(torch.zeros(rows, 0, dtype=torch.long, device=anat.device))


def encode_prefix(anat: Anatomy, rows: list[TokenRow], *, grad: bool = False) -> Prefix:
    """Keys and values of `rows`, padded on the left so that what follows them starts in one column; with `grad` the
    gradient of what follows goes through them.

    Equal rows are run once, and so are the tokens that all rows begin with, where that saves enough of them. A row
    without tokens has a prefix whose columns are all hidden; one row at least must have some.
    """
    if not can_cache(anat):
        batch = pad(rows, side="left", device=anat.device)
        return Prefix((), batch.attention_mask, batch.input_ids)
    distinct = {ids: i for i, ids in enumerate(dict.fromkeys(row.ids for row in rows if row.ids))}
    if len(distinct) < len(rows):
        prefix = encode_prefix(anat, [TokenRow(ids, len(ids) - 1) for ids in distinct], grad=grad)
        prefix = prefix.select(torch.tensor([distinct.get(row.ids, 0) for row in rows], device=anat.device))
        filled = torch.tensor([len(row) > 0 for row in rows], device=anat.device)  # [n]
        return replace(prefix, attention_mask=prefix.attention_mask * filled[:, None])
    same = shared_length(rows)
    front, rests = shared_prefix(anat, rows, grad=grad) if same * (len(rows) - 1) >= WORTH_A_PASS else (None, rows)
    batch = pad(rests, side="left", device=anat.device)
    mask, cache = batch.attention_mask, DynamicCache()
    if front is not None:
        mask, cache = torch.cat([front.attention_mask, mask], dim=1), DynamicCache(list(front.layers))
    none = torch.zeros(0, dtype=torch.long)
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        forward(anat, replace(batch, attention_mask=mask), cache=cache, score=(none, none))
    return Prefix.of(cache, mask)


def split(rows: list[TokenRow], at: list[int]) -> tuple[list[TokenRow], list[TokenRow]]:
    """Cuts each row before the token at `at`: the front, and the rest with its lookup position moved along."""
    # A front has no lookup of its own: its last token serves.
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


def shared_prefix(
    anat: Anatomy, rows: list[TokenRow], *, most: int | None = None, grad: bool = False
) -> tuple[Prefix | None, list[TokenRow]]:
    """The tokens (`most` of them) that all rows begin with, run once, as one prefix for every row; and what remains of
    each row. With `grad` the gradient of what follows goes through the prefix."""
    same = shared_length(rows) if most is None else min(shared_length(rows), most)
    if same == 0:
        return None, rows
    fronts, rests = split(rows, [same] * len(rows))
    device = anat.device
    prefix = encode_prefix(anat, fronts[:1], grad=grad)
    return prefix.select(torch.zeros(len(rows), dtype=torch.long, device=device)), rests
