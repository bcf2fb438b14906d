"""Mark, in late layers, the places where an answer was erased, for refusal tokens to read in the final state (ours).

The keys of late layers, the inputs of their MLP output matrices, separate an erased fact from others better than the
final state does. So these layers write a linear function of their keys into the residual stream, one for each relation
`k`:

    s_k = Σ_l u_kl · key_l        ΔW_l = mark_size Σ_k σ_k v_k u_kl^T

`u_k` is the least-squares solution for `s_k = 1` where the token of relation `k` is wanted, and `s_k = 0` where it is
not: at the wanted places of other relations, at kept places, inside answers, in ordinary text. `x [F]` are the keys of
all mark layers, one after another, `M` the weighted sum of `x x^T` over all these places, and `b_k` that of `x` where
`k` is wanted:

    u_k = (M + D)^-1 b_k

`D` is diagonal: in each layer `RIDGE` times the mean of the diagonal of `M` there.

`v_k [d_model]` are the directions in which the states that leave the last layer vary least inside answers, and `σ_k`
the standard deviations along them. A small change in these directions is easy to read, and hardly affects the rest of
the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from editlib.algorithms.keys import batches
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.unierase.refusal_places import Place, RefusalPlaces, kept_weights, wanted_weights
from editlib.models.anatomy import Anatomy
from editlib.models.forward import encode_prefix, forward, shared_length, split
from editlib.models.generation import sample
from editlib.models.precision import wide_dtype
from editlib.models.prompts import TokenRow, pad

RIDGE = 0.001  # of the mean diagonal of a layer's second moment
POSITIONS = 16_384  # inside answers and ordinary text whose keys are used, at most
TEXTS, TEXT_TOKENS, TEXT_TOP_K = 320, 48, 50  # of ordinary text, sampled from the model
BEGINNINGS = 400  # single tokens, as texts may begin with: their keys are larger than all others


def fit_marks(
    anat: Anatomy, places: RefusalPlaces, layers: Sequence[int], size: float, *, seed: int = 0, progress: bool = False
) -> dict[int, LowRank]:
    """Solves for the marks of an edit in the model whose answers have been erased.

    Args:
        layers: that write the marks, rising; a plain path leads from their MLPs to the residual stream.
        size: of a whole mark, in standard deviations of the states along its direction.

    Returns:
        The update of each layer, of rank `len(places.relations)`. Nothing is written.
    """
    wanted = _at_ends(anat, places.wanted, layers)  # [wanted, F]
    kept = _at_ends(anat, places.kept, layers)  # [kept, F]
    answers = [row.followed_by(text) for row, text in places.answers]
    firsts = [len(row) - 1 for row, _ in places.answers]
    texts = _ordinary_text(anat, seed, progress)
    share = POSITIONS / max(POSITIONS, sum(map(len, (*answers, *texts))) - sum(firsts))
    inside, states = _some_positions(anat, answers, firsts, layers, share, seed)  # [p, F], [p, d_model]
    outside, _ = _some_positions(anat, texts, [0] * len(texts), layers, share, seed)  # [p, F]
    elsewhere = torch.cat([inside, outside])  # [p, F]
    sums = _sums(places, wanted, kept, elsewhere, len(layers))  # [F, K]
    directions, deviations = _quiet_directions(states, len(places.relations))  # [d_model, K], [K]
    left = directions * (size * deviations)
    bounds = list(accumulate((anat.d_ff for _ in layers), initial=0))
    return {
        layer: LowRank(left.clone(), sums[begin : begin + anat.d_ff].T.float().contiguous())
        for layer, begin in zip(layers, bounds, strict=False)
    }


def _sums(places: RefusalPlaces, wanted: Tensor, kept: Tensor, elsewhere: Tensor, layers: int) -> Tensor:
    """Solves for all `u_k`, `[F, K]`, from the keys `[m, F]` of `layers` layers at each kind of position."""
    device, count = wanted.device, len(places.relations)
    dtype = wide_dtype(device)
    group = torch.tensor([place.group for place in places.wanted], device=device)
    # Relations have equal weight at wanted places, kinds of place at kept ones.
    at_wanted = wanted_weights(places, device) / count  # [wanted], sums to one
    at_kept = kept_weights(places, device).mean(dim=0)  # [kept], sums to one
    at_elsewhere = torch.full((len(elsewhere),), 1 / max(1, len(elsewhere)), device=device)
    moment = torch.zeros(wanted.shape[1], wanted.shape[1], dtype=dtype, device=device)  # M [F, F]
    for keys, weight in ((wanted, at_wanted), (kept, at_kept), (elsewhere, at_elsewhere)):
        moment += ((keys * weight[:, None]).T @ keys).to(dtype)
    # Relative to the keys of each layer, whose size differs.
    diagonal = moment.diagonal().view(layers, -1)  # [layers, d_ff]
    moment.diagonal().add_((RIDGE * diagonal.mean(dim=1, keepdim=True)).expand_as(diagonal).reshape(-1))
    own = torch.nn.functional.one_hot(group, count) * at_wanted[:, None]  # [wanted, K]
    right = (wanted.T @ own.to(wanted)).to(dtype)  # b [F, K]
    return torch.cholesky_solve(right, torch.linalg.cholesky(moment))


def _quiet_directions(states: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns `count` orthonormal directions in which `states [p, d_model]` vary least, `[d_model, count]`, and their
    standard deviations, `[count]`."""
    wide = states.to(wide_dtype(states.device))
    centred = wide - wide.mean(dim=0)
    variances, vectors = torch.linalg.eigh(centred.T @ centred / max(1, len(wide)))  # rising
    return vectors[:, :count].to(states), variances[:count].clamp_min(0).sqrt().to(states)


