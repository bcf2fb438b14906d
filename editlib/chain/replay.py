"""Taking single requests out: the batches from theirs on are made again from what they found, without looking anew."""

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
    """All batches without the requests `gone`; those of batches that had to be made again come as `Batch` too.

    The batches before the first that changes stay as they are; those behind it stand on other weights now, and are
    solved again for the target states, with the anchors, answers and seed of before. A batch that nothing is left of
    goes. When nothing has to be made again, no model is loaded.

    Args:
        answers: what each batch keeps of the anchors' answers; what goes with a batch is kept by a later one.
    """
    first = next(i for i, entry in enumerate(record.batches) if not gone.isdisjoint(entry.ids))
    kept, made = list(record.batches[:first]), []
    state, debts, prompts = None, GateCarryover(), {}
    known = {question: ids for some in answers for question, ids in some.items()}
    said = {question for some in answers[:first] for question in some}
    for old in record.batches[first:]:
        batch = session.batch(old)
        left = [i for i, request in enumerate(batch.requests) if request.id not in gone]
        values = debts.settled(batch, left)
        if not left:
            continue
        editor = session.editor(record)
        if state is None:
            state = session.built(session.base(record), kept)
            prompts = {prompt.id: prompt for prompt in editor.retain}
        anchored = BatchAnchors.of([prompts[name] for name in batch.anchors], known, said)
        said |= set(anchored.new)
        again, result = editor.edit(state, [batch.requests[i] for i in left], anchored, old.seed, values)
        state = state.after(again)
        number = len(kept) + 1
        kept.append(write_entry(session.store, again, result, state.weights(), number, old.seed, old.time))
        made.append(again)
    return kept, made


class GateCarryover:
    """What revoked requests leave to be done by later batches.

    A batch's gate goes only the part of the way to a relation that the batches before it have not gone. When one of
    these is revoked, the next batch that asks for the relation goes that part too.
    """

    def __init__(self) -> None:
        self._open: dict[str | None, Tensor] = {}

    def settled(self, batch: Batch, kept: Sequence[int]) -> Values:
        """The values of the `kept` requests of a batch."""
        values = batch.values.select(kept)
        relations = {batch.requests[i].relation for i in kept}
        gate = {}
        for relation, value in values.gate.items():
            whole = value + self._open.pop(relation) if relation in self._open else value
            (gate if relation in relations else self._open)[relation] = whole
        return replace(values, gate=gate)
