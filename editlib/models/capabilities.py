"""Can a part of this model be run alone? Found out by trying it on a few tokens, once for each `Anatomy`.

A model cannot be resumed at a layer that reads more of the layers before it than the residual stream (shared keys and
values, a state handed on), nor continued from keys and values where layers keep something else (convolutions,
recurrence). Such models get the slow way, never a wrong result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache

from editlib.models.anatomy import Anatomy
from editlib.models.freezing import frozen
from editlib.models.passes import run
from editlib.models.prefix import Prefix
from editlib.models.tracing import edit_hidden, unwatched

log = logging.getLogger(__name__)

LENGTH = 6


def can_skip(anat: Anatomy, start: int) -> bool:
    """Whether the layers before `start` may be left out when what enters layer `start` is known."""
    return _verdict(
        anat,
        f"layer {start}",
        lambda: _skips(anat, start),
        f"a pass cannot be resumed at layer {start} (layers behind it read more than the hidden states); the layers "
        "before are run every time, which is slower",
    )


def can_cache(anat: Anatomy) -> bool:
    """Whether the model goes on from the keys and values of earlier tokens."""
    return _verdict(
        anat,
        "cache",
        lambda: _caches(anat),
        "it cannot go on from cached keys and values alone; earlier tokens are run every time, which is slower",
    )


def _verdict(anat: Anatomy, name: str, attempt: Callable[[], bool], refusal: str) -> bool:
    if name not in anat.tried:
        with unwatched(anat.model), frozen(anat.model), torch.no_grad():
            try:
                anat.tried[name] = attempt()
            except Exception as error:  # whatever a model's own code raises when a part of it is missing
                log.debug("%s: %s", name, error)
                anat.tried[name] = False
        kind = "told cache" if name == "cache" else "told layer"
        if not anat.tried[name] and not anat.tried.get(kind):
            anat.tried[kind] = True
            log.warning("%s: %s", type(anat.model).__name__, refusal)
    return anat.tried[name]


def _tokens(anat: Anatomy, first: int) -> tuple[Tensor, Tensor]:
    """One row of `LENGTH` different tokens and its mask."""
    ids = (first + 7 * torch.arange(LENGTH, device=anat.device)) % anat.embedding.weight.shape[0]
    return ids[None], torch.ones_like(ids)[None]


def _skips(anat: Anatomy, start: int) -> bool:
    ids, mask = _tokens(anat, 3)
    entered: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        entered.append(hidden)
        return hidden

    with edit_hidden(anat.layers[start - 1], keep):
        wanted = run(anat, ids, mask)
    run(anat, *_tokens(anat, 5), stop=start)  # what these layers keep to themselves now belongs to other tokens
    got = run(anat, ids, mask, start=start, hidden=entered[0])
    # The same operations on the same numbers: hardly any difference is due to rounding.
    return _distance(got, wanted) < max(1e-4, 2 * torch.finfo(got.dtype).eps)


def _caches(anat: Anatomy) -> bool:
    ids, mask = _tokens(anat, 3)
    half = LENGTH // 2
    wanted = run(anat, ids, mask)
    cache = DynamicCache()
    run(anat, ids[:, :half], mask[:, :half], cache)
    prefix = Prefix.of(cache, mask[:, :half])
    if not prefix.layers or any(x.dim() != 4 or x.shape[2] != half for pair in prefix.layers for x in pair):
        return False
    run(anat, *_tokens(anat, 5))
    got = run(anat, ids[:, half:], mask, prefix.cache())
    # Sums run in another order here, so that half precision alone makes a difference of some percent.
    return _distance(got, wanted[:, half:]) < max(1e-3, 32 * torch.finfo(got.dtype).eps)


def _distance(one: Tensor, other: Tensor) -> float:
    """`|one - other| / |other|`; where both are the same infinity (a masked vocabulary) there is no difference."""
    one, other = one.cpu().double(), other.cpu().double()
    same = one == other
    apart = torch.where(same, 0.0, one - other).norm()
    return float(apart / torch.where(other.isfinite(), other, 0.0).norm().clamp_min(torch.finfo(torch.float32).tiny))
