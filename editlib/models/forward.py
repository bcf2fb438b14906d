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

WORTH_A_PASS = 64  # tokens that a separate pass over a shared prefix must save


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
        start, hidden: skip the layers before `start`; `hidden [n, T, d_model]` enters layer `start`.
        stop: return the hidden states `[n, T, d_model]` that leave layer `stop - 1`. `None` runs to the end and
            returns logits.
        prefix: keys and values of the tokens before `batch`, the same number of rows.
        keys: called for each of `key_layers` with `(layer, [n, T, d_ff])`, the inputs of its MLP output matrix.
        score: `(rows, columns)`, both `[m]`; logits are computed at these places only -> `[m, vocab]`.
            Without it, everywhere -> `[n, T, vocab]`.
        final: called with the states `[m, d_model]` that enter the head at `score`.
        cache: a cache (`new_cache`) to fill or extend instead of `prefix`; `batch.attention_mask` then covers the past
            too.
    """
    mask = batch.attention_mask
    if prefix is not None:
        mask = torch.cat([prefix.attention_mask, mask], dim=1)  # [n, P + T]
        cache = prefix.cache()  # a pass extends its cache, and the prefix must not change
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
    """Makes an empty cache for `forward` to fill over `rows` rows, of a kind from which the model can continue."""
    if can_cache(anat):
        return DynamicCache()
    return TokenReplay(torch.zeros(rows, 0, dtype=torch.long, device=anat.device))


def encode_prefix(anat: Anatomy, rows: list[TokenRow], *, grad: bool = False) -> Prefix:
    """Computes keys and values of `rows`; with `grad` the gradient of later tokens flows through them.

    The rows are padded on the left, so that the tokens after them start in one column. Equal rows are run once, and so
    are the tokens that all rows begin with, if there are enough of them. A row without tokens has a prefix whose
    columns are all hidden; at least one row must have tokens.
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
    none = torch.zeros(0, dtype=torch.long)  # no logits: the head is the widest matrix, and they are not needed
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        forward(anat, replace(batch, attention_mask=mask), cache=cache, score=(none, none))
    return Prefix.of(cache, mask)


def split(rows: list[TokenRow], at: list[int]) -> tuple[list[TokenRow], list[TokenRow]]:
    """Splits each row before the token at `at`; the lookup position of the rest is shifted accordingly."""
    # A front has no lookup position: its last token takes the place.
    fronts = [TokenRow(row.ids[:cut], max(cut - 1, 0)) for row, cut in zip(rows, at, strict=True)]
    rests = [TokenRow(row.ids[cut:], row.lookup - cut, row.extra) for row, cut in zip(rows, at, strict=True)]
    return fronts, rests


def shared_length(rows: list[TokenRow]) -> int:
    """Counts the leading tokens that all `rows` have in common, leaving at least one token of each."""
    shortest = min(len(row) for row in rows) - 1  # a pass over no tokens gives no logits
    first = rows[0].ids
    same = 0
    while same < shortest and all(row.ids[same] == first[same] for row in rows):
        same += 1
    return same


def shared_prefix(
    anat: Anatomy, rows: list[TokenRow], *, most: int | None = None, grad: bool = False
) -> tuple[Prefix | None, list[TokenRow]]:
    """Runs the tokens that all rows begin with once, at most `most` of them.

    With `grad` the gradient of later tokens flows through the prefix.

    Returns:
        The prefix, repeated for every row (`None` if the rows share no token), and what remains of each row.
    """
    same = shared_length(rows) if most is None else min(shared_length(rows), most)
    if same == 0:
        return None, rows
    fronts, rests = split(rows, [same] * len(rows))
    device = anat.device
    prefix = encode_prefix(anat, fronts[:1], grad=grad)  # one row: [1, heads, P, head_dim] in each layer
    return prefix.select(torch.zeros(len(rows), dtype=torch.long, device=device)), rests
