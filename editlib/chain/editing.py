"""One more batch on top of a position: found anew, or replayed from what was kept of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from editlib import editing
from editlib.algorithms.edit import EditResult
from editlib.algorithms.unierase.anchor_keys import AnchorKeys
from editlib.algorithms.unierase.anchors import answers_to, choose_anchors
from editlib.algorithms.unierase.apply import hold_anchors
from editlib.algorithms.values import Values
from editlib.chain.batch import Batch
from editlib.chain.record import BatchEntry, ChainRecord
from editlib.chain.state import ChainState, digest, new_part
from editlib.chain.store import Store
from editlib.data import without_overlap
from editlib.export import library_version
from editlib.hparams import HyperParams
from editlib.models.prompts import PromptFormat
from editlib.requests.request import EditRequest
from editlib.workbench import Workbench


@dataclass(frozen=True)
class BatchAnchors:
    """The retain prompts that one batch holds, in their order, the base model's answers to them, and those of the
    answers that no earlier batch keeps."""

    prompts: tuple[EditRequest, ...] = ()
    answers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    new: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, prompts: Sequence[EditRequest], answers: Mapping[str, Sequence[int]], kept: Collection[str]
    ) -> BatchAnchors:
        """`answers` may hold others, too; `kept` are the questions that earlier batches keep the answers to."""
        own = {prompt.question: answers[prompt.question] for prompt in prompts if prompt.question in answers}
        return cls(tuple(prompts), own, {question: ids for question, ids in own.items() if question not in kept})


@dataclass
class Editor:
    """What all batches of a chain are made with; `start` is the base model."""

    bench: Workbench
    record: ChainRecord
    hparams: HyperParams
    inputs: editing.EditInputs
    retain: Sequence[EditRequest]
    start: ChainState
    _held: tuple[Any, AnchorKeys] | None = None  # the last anchors, and their keys

    def anchored(
        self,
        requests: Sequence[EditRequest],
        earlier: Sequence[EditRequest],
        known: Mapping[str, Sequence[int]],
    ) -> BatchAnchors:
        """The anchors of a new batch: of the retain prompts that ask for nothing that the chain has forgotten.

        Their answers are those of the base model, which the retain set is there to keep, so that no batch depends on
        what earlier ones did to them; those `known` from earlier batches are not asked again. Where there are more than
        `max_anchors`, the order that they are drawn in is the chain's, so that batches share what they can.
        """
        if not self.hparams.holds_anchors:
            return BatchAnchors()
        usable = without_overlap(self.retain, [*earlier, *requests])
        chosen = choose_anchors(usable, requests, most=self.hparams.max_anchors, seed=self.record.seed)
        if self.hparams.anchor_positions != "all":
            return BatchAnchors(tuple(chosen))
        self.start.write(self.bench.anat)
        form = PromptFormat.of(self.bench.tok, self.record.asking)
        answers = answers_to(self.bench.anat, form, chosen, known=known, progress=self.bench.progress)
        return BatchAnchors.of(chosen, answers, known)

    def edit(
        self,
        state: ChainState,
        requests: Sequence[EditRequest],
        anchored: BatchAnchors,
        seed: int,
        values: Values | None = None,
    ) -> tuple[Batch, EditResult]:
        """Edits `requests` on top of `position`, with the model left in a state that the caller sets again."""
        anat = self.bench.anat
        held = self._keys_of(anchored, requests, seed)
        state.write(anat)
        edit_state = state.edit_state(anat, self.record.templates)
        given = {"state": edit_state, "values": values, "seed": seed, "chat": self.record.asking}
        if held is not None:
            given["anchored"] = held
        result = editing.apply(self.bench, requests, self.hparams, self.inputs, **given)
        updates = result.deltas
        if state.pruned:
            updates = {
                layer: new_part(total, edit_state.totals.get(layer)) for layer, total in result.state.totals.items()
            }
        return Batch.of(result, updates, requests, anchored.new), result

    def _keys_of(self, anchored: BatchAnchors, requests: Sequence[EditRequest], seed: int) -> AnchorKeys | None:
        """The keys of a batch's anchors, of the base model: most batches have the anchors of the one before."""
        if self.hparams.has_target:
            return None
        subjects = [request.subject for request in requests] if self.hparams.anchor_subjects else []
        asked = tuple(prompt.id for prompt in anchored.prompts), tuple(subjects)
        if self._held is None or self._held[0] != asked:
            self.start.write(self.bench.anat)
            form = PromptFormat.of(self.bench.tok, self.record.asking)
            found = hold_anchors(
                self.bench.anat,
                form,
                anchored.prompts,
                requests,
                self.hparams,
                known_answers=anchored.answers,
                seed=seed,
                progress=self.bench.progress,
            )
            self._held = asked, found
        return self._held[1]


def write_entry(
    store: Store, batch: Batch, result: EditResult, weights: Mapping[int, Tensor], number: int, seed: int, time: str
) -> BatchEntry:
    """Writes a batch's file and describes it; it counts once a record that names it is committed."""
    layers = {
        str(layer): {
            "sha256": digest(weights[layer]),
            "update": result.norms[layer]["update"],
            "ratio": result.norms[layer]["ratio"],
        }
        for layer in sorted(batch.updates)
    }
    file, sha256 = store.write_batch(number, batch.to_bytes())
    ids = tuple(request.id for request in batch.requests)
    count = max((keys.shape[1] for keys in batch.keys.values()), default=0)
    return BatchEntry(number, file, sha256, time, library_version(), seed, count, ids, layers)