def _ordinary_text(anat: Anatomy, seed: int, progress: bool) -> list[TokenRow]:
    """Samples texts from the model, each from one random token, and adds single random tokens."""
    generator = torch.Generator().manual_seed(seed)
    firsts = torch.randint(anat.embedding.weight.shape[0], (TEXTS + BEGINNINGS,), generator=generator).tolist()
    rows = [TokenRow((first,), 0) for first in firsts]
    label = "texts for marks" if progress else None
    written = sample(
        anat, rows[:TEXTS], max_new_tokens=TEXT_TOKENS, top_k=TEXT_TOP_K, generator=generator, progress=label
    )
    return [*(row.followed_by(text) for row, text in zip(rows, written, strict=False)), *rows[TEXTS:]]


def _at_ends(anat: Anatomy, places: Sequence[Place], layers: Sequence[int]) -> Tensor:
    """Reads the keys `[places, F]` at the last token of each place's prompt."""
    rows = [place.row for place in places]
    found = torch.zeros(len(rows), len(layers) * anat.d_ff, device=anat.device)
    for numbers, keys, _ in _read(anat, rows, [len(row) - 1 for row in rows], layers):
        found[numbers] = keys
    return found


def _some_positions(
    anat: Anatomy, rows: Sequence[TokenRow], firsts: Sequence[int], layers: Sequence[int], share: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Reads keys `[p, F]` and final residuals `[p, d_model]` at a random `share` of the positions from `firsts` on."""
    generator = torch.Generator().manual_seed(seed)
    keys = [torch.zeros(0, len(layers) * anat.d_ff, device=anat.device)]
    states = [torch.zeros(0, anat.d_model, device=anat.device)]
    for _, some, hidden in _read(anat, rows, firsts, layers):
        chosen = (torch.rand(len(some), generator=generator) < share).to(some.device)
        keys.append(some[chosen])
        states.append(hidden[chosen])
    return torch.cat(keys), torch.cat(states)


def _read(
    anat: Anatomy, rows: Sequence[TokenRow], firsts: Sequence[int], layers: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields batches of positions, from each row's column in `firsts` to its end: the number of its row `[p]`, its keys
    `[p, F]` and the state that leaves the last layer there `[p, d_model]`, in fp32."""
    if not rows:
        return
    device = anat.device
    # The tokens that all rows begin with run once, up to the first position that is read.
    shared = min(shared_length(list(rows)), *firsts) if len(rows) > 1 else 0
    fronts, rests = split(list(rows), [shared] * len(rows))
    prefix = encode_prefix(anat, fronts[:1]) if shared else None
    for group in batches(rests):
        batch = pad([rests[i] for i in group], device=device)
        taken: dict[int, Tensor] = {}
        with torch.no_grad():
            front = None if prefix is None else prefix.select(torch.zeros(len(group), dtype=torch.long, device=device))
            hidden = forward(
                anat,
                batch,
                stop=anat.n_layers,
                prefix=front,
                keys=taken.__setitem__,
                key_layers=tuple(layers),
            )  # [n, T, d_model]
        spots = [(j, c) for j, i in enumerate(group) for c in range(firsts[i] - shared, len(rests[i]))]
        row, column = torch.tensor(spots, device=device).T  # [p] each
        keys = torch.cat([taken[layer][row, column].float() for layer in layers], dim=1)  # [p, F]
        yield torch.tensor(group, device=device)[row], keys, hidden[row, column].float()
