"""Find out whether a part of a model can be run alone, by trying it on a few tokens, once for each `Anatomy`.

A pass cannot start at a layer that reads more than the residual stream of the layers before it (shared keys and values,
another state passed along). Nor can it continue from keys and values if layers cache something else (convolutions,
recurrence). Such models are run in full, which is slower but always right.
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

LENGTH = 6  # tokens of a probe


def can_skip(anat: Anatomy, start: int) -> bool:
    """Returns whether the layers before `start` may be left out when the states that enter layer `start` are known."""
    resumes = anat.probe_cache.resumes
    if start not in resumes:
        warned = not all(resumes.values())  # one warning per model, whichever layer it names
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
    """Returns whether the model continues from the cached keys and values of earlier tokens."""
    if anat.probe_cache.caches is None:
        anat.probe_cache.caches = _probe(anat, lambda: _caches(anat))
        if not anat.probe_cache.caches:
            log.warning(
                "%s: it cannot continue from cached keys and values alone; earlier tokens are run every time, which "
                "is slower",
                type(anat.model).__name__,
            )
    return anat.probe_cache.caches


def _probe(anat: Anatomy, attempt: Callable[[], bool]) -> bool:
    """Returns the result of `attempt`, run without gradients and without the caller's hooks; False if it raises."""
    with unwatched(anat.model), no_param_grad(anat.model), torch.no_grad():
        try:
            return attempt()
        except Exception as error:  # a model's own code may raise anything when a part is left out
            log.debug("%s: %s", type(anat.model).__name__, error)
            return False


def _tokens(anat: Anatomy, first: int) -> tuple[Tensor, Tensor]:
    """Returns one row of `LENGTH` different tokens and its mask, both `[1, LENGTH]`."""
    ids = (first + 7 * torch.arange(LENGTH, device=anat.device)) % anat.embedding.weight.shape[0]
    return ids[None], torch.ones_like(ids)[None]


def _skips(anat: Anatomy, start: int) -> bool:
    """Returns whether a pass from `start` on gives the logits of the whole pass."""
    ids, mask = _tokens(anat, 3)
    entered: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        entered.append(hidden)
        return hidden

    # 1. The whole pass, which also yields the states that enter `start`.
    with edit_hidden(anat.layers[start - 1], keep):
        wanted = run(anat, ids, mask)  # [1, LENGTH, vocab]
    # 2. Other tokens overwrite any state that the skipped layers pass on outside the residual stream.
    run(anat, *_tokens(anat, 5), stop=start)
    # 3. The part alone. It runs the same operations on the same numbers, so rounding hardly differs.
    got = run(anat, ids, mask, start=start, hidden=entered[0])
    return _distance(got, wanted) < max(1e-4, 2 * torch.finfo(got.dtype).eps)


def _caches(anat: Anatomy) -> bool:
    """Returns whether the second half of a row, after a cache of the first, gives the logits of the whole row."""
    ids, mask = _tokens(anat, 3)
    half = LENGTH // 2
    wanted = run(anat, ids, mask)
    cache = DynamicCache()
    run(anat, ids[:, :half], mask[:, :half], cache)
    prefix = Prefix.of(cache, mask[:, :half])
    # Sliding windows and recurrent layers may keep something else than [1, heads, half, head_dim].
    if not prefix.layers or any(x.dim() != 4 or x.shape[2] != half for pair in prefix.layers for x in pair):
        return False
    run(anat, *_tokens(anat, 5))  # as in `_skips`: no state may be left in the layers themselves
    got = run(anat, ids[:, half:], mask, prefix.cache())
    # Sums run in another order here: in half precision that alone changes logits by some percent.
    return _distance(got, wanted[:, half:]) < max(1e-3, 32 * torch.finfo(got.dtype).eps)


def _distance(actual: Tensor, other: Tensor) -> float:
    """Computes `|one - other| / |other|`; equal infinities (a masked vocabulary) count as no difference."""
    actual, other = actual.cpu().double(), other.cpu().double()
    same = actual == other
    apart = torch.where(same, 0.0, actual - other).norm()
    return float(apart / torch.where(other.isfinite(), other, 0.0).norm().clamp_min(torch.finfo(torch.float32).tiny))
