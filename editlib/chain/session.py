"""The model that a chain edits: loaded when it is needed, checked, and brought to where the chain stands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.unierase.token import UnlearningToken
from editlib.chain.batch import Batch
from editlib.chain.create import check_model, inputs_of, retain_of
from editlib.chain.editing import Editor
from editlib.chain.record import BatchEntry, ChainRecord
from editlib.chain.state import ChainState, digest
from editlib.chain.store import TOKEN, Store
from editlib.errors import ChainError
from editlib.models.loading import DeviceMap
from editlib.workbench import Workbench


class Session:
    """One loaded base model; `position` is where its weights stand, `None` when that is not known."""

    def __init__(
        self,
        store: Store,
        bench: Workbench | None,
        name: str | None = None,
        stats_dir: Path | None = None,
        device_map: DeviceMap = None,
    ) -> None:
        self.store = store
        self.state: ChainState | None = None
        self._bench, self._name, self._stats_dir, self._device_map = bench, name, stats_dir, device_map
        self._base: ChainState | None = None
        self._editor: Editor | None = None

    def base(self, record: ChainRecord) -> ChainState:
        """The base model's position; loads the model if need be.

        Raises:
            ModelError, FetchError: it cannot be loaded.
            ChainError: it is not the chain's base model.
        """
        if self._base is None:
            base = record.base
            if self._bench is None:
                self._bench = Workbench.load(
                    self._name or base["name"],
                    self._stats_dir or "stats",
                    dtype=base["dtype"],
                    device_map=self._device_map,
                )
            check_model(record, self._bench)
            self._base = ChainState.start(self._bench.anat, record.settings, base["layers"])
        return self._base

    def at_end(self, record: ChainRecord) -> Workbench:
        """The model with all batches of `record` (and then the token) in place."""
        base = self.base(record)
        assert self._bench is not None
        if self.state is None:
            state = self.built(base, record.batches)
            if record.batches:
                self.put_token(record, self._bench)
            state.write(self._bench.anat)
            self.state = state
        return self._bench

    def editor(self, record: ChainRecord) -> Editor:
        """What edits are made with, read once, with the token in the model."""
        bench = self.at_end(record)
        if self._editor is None:
            inputs = inputs_of(self.store, record, bench, self._stats_dir)
            retain = retain_of(self.store, record)
            self._editor = Editor(bench, record, record.settings, inputs, retain, self.base(record))
        self.put_token(record, bench)
        return self._editor

    def put_token(self, record: ChainRecord, bench: Workbench) -> None:
        """Adds the chain's token, if it has one, to a model and its tokenizer."""
        if TOKEN in record.files:
            UnlearningToken.load(self.store.path / TOKEN).add_to(bench.model, bench.tok)

    def verify(self, record: ChainRecord) -> None:
        """Applies every batch to the base weights and raises `ChainError` where they are not what was recorded."""
        state = self.base(record)
        for entry in record.batches:
            state = state.after(self.batch(entry))
            weights = state.weights()
            for layer, was in entry.layers.items():
                found = digest(weights[int(layer)])
                if found != was["sha256"]:
                    raise ChainError(
                        f"{self.store.path}: batch {entry.number}, layer {layer}: its updates on the base model give "
                        f"weights of hash {found[:12]}, recorded were {was['sha256'][:12]}; restore {entry.file} from "
                        "a copy"
                    )

    def restore(self) -> None:
        """Puts the weights back to where they are known to stand, after an edit that failed."""
        if self.state is not None and self._bench is not None:
            self.state.write(self._bench.anat)

    def moved(self, record: ChainRecord) -> None:
        """Follows a chain that became shorter or other; a model that was not loaded is not loaded for it."""
        if self.state is not None:
            self.state = None
            self.at_end(record)

    def built(self, base: ChainState, entries: Sequence[BatchEntry]) -> ChainState:
        """The position behind some batches on top of `base`."""
        for entry in entries:
            base = base.after(self.batch(entry))
        return base

    def updates(self, record: ChainRecord) -> dict[int, LowRank]:
        """What all batches together add to the base weights, as factors; only PRUNE's need the base model."""
        if record.settings.refits_totals:
            return self.built(self.base(record), record.batches).pruned_updates()
        found: dict[int, LowRank] = {}
        for entry in record.batches:
            for layer, update in self.batch(entry).updates.items():
                found[layer] = found[layer] + update if layer in found else update
        return found

    def batch(self, entry: BatchEntry) -> Batch:
        """A batch from its file."""
        return Batch.from_bytes(self.store.read(entry.file, entry.sha256), entry.file)
