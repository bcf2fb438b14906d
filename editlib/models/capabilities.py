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
from editlib.models.freezing import no_param_grad
from editlib.models.passes import run
from editlib.models.prefix import Prefix
from editlib.models.tracing import edit_hidden, unwatched

log = logging.getLogger(__name__)

LENGTH = 6


def can_skip(anat: Anatomy, start: int) -> bool:
    """Whether the layers before `start` may be left out when what enters layer `start` is known."""
    resumes = anat.probe_cache.resumes
    if start not in resumes:
        warned = not all(resumes.values())  # once is enough, whichever layer it was
        resumes[start] = _probe(anat, lambda: _skips(anat, start))
        if not resumes[start] and not warned:
            log.warning(
                "%s: a pass cannot be resumed at layer %d (later layers read more than the hidden states); the layers "
                "before it are run every time, which is slower",
                type(anat.model).__name__,
                start,
            )
    return resumes[start]


def can_cache(anat: Anatomy) -> bool:
    """Whether the model goes on from the keys and values of earlier tokens."""
    if anat.probe_cache.caches is None:
        anat.probe_cache.caches = _probe(anat, lambda: _caches(anat))
        if not anat.probe_cache.caches:
            log.warning(
                "%s: it cannot go on from cached keys and values alone; earlier tokens are run every time, which is "
                "slower",
                type(anat.model).__name__,
            )
    return anat.probe_cache.caches


def _probe(anat: Anatomy, attempt: Callable[[], bool]) -> bool:
    """The result of `attempt`, run without gradients and unseen by anyone's hooks; False where it raises."""
    with unwatched(anat.model), no_param_grad(anat.model), torch.no_grad():
        try:
            return attempt()
        except Exception as error:  # whatever a model's own code raises when a part of it is missing
            log.debug("%s: %s", type(anat.model).__name__, error)
            return False


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
