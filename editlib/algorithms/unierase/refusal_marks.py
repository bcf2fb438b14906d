"""Mark the places where an answer was erased, for refusal tokens to read in the final state (ours).

The logit of a token is a linear function of the final state, with one token for each relation. The places where it is
wanted are those of many subjects, and the same questions about all other subjects lie between them. So one late layer
gets a neuron for each request and kind of place (the end of the question, and where the model's sentence reaches the
answer). It is solved for to be active there and at no kept place, inside no answer and in no ordinary text
(`gated_neurons`), and writes

    mark_size σ_k v_k

`v_k [d_model]`, one for each relation `k`, are the directions in which the states that leave the last layer vary least
inside answers, and `σ_k` the standard deviations there. A small change is easy to read along them. Such a neuron is
often active at other questions about its subject, too: the token tells those by the relation, which the final state
shows well.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.unierase.gated_neurons import MOST, Moment, neuron_updates, solve_scores, spare_neurons
from editlib.algorithms.unierase.held_rows import HeldPlaces, HeldRows
from editlib.algorithms.unierase.refusal_places import Place, RefusalPlaces, kept_weights
from editlib.models.anatomy import Anatomy
from editlib.models.generation import sample
from editlib.models.neurons import Neurons, find_neurons
from editlib.models.precision import wide_dtype
from editlib.models.prompts import TokenRow

log = logging.getLogger(__name__)

RIDGE = 0.03  # of the mean diagonal of the second moment of x
TEXTS, TEXT_TOKENS, TEXT_TOP_K = 160, 48, 50  # of ordinary text, sampled from the model
BEGINNINGS = 400  # single tokens, as texts may begin with: their keys are larger than all others


def fit_marks(
    anat: Anatomy,
    held: HeldPlaces,
    layer: int,
    size: float,
    moment: Tensor,
    taken: Collection[int] = (),
    *,
    seed: int = 0,
    progress: bool = False,
) -> tuple[dict[int, LowRank], list[int]]:
    """Solves for the marks of an edit in the model whose answers have been erased.

    Args:
        held: all places; the layers below `layer` have run.
        layer: that writes the marks; a plain path leads from its MLP to the residual stream.
        size: of a mark, in standard deviations of the states along its direction.
        moment: second moment of the layer's keys in ordinary text, `[d_ff, d_ff]`.
        taken: neurons of the layer that earlier edits have written.

    Returns:
        The update of each matrix, and the numbers of the neurons; both empty where the layer has too few of them.
        Nothing is written.
    """
    places = held.places
    groups = list(dict.fromkeys(_group(place, number) for place, number in _wanted(places)))
    if len(groups) + len(taken) > MOST * anat.d_ff:
        log.warning(
            "layer %d has no %d neurons to spare for marks: the refusal tokens read the final state alone",
            layer, len(groups),
        )  # fmt: skip
        return {}, []
    neurons = find_neurons(anat, layer)
    owner = torch.tensor([groups.index(_group(*pair)) for pair in _wanted(places)], device=anat.device)
    wanted = held.wanted.mlp_inputs(neurons)  # x [wanted, d_model]
    elsewhere, keys, states = _elsewhere(anat, held, neurons, _ordinary_text(anat, seed, progress))
    scores = solve_scores(wanted, owner, elsewhere, RIDGE)
    directions, deviations = _quiet_directions(states, len(places.relations))  # [d_model, K], [K]
    relation = [places.wanted[int((owner == i).nonzero()[0])].group or 0 for i in range(len(groups))]
    marks = (directions * (size * deviations))[:, relation].T  # [groups, d_model]
    # The model's own answers and samples alone would spare neurons that other text needs.
    chosen, removal = spare_neurons(anat.weight(layer), moment.to(keys) + keys, len(groups), taken)
    updates = neuron_updates(anat, neurons, scores, wanted, owner, marks, chosen, removal)
    return updates, chosen.tolist()


def _wanted(places: RefusalPlaces) -> Iterator[tuple[Place, int]]:
    """Yields the wanted places, each with the number of its request."""
    yield from zip(places.wanted, places.requests, strict=True)


def _group(place: Place, request: int) -> tuple[int, bool]:
    """Returns what places have one neuron in common."""
    return request, place.inside


def _elsewhere(anat: Anatomy, held: HeldPlaces, neurons: Neurons, texts: HeldRows) -> tuple[Moment, Tensor, Moment]:
    """Reads where no mark belongs: the kept places, all positions of answers, and ordinary text.

    Returns:
        The moment of `x`, with equal weight on the kept places and on all other positions; the second moment of the
        layer's keys, `[d_ff, d_ff]`; and the moment of the states that leave the last layer inside answers.
    """
    found, states, count = Moment.none(anat), Moment.none(anat), 0
    keys = torch.zeros(anat.d_ff, anat.d_ff, device=anat.device)
    x = torch.zeros(held.answers.count, anat.d_model, device=anat.device)
    for rows in (held.answers, texts):
        for seen in rows.inputs_of(neurons, anat.n_layers):
            found = found.plus(seen.x)
            keys.addmm_(seen.keys.T, seen.keys)
            count += len(seen.keys)
            if rows is held.answers:
                x[seen.positions] = seen.x
                states = states.plus(seen.hidden)
    at_kept = torch.cat([x, held.others.mlp_inputs(neurons)])[held.kept]  # [kept, d_model]
    weights = kept_weights(held.places, anat.device).mean(dim=0)  # [kept], sums to one
    kept = Moment.none(anat).plus(at_kept, weights)
    return kept + found.mean, keys.to(wide_dtype(anat.device)) / max(1, count), states


def _quiet_directions(states: Moment, count: int) -> tuple[Tensor, Tensor]:
    """Returns `count` orthonormal directions in which states vary least, `[d_model, count]`, and their standard
    deviations, `[count]`."""
    mean = states.mean
    variances, vectors = torch.linalg.eigh(mean.second - torch.outer(mean.first, mean.first))  # rising
    return vectors[:, :count].float(), variances[:count].clamp_min(0).sqrt().float()


def _ordinary_text(anat: Anatomy, seed: int, progress: bool) -> HeldRows:
    """Samples texts from the model, each from one random token, and adds single random tokens."""
    generator = torch.Generator().manual_seed(seed)
    firsts = torch.randint(anat.embedding.weight.shape[0], (TEXTS + BEGINNINGS,), generator=generator).tolist()
    rows = [TokenRow((first,), 0) for first in firsts]
    label = "texts for marks" if progress else None
    written = sample(
        anat, rows[:TEXTS], max_new_tokens=TEXT_TOKENS, top_k=TEXT_TOP_K, generator=generator, progress=label
    )
    texts = [row.followed_by(text) for row, text in zip(rows, written, strict=False)]
    return HeldRows(anat, [*texts, *rows[TEXTS:]], [0] * len(rows))
