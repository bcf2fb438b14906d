"""Hold the base model of an open chain: loaded on first use, checked, and brought to the state after any batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.unierase.token import UnlearningToken
from editlib.chain.batch import Batch
from editlib.chain.create import check_inputs, check_model, inputs_of, retain_of
from editlib.chain.editing import Editor
from editlib.chain.record import BatchEntry, ChainRecord
from editlib.chain.state import ChainState, digest
from editlib.chain.store import TOKEN, Store
from editlib.errors import ChainError
from editlib.models.loading import DeviceMap
from editlib.models.vocabulary import Vocabulary, numbered
from editlib.workbench import Workbench


class Session:
    """Holds one base model; `state` is the chain state of its weights, `None` if that is not known."""

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
        self._vocabulary: Vocabulary | None = None  # of the base model

    def base(self, record: ChainRecord, first: Callable[[Workbench], None] | None = None) -> ChainState:
        """Returns the state of the base model, before any batch; loads the model on first use.

        Args:
            first: see `Workbench.load`.

        Raises:
            ModelError, FetchError: the model cannot be loaded.
            ChainError: another model than the chain's base model.
        """
        if self._base is None:
            base = record.base
            if self._bench is None:
                self._bench = Workbench.load(
                    self._name or base["name"],
                    self._stats_dir or "stats",
                    dtype=base["dtype"],
                    device_map=self._device_map,
                    first=first,
                )
            check_model(record, self._bench)
            self._vocabulary = Vocabulary.of(self._bench.model, self._bench.tok)
            self._base = ChainState.start(self._bench.anat, record.settings, base["layers"])
        return self._base

    def at_end(self, record: ChainRecord, first: Callable[[Workbench], None] | None = None) -> Workbench:
        """Returns the model with all batches of `record` (and the token, if there are any) applied.

        Args:
            first: see `Workbench.load`; not called where the model is loaded already.
        """
        base = self.base(record, first)
        assert self._bench is not None
        if self.state is None:
            state = self.state_after(base, record.batches)
            self.put_token(record if record.batches else None, self._bench)
            state.write(self._bench.anat)
            self.state = state
        return self._bench

    def check_inputs(self, record: ChainRecord) -> None:
        """Raises `StatsError` if statistics for the next edit are missing; call it before the model is loaded."""
        if self._editor is None:
            check_inputs(record, self._stats_dir)

    def editor(self, record: ChainRecord) -> Editor:
        """Returns the editor of the chain, made once; the token is put into the model."""
        self.check_inputs(record)
        bench = self.at_end(record)
        if self._editor is None:
            inputs = inputs_of(self.store, record, bench, self._stats_dir)
            retain = retain_of(self.store, record)
            self._editor = Editor(bench, record, record.settings, inputs, retain, self.base(record))
        self.put_token(record, bench)
        return self._editor

    def token(self, record: ChainRecord) -> UnlearningToken | None:
        """Returns the tokens that replace the answers: those fitted to the chain's batches, or else the chain's own
        token."""
        if not record.batches and not record.settings.uses_token:
            return None  # tokens are fitted to batches, or there are none
        fitted = [token for entry in record.batches if (token := self.batch(entry).token) is not None]
        if fitted:
            return UnlearningToken.joined(fitted)
        return UnlearningToken.load(self.store.path / TOKEN) if TOKEN in record.files else None

    def put_token(self, record: ChainRecord | None, bench: Workbench) -> None:
        """Leaves only the chain's tokens in the session's model; `None`: no tokens at all."""
        token = None if record is None else self.token(record)
        wanted = set() if token is None else set(token.names)
        first = "[UNL]" if token is None else token.header.token
        if self._vocabulary is not None and set(numbered(bench.tok, first)) - wanted:
            bench.tok = self._vocabulary.restore(bench.model)
        if token is not None:
            token.add_to(bench.model, bench.tok)

    def verify(self, record: ChainRecord) -> None:
        """Applies every batch to the base weights; raises `ChainError` if a weight does not have its recorded hash."""
        state = self.base(record)
        for entry in record.batches:
            state = state.after(self.batch(entry))
            weights = state.weights()
            for layer, was in entry.layers.items():
                sha256 = digest(weights[int(layer)])
                if sha256 != was["sha256"]:
                    raise ChainError(
                        f"{self.store.path}: batch {entry.number}, layer {layer}: its updates on the base model give "
                        f"weights of hash {sha256[:12]}, recorded were {was['sha256'][:12]}; restore {entry.file} from "
                        "a copy"
                    )

    def restore(self) -> None:
        """Writes the weights of the known state again, after an edit that failed."""
        if self.state is not None and self._bench is not None:
            self.state.write(self._bench.anat)
            if self._editor is not None:
                self.put_token(self._editor.record, self._bench)

    def follow(self, record: ChainRecord) -> None:
        """Brings the model to the end of a record with fewer or other batches; does nothing if no model is loaded."""
        if self.state is not None:
            self.state = None
            self.at_end(record)

    def state_after(self, base: ChainState, entries: Sequence[BatchEntry]) -> ChainState:
        """Returns the state after the batches `entries` on top of `base`."""
        for entry in entries:
            base = base.after(self.batch(entry))
        return base

    def updates(self, record: ChainRecord) -> dict[int, LowRank]:
        """Returns the sum of all batches' updates, as factors by layer; only PRUNE needs the base model for it."""
        if record.settings.refits_totals:
            return self.state_after(self.base(record), record.batches).pruned_updates()
        totals: dict[int, LowRank] = {}
        for entry in record.batches:
            for layer, update in self.batch(entry).updates.items():
                totals[layer] = totals[layer] + update if layer in totals else update
        return totals

    def batch(self, entry: BatchEntry) -> Batch:
        """Reads a batch from its file."""
        return Batch.from_bytes(self.store.read(entry.file, entry.sha256), entry.file)
