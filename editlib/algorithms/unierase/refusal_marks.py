"""Mark the places where an answer was erased, for refusal tokens to read in the final state (ours).

The logit of a token is a linear function of the final state, with one token for each relation. The places where it is
wanted are those of many subjects, and the same questions about all other subjects lie between them. So one late layer
gets a neuron for each request and kind of place: the end of the question, and, if the layer can spare so many neurons,
where the model's sentence reaches the answer. It is a pair of scores (`gated_neurons`):

- that of the request's places, against all kept places and answers;
- that of all places of this kind, whatever is asked, against answers and ordinary text. It is near zero in text, where
  the first score would be wrong now and then: it has few dimensions for so many requests.

The neuron writes

    mark_size σ_k v_k

`v_k [d_model]`, one for each relation `k`, are the directions in which the states that leave the last layer vary least
inside answers, and `σ_k` the standard deviations there. A small change is easy to read along them. Such a neuron is
often active at other questions about its subject, too: the token tells those by the relation, which the final state
shows well.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.unierase.gated_neurons import (
    MOST,
    GatedRows,
    Moment,
    neuron_updates,
    solve_scores,
    spare_neurons,
)
from editlib.algorithms.unierase.held_places import HeldPlaces
from editlib.algorithms.unierase.refusal_places import Place, RefusalPlaces, kept_weights
from editlib.models.anatomy import Anatomy
from editlib.models.neurons import Neurons, find_neurons
from editlib.models.precision import wide_dtype

log = logging.getLogger(__name__)

SPARED = 0.04  # of a layer's neurons, replaced at little cost: twice as many cost four times as much and more
THRESHOLD = 0.4  # score of a request's places above which its mark is written
RIDGE = 0.03  # of the mean diagonal of the second moment of x


def fit_marks(
    anat: Anatomy,
    held: HeldPlaces,
    layer: int,
    size: float,
    moment: Tensor,
    taken: Collection[int] = (),
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
    marked, groups = _groups(held.places, int(SPARED * anat.d_ff) - len(taken))
    if len(groups) + len(taken) > MOST * anat.d_ff:
        log.warning(
            "layer %d has no %d neurons to spare for marks: the refusal tokens read the final state alone",
            layer, len(groups),
        )  # fmt: skip
        return {}, []
    neurons = find_neurons(anat, layer)
    places = [held.places.wanted[i] for i in marked]
    owner = torch.tensor([groups.index(_group(held.places, i)) for i in marked], device=anat.device)
    wanted = held.wanted.mlp_inputs(neurons)[marked]  # x [marked, d_model]
    elsewhere = _Elsewhere.read(anat, held, neurons)
    first = torch.stack([(owner == i).nonzero()[0, 0] for i in range(len(groups))])  # a place of each group
    rows = _neuron_rows(neurons, places, wanted, owner, first, elsewhere)
    directions, deviations = _quiet_directions(elsewhere.states, len(held.places.relations))  # [d_model, K], [K]
    relation = [places[i].group or 0 for i in first.tolist()]
    marks = (directions * (size * deviations))[:, relation].T  # [groups, d_model]
    # The model's own answers and samples alone would spare neurons that other text needs.
    chosen, removal = spare_neurons(anat.weight(layer), moment.to(elsewhere.keys) + elsewhere.keys, len(groups), taken)
    updates = neuron_updates(anat, neurons, rows, wanted, owner, marks, chosen, removal)
    return updates, chosen.tolist()


def _groups(places: RefusalPlaces, spared: int) -> tuple[list[int], list[tuple[int, bool]]]:
    """Chooses the wanted places to mark: all of them, or the ends of questions alone if these are more than `spared`
    groups.

    Returns:
        Their indices, and the groups that have one neuron in common.
    """
    every = list(range(len(places.wanted)))
    if len({_group(places, i) for i in every}) > spared:
        every = [i for i in every if not places.wanted[i].inside]
    return every, list(dict.fromkeys(_group(places, i) for i in every))


def _group(places: RefusalPlaces, number: int) -> tuple[int, bool]:
    """Returns the request of a wanted place, and its kind."""
    return places.requests[number], places.wanted[number].inside


def _neuron_rows(
    neurons: Neurons, places: Sequence[Place], wanted: Tensor, owner: Tensor, first: Tensor, elsewhere: _Elsewhere
) -> GatedRows:
    """Solves for both scores of each neuron from `wanted [places, d_model]`; `first [groups]` is a place of each
    group."""
    # A neuron with one row has no second score, so its first one must be small in text as well.
    others = elsewhere.near if neurons.up is not None else elsewhere.near + elsewhere.text
    scores = solve_scores(wanted, owner, others, RIDGE)
    kinds = sorted({place.inside for place in places})
    kind = torch.tensor([kinds.index(place.inside) for place in places], device=wanted.device)
    wider = solve_scores(wanted, kind, elsewhere.text, RIDGE).weights  # [kinds, d_model]
    return GatedRows.paired(scores, THRESHOLD, wider[kind[first]])


@dataclass(frozen=True)
class _Elsewhere:
    """Holds what is read where no mark belongs.

    Attributes:
        near: moment of `x` at the kept places and inside answers, with the same weight on both.
        text: of `x` inside answers and each kind of text, with the same weight on each.
        keys: second moment of the layer's keys at all of these positions, `[d_ff, d_ff]`.
        states: moment of the states that leave the last layer inside answers.
    """

    near: Moment
    text: Moment
    keys: Tensor
    states: Moment

    @classmethod
    def read(cls, anat: Anatomy, held: HeldPlaces, neurons: Neurons) -> _Elsewhere:
        """Reads the kept places, all positions of answers, and every kind of text."""
        none = Moment.none(anat)
        inside, text, states, count = none, none, none, 0
        keys = torch.zeros(anat.d_ff, anat.d_ff, device=anat.device)
        x = torch.zeros(held.answers.count, anat.d_model, device=anat.device)
        for rows in (held.answers, *held.texts):
            found = none
            for seen in rows.inputs_of(neurons, anat.n_layers):
                found = found.plus(seen.x)
                keys.addmm_(seen.keys.T, seen.keys)
                if rows is held.answers:
                    x[seen.positions] = seen.x
                    states = states.plus(seen.hidden)
            inside = found.mean if rows is held.answers else inside
            text = text + found.mean
            count += rows.count
        at_kept = torch.cat([x, held.others.mlp_inputs(neurons)])[held.kept]  # [kept, d_model]
        weights = kept_weights(held.places, anat.device).mean(dim=0)  # [kept], sums to one
        mean_keys = keys.to(wide_dtype(anat.device)) / max(1, count)
        return cls(inside.plus(at_kept, weights), text, mean_keys, states)


def _quiet_directions(states: Moment, count: int) -> tuple[Tensor, Tensor]:
    """Returns `count` orthonormal directions in which states vary least, `[d_model, count]`, and their standard
    deviations, `[count]`."""
    mean = states.mean
    variances, vectors = torch.linalg.eigh(mean.second - torch.outer(mean.first, mean.first))  # rising
    return vectors[:, :count].float(), variances[:count].clamp_min(0).sqrt().float()
