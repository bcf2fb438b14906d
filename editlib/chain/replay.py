"""Revoke single requests: later batches are solved again with their stored values, without optimising them again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from editlib.algorithms.values import Values
from editlib.chain.batch import Batch
from editlib.chain.editing import BatchAnchors, write_entry
from editlib.chain.record import BatchEntry, ChainRecord
from editlib.chain.session import Session


def replayed(
    session: Session, record: ChainRecord, gone: Collection[str], answers: Sequence[Mapping[str, Sequence[int]]]
) -> tuple[list[BatchEntry], list[Batch]]:
    """Makes the chain's batches again without the requests `gone`.

    Batches before the first affected one stay as they are. The later ones start from other weights, so each is solved
    again for its stored values, with the same anchors, answers and seed. A batch without remaining requests is removed.
    If no batch has to be solved again, no model is loaded.

    Args:
        answers: the anchor answers that each batch stores; if a batch is removed, a later one stores its answers.

    Returns:
        The entries of all batches, and the content of the batches that were solved again.
    """
    first = next(i for i, entry in enumerate(record.batches) if any(name in gone for name in entry.ids))
    kept, made = list(record.batches[:first]), []
    state, carryover, prompts = None, GateCarryover(), {}
    known = {question: ids for stored in answers for question, ids in stored.items()}
    stored = {question for earlier in answers[:first] for question in earlier}
    for old in record.batches[first:]:
        batch = session.batch(old)
        left = [i for i, request in enumerate(batch.requests) if request.id not in gone]
        values = carryover.values_for(batch, left)
        if not left:
            continue
        editor = session.editor(record)
        if state is None:
            state = session.state_after(session.base(record), kept)
            prompts = {prompt.id: prompt for prompt in editor.retain}
        anchors = BatchAnchors.of([prompts[name] for name in batch.anchors], known, stored)
        stored |= set(anchors.new)
        again, result = editor.edit(state, [batch.requests[i] for i in left], anchors, old.seed, values, batch.token)
        state = state.after(again)
        number = len(kept) + 1
        weights = state.weights()
        told = old.left_out, old.guessed_subjects
        kept.append(write_entry(session.store, again, result, weights, number, old.seed, old.time, *told))
        made.append(again)
    return kept, made


class GateCarryover:
    """Holds gate contributions of revoked batches, which the next batch with the same relation has to make instead.

    A batch opens the gate for a relation only as far as earlier batches have not. If an earlier one is revoked, its
    contribution is added to the next batch that asks for the relation.
    """

    def __init__(self) -> None:
        self._open: dict[str | None, Tensor] = {}

    def values_for(self, batch: Batch, kept: Sequence[int]) -> Values:
        """Returns the values of the `kept` requests of a batch, with the contributions carried over from revoked
        ones."""
        values = batch.values.select(kept)
        relations = {batch.requests[i].relation for i in kept}
        gate: dict[str | None, Tensor] = {}
        for relation, value in values.gate.items():
            total = value + self._open.pop(relation) if relation in self._open else value
            (gate if relation in relations else self._open)[relation] = total
        return replace(values, gate=gate)
