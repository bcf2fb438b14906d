"""Solve one batch on top of a chain state: with new values, or with the stored ones when it is replayed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from editlib import editing
from editlib.algorithms.edit import EditResult
from editlib.algorithms.unierase.anchor_keys import AnchorKeys
from editlib.algorithms.unierase.anchors import answers_to, choose_anchors
from editlib.algorithms.unierase.constraints import hold_anchors
from editlib.algorithms.unierase.token import UnlearningToken
from editlib.algorithms.values import Values
from editlib.chain.batch import Batch
from editlib.chain.record import BatchEntry, ChainRecord
from editlib.chain.state import ChainState, digest, new_part
from editlib.chain.store import Store
from editlib.data import without_overlap
from editlib.hparams import HyperParams, takes_retain
from editlib.models.prompts import PromptFormat
from editlib.requests.request import EditRequest
from editlib.version import library_version
from editlib.workbench import Workbench


@dataclass(frozen=True)
class BatchAnchors:
    """Holds the anchored retain prompts of one batch.

    Args:
        prompts: in the order of the solve.
        answers: the base model's answers by question, as token ids.
        new: those of `answers` that no earlier batch stores.
    """

    prompts: tuple[EditRequest, ...] = ()
    answers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    new: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, prompts: Sequence[EditRequest], answers: Mapping[str, Sequence[int]], stored: Collection[str]
    ) -> BatchAnchors:
        """Selects the prompts' own answers; `stored` are the questions whose answers earlier batches store."""
        kept_answers = {prompt.question: answers[prompt.question] for prompt in prompts if prompt.question in answers}
        return cls(
            tuple(prompts),
            kept_answers,
            {question: ids for question, ids in kept_answers.items() if question not in stored},
        )


@dataclass
class Editor:
    """Makes the batches of one chain; `start` is the state of the base model."""

    bench: Workbench
    record: ChainRecord
    hparams: HyperParams
    inputs: editing.EditInputs
    retain: Sequence[EditRequest]
    start: ChainState
    _last_keys: tuple[Any, AnchorKeys] | None = None  # the last batch's anchors, and their keys

    def anchors_for(
        self,
        requests: Sequence[EditRequest],
        earlier: Sequence[EditRequest],
        known: Mapping[str, Sequence[int]],
    ) -> BatchAnchors:
        """Chooses the anchors of a new batch: retain prompts that ask for no fact that the chain has forgotten.

        Their answers are the base model's, so that no batch depends on side effects of earlier ones; answers `known`
        from earlier batches are not generated again. If there are more than `max_anchors`, they are drawn by the
        chain's seed, so that batches share as many as possible.
        """
        if not takes_retain(self.hparams) or not self.hparams.holds_anchors:
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
        anchors: BatchAnchors,
        seed: int,
        values: Values | None = None,
        token: UnlearningToken | None = None,
    ) -> tuple[Batch, EditResult]:
        """Edits `requests` on top of `state`; the caller has to write the model's weights again afterwards.

        Args:
            values: the stored values of a batch that is replayed; `None`: they are optimised.
            token: the tokens that were fitted to a batch that is replayed, if there were any.
        """
        anat = self.bench.anat
        anchor_keys = self._anchor_keys(anchors, requests, seed)
        state.write(anat)
        edit_state = state.edit_state(anat, self.record.templates)
        given: dict[str, Any] = {"state": edit_state, "values": values, "seed": seed, "chat": self.record.asking}
        if anchor_keys is not None:
            given["anchored"] = anchor_keys
        if takes_retain(self.hparams):
            # Rows use the anchors' facts as rivals of the answers, and as places without a refusal token.
            given |= {"retain": anchors.prompts, "known_answers": anchors.answers}
        inputs = self.inputs if token is None else replace(self.inputs, token=token)
        result = editing.apply(self.bench, requests, self.hparams, inputs, **given)
        updates = result.deltas
        if state.pruned:
            updates = {
                layer: new_part(total, edit_state.totals.get(layer)) for layer, total in result.state.totals.items()
            }
        return Batch.of(result, updates, requests, anchors.new), result

    def _anchor_keys(self, anchors: BatchAnchors, requests: Sequence[EditRequest], seed: int) -> AnchorKeys | None:
        """Returns the anchors' keys in the base model; reused if the last batch had the same anchors. `None` without
        any."""
        if not takes_retain(self.hparams):
            return None
        subjects = [request.subject for request in requests] if self.hparams.anchor_subjects else []
        asked = tuple(prompt.id for prompt in anchors.prompts), tuple(subjects)
        if self._last_keys is None or self._last_keys[0] != asked:
            self.start.write(self.bench.anat)
            form = PromptFormat.of(self.bench.tok, self.record.asking)
            keys = hold_anchors(
                self.bench.anat,
                form,
                anchors.prompts,
                requests,
                self.hparams,
                known_answers=anchors.answers,
                seed=seed,
                progress=self.bench.progress,
            )
            self._last_keys = asked, keys
        return self._last_keys[1]


def write_entry(
    store: Store,
    batch: Batch,
    result: EditResult,
    weights: Mapping[int, Tensor],
    number: int,
    seed: int,
    time: str,
    left_out: Mapping[str, Sequence[str]],
    guessed: Mapping[str, str],
) -> BatchEntry:
    """Writes a batch's file and returns its entry; it belongs to the chain once a record naming it is committed.

    Args:
        guessed: subjects that no file named, by id; those of other requests than the batch's are left out.
    """
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
    own = {name: guessed[name] for name in ids if name in guessed}
    return BatchEntry(number, file, sha256, time, library_version(), seed, count, ids, layers, left_out, own)
