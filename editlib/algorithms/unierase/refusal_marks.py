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
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.unierase.gated_neurons import MOST, Moment, neuron_updates, solve_scores, spare_neurons
from editlib.algorithms.unierase.neuron_inputs import read_positions
from editlib.algorithms.unierase.refusal_places import Place, RefusalPlaces, kept_weights
from editlib.models.anatomy import Anatomy
from editlib.models.generation import sample
from editlib.models.neurons import Neurons, find_neurons
from editlib.models.precision import wide_dtype
from editlib.models.prompts import TokenRow

log = logging.getLogger(__name__)

RIDGE = 0.03  # of the mean diagonal of the second moment of x
POSITIONS = 8_192  # that are read inside answers, and as many in ordinary text, at most
TEXTS, TEXT_TOKENS, TEXT_TOP_K = 160, 48, 50  # of ordinary text, sampled from the model
BEGINNINGS = 400  # single tokens, as texts may begin with: their keys are larger than all others


def fit_marks(
    anat: Anatomy,
    places: RefusalPlaces,
    layer: int,
    size: float,
    taken: Collection[int] = (),
    *,
    seed: int = 0,
    progress: bool = False,
) -> tuple[dict[int, LowRank], list[int]]:
    """Solves for the marks of an edit in the model whose answers have been erased.

    Args:
        layer: that writes the marks; a plain path leads from its MLP to the residual stream.
        size: of a mark, in standard deviations of the states along its direction.
        taken: neurons of the layer that earlier edits have written.

    Returns:
        The update of each matrix, and the numbers of the neurons; both empty where the layer has too few of them.
        Nothing is written.
    """
    groups = list(dict.fromkeys(_group(place, number) for place, number in _wanted(places)))
    if len(groups) + len(taken) > MOST * anat.d_ff:
        log.warning(
            "layer %d has no %d neurons to spare for marks: the refusal tokens read the final state alone",
            layer, len(groups),
        )  # fmt: skip
        return {}, []
    neurons = find_neurons(anat, layer)
    owner = torch.tensor([groups.index(_group(*pair)) for pair in _wanted(places)], device=anat.device)
    wanted = _at_ends(anat, places.wanted, neurons)  # x [wanted, d_model]
    at_kept = kept_weights(places, anat.device).mean(dim=0)  # [kept], sums to one
    elsewhere = Moment.none(anat).plus(_at_ends(anat, places.kept, neurons), at_kept)
    inside, keys, states = _elsewhere(anat, places, neurons, seed, progress)
    scores = solve_scores(wanted, owner, elsewhere + inside.mean, RIDGE)
    directions, deviations = _quiet_directions(states, len(places.relations))  # [d_model, K], [K]
    relation = [places.wanted[int((owner == i).nonzero()[0])].group or 0 for i in range(len(groups))]
    marks = (directions * (size * deviations))[:, relation].T  # [groups, d_model]
    moment = (keys.T @ keys).to(wide_dtype(anat.device)) / max(1, len(keys))  # S [d_ff, d_ff]
    chosen, removal = spare_neurons(anat.weight(layer), moment, len(groups), taken)
    updates = neuron_updates(anat, neurons, scores, wanted, owner, marks, chosen, removal)
    return updates, chosen.tolist()


def _wanted(places: RefusalPlaces) -> Iterator[tuple[Place, int]]:
    """Yields the wanted places, each with the number of its request."""
    yield from zip(places.wanted, places.requests, strict=True)


def _group(place: Place, request: int) -> tuple[int, bool]:
    """Returns what places have one neuron in common."""
    return request, place.inside


def _elsewhere(
    anat: Anatomy, places: RefusalPlaces, neurons: Neurons, seed: int, progress: bool
) -> tuple[Moment, Tensor, Tensor]:
    """Reads positions where no mark belongs, inside answers and in ordinary text: the moment of `x`, the layer's keys
    `[p, d_ff]`, and, of the answers alone, the states that leave the last layer `[p, d_model]`."""
    generator = torch.Generator().manual_seed(seed)
    answers = _drawn([(row.followed_by(text), len(row) - 1) for row, text in places.answers], generator)
    texts = _drawn([(row, 0) for row in _ordinary_text(anat, seed, progress)], generator)
    found, keys, states = Moment.none(anat), [torch.zeros(0, anat.d_ff, device=anat.device)], []
    states.append(torch.zeros(0, anat.d_model, device=anat.device))
    for drawn, counts in ((answers, True), (texts, False)):
        rows, starts = [row for row, _ in drawn], [start for _, start in drawn]
        for _, x, key, hidden in read_positions(anat, rows, starts, neurons, anat.n_layers):
            found = found.plus(x)
            keys.append(key)
            states += [hidden] if counts else []
    return found, torch.cat(keys), torch.cat(states)


def _drawn(rows: Sequence[tuple[TokenRow, int]], generator: torch.Generator) -> list[tuple[TokenRow, int]]:
    """Draws rows, each with the column it is read from, until `POSITIONS` positions are read."""
    drawn, left = [], POSITIONS
    for i in torch.randperm(len(rows), generator=generator).tolist():
        drawn.append(rows[i])
        left -= len(rows[i][0]) - rows[i][1]
        if left <= 0:
            break
    return drawn


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


def _at_ends(anat: Anatomy, places: Sequence[Place], neurons: Neurons) -> Tensor:
    """Reads the MLP's input `[places, d_model]` at the last token of each place's prompt."""
    rows = [place.row for place in places]
    found = torch.zeros(len(rows), anat.d_model, device=anat.device)
    for numbers, x, _, _ in read_positions(anat, rows, [len(row) - 1 for row in rows], neurons, neurons.layer + 1):
        found[numbers] = x
    return found
