"""A chain: edits in order, kept in a folder, that can be resumed, verified, undone and revoked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib import editing
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.unierase.token import UnlearningToken
from editlib.chain.batch import Batch
from editlib.chain.create import start
from editlib.chain.editing import write_entry
from editlib.chain.record import BatchEntry, Revocation
from editlib.chain.replay import replayed
from editlib.chain.session import Session
from editlib.chain.store import TOKEN, Store, summary
from editlib.errors import ChainError, RequestError
from editlib.hparams import HyperParams
from editlib.models.anatomy import Anatomy
from editlib.models.loading import DeviceMap
from editlib.models.positions import check_requests_fit
from editlib.models.prompts import PromptFormat
from editlib.requests.request import EditRequest
from editlib.workbench import Workbench


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class _Notes:
    """What of a batch is always at hand."""

    requests: tuple[EditRequest, ...]
    answers: Mapping[str, Sequence[int]]

    @classmethod
    def of(cls, batch: Batch) -> _Notes:
        return cls(batch.requests, batch.answers)


class Chain:
    """Edits of one base model by one algorithm, in batches.

    The folder holds all of it but the base model and the layer statistics; an object of this class is a view of it.
    Only `add`, `undo` and `revoke` write, each in one step: a process killed in any of them leaves the chain as it was
    before or as it is after. One process may write at a time.
    """

    def __init__(
        self,
        path: str | Path,
        bench: Workbench | None = None,
        *,
        model: str | None = None,
        stats_dir: str | Path | None = None,
        device_map: DeviceMap = None,
        clock: Callable[[], str] = now,
    ) -> None:
        self._store, self._clock = Store(path), clock
        self._session = Session(self._store, bench, model, None if stats_dir is None else Path(stats_dir), device_map)
        self._read()

    @classmethod
    def create(
        cls,
        path: str | Path,
        bench: Workbench,
        hparams: HyperParams,
        *,
        retain: Sequence[EditRequest] | None = None,
        token: Path | None = None,
        chat: bool | None = None,
        corpus: str = "wiki-sample",
        stats_tokens: int | None = None,
        seed: int = 0,
        clock: Callable[[], str] = now,
    ) -> Chain:
        """A new chain in the folder `path`, without batches.

        Statistics and, for UniErase, the token are found or made as by `editing.unlearn` and `editing.edit`.

        Args:
            bench: the base model; `Workbench.load` remembers a dtype that is not the stored one.
            retain: prompts whose answers must stay (UniErase only); `None`: the bundled ones.
            chat: ask through the chat template; `None`: as `editlib unlearn` and `editlib edit` do.
            seed: every random draw of the chain follows from it and from what a batch asks.
            clock: gives the times that are recorded.

        Raises:
            EditlibError: settings that do not fit, a folder that is no place for a chain; nothing is written then.
        """
        start(
            Path(path),
            bench,
            hparams,
            created=clock(),
            retain=retain,
            token=token,
            chat=chat,
            corpus=corpus,
            stats_tokens=stats_tokens,
            seed=seed,
        )
        return cls(path, bench, clock=clock)

    @classmethod
    def open(
        cls,
        path: str | Path,
        bench: Workbench | None = None,
        *,
        model: str | None = None,
        stats_dir: str | Path | None = None,
        device_map: DeviceMap = None,
        clock: Callable[[], str] = now,
    ) -> Chain:
        """The chain in `path`; every file of it is compared with its hash.

        Args:
            bench: the base model, when it is loaded already; otherwise it is loaded when it is needed.
            model: where the base model lies now, if not where it was.
            stats_dir: where the statistics lie now, if not where they were.
            device_map: where the base model is put when it is loaded; see `models.loading.load`.

        Raises:
            ChainError: no chain, or a file that is missing or damaged (named).
        """
        return cls(path, bench, model=model, stats_dir=stats_dir, device_map=device_map, clock=clock)

    def _read(self) -> None:
        def look(entry: BatchEntry, raw: bytes) -> _Notes:
            return _Notes.of(Batch.from_bytes(raw, entry.file))

        self.record, self._notes = self._store.read_all(look)
        self._session.state = None

    @property
    def path(self) -> Path:
        return self._store.path

    @property
    def batches(self) -> tuple[BatchEntry, ...]:
        return self.record.batches

    @property
    def requests(self) -> list[EditRequest]:
        """All requests, in the order of their batches."""
        return [request for notes in self._notes for request in notes.requests]

    @property
    def model(self) -> PreTrainedModel:
        """The base model with all batches (and then the token) in place, loaded when first asked for. Later `add`,
        `undo` and `revoke` of this object change it too."""
        return self._session.at_end(self.record).model

    @property
    def tok(self) -> PreTrainedTokenizerBase:
        """The tokenizer of `model`."""
        return self._session.at_end(self.record).tok

    @property
    def anat(self) -> Anatomy:
        """Of `model`."""
        return self._session.at_end(self.record).anat

    @property
    def base_weights(self) -> Mapping[int, Tensor]:
        """The base model's matrices of the layers that the chain may change, `[d_model, d_ff]`, on the CPU."""
        return self._session.base(self.record).base

    @property
    def token(self) -> UnlearningToken | None:
        """The unlearning token, of a UniErase chain."""
        return UnlearningToken.load(self.path / TOKEN) if TOKEN in self.record.files else None

    def contents(self) -> Iterator[tuple[BatchEntry, Batch]]:
        """Every batch with what its file holds, in order."""
        for entry in self.batches:
            yield entry, self._session.batch(entry)

    def steps(self) -> Iterator[tuple[BatchEntry, tuple[EditRequest, ...]]]:
        """Every batch with its requests, in order, while `model` is what it was right after it (with the token, from
        the first on). When the iteration ends, or is closed, the model is at the chain's end again."""
        session, record = self._session, self.record
        bench, state = session.at_end(record), session.base(record)
        try:
            for entry, notes in zip(record.batches, self._notes, strict=True):
                state = state.after(session.batch(entry))
                state.write(bench.anat)
                yield entry, notes.requests
        finally:
            session.restore()

    def updates(self) -> dict[int, LowRank]:
        """What the whole chain adds to the base weights, as factors by layer; in no layer that no batch has changed."""
        return self._session.updates(self.record)

    def add(self, requests: Iterable[EditRequest]) -> BatchEntry:
        """Edits `requests` as one more batch.

        Raises:
            RequestError: none given, or one that is in the chain already, or lacks what the algorithm needs.
            EditlibError: the base model or the statistics are not what they were; no finite solution; a folder that
                cannot be written or that another process writes. The chain and the model are what they were before.
        """
        new = list(requests)
        self._check_new(new)
        with self._store.writing():
            self._refresh()
            self._check_new(new)
            session, seed = self._session, self.record.seed_of(new)
            bench = session.at_end(self.record)
            try:
                form = PromptFormat.of(bench.tok, self.record.asking)
                check_requests_fit(bench.model, form, new)
                editor = session.editor(self.record)
                known = {question: ids for notes in self._notes for question, ids in notes.answers.items()}
                anchored = editor.anchored(new, self.requests, known)
                batch, result = editor.edit(session.state, new, anchored, seed)
                ahead = session.state.after(batch)
                weights = ahead.write(bench.anat)
                number = len(self.batches) + 1
                entry = write_entry(self._store, batch, result, weights, number, seed, self._clock())
                record = self.record.with_batches([*self.batches, entry])
                self._store.commit(record)
            except BaseException:
                session.restore()
                self._store.discard()
                raise
            self.record, session.state = record, ahead
            self._notes.append(_Notes.of(batch))
        return entry

    def undo(self) -> BatchEntry:
        """Takes the last batch back, as it stands now, and returns what it was. Needs no model.

        A revocation before is not undone by it.

        Raises:
            ChainError: there is no batch.
        """
        with self._store.writing():
            self._refresh()
            if not self.batches:
                raise ChainError(f"{self.path} holds no batch; there is nothing to undo")
            *left, last = self.batches
            record = self.record.with_batches(left)
            self._store.commit(record)
            self.record, self._notes = record, self._notes[:-1]
            self._session.moved(record)
        return last

    def revoke(self, ids: Iterable[str]) -> Revocation:
        """Takes single requests out, whatever batches they are in.

        The batches from the first of these on are replayed on the base model with what they found before: no target
        state is looked for again. Files of before are removed once the new ones count.

        Raises:
            ChainError: an id that is not in the chain, or none given.
            EditlibError: see `add`; the chain is what it was before.
        """
        gone = list(dict.fromkeys(ids))
        with self._store.writing():
            self._refresh()
            known = self.record.ids
            for name in gone:
                if name not in known:
                    raise ChainError(
                        f"request {name!r} is not in {self.path}; `editlib chain log {self.path}` lists those that are"
                    )
            if not gone:
                raise ChainError("no request to revoke was given; give the id of at least one")
            numbers = tuple(sorted({known[name].number for name in gone}))
            taken = Revocation(self._clock(), tuple(gone), numbers)
            try:
                kept, made = replayed(
                    self._session, self.record, frozenset(gone), [notes.answers for notes in self._notes]
                )
                record = replace(self.record.with_batches(kept), revoked=(*self.record.revoked, taken))
                self._store.commit(record)
            except BaseException:
                self._session.restore()
                self._store.discard()
                raise
            same = self._notes[: len(kept) - len(made)]
            self.record, self._notes = record, [*same, *map(_Notes.of, made)]
            self._session.moved(record)
        return taken

    def verify(self) -> None:
        """Compares every file with its hash, the base model with its own, and the weights that the recorded updates
        give on the base model with those that were there after each batch.

        Raises:
            ChainError: the first difference, by file, or by batch and layer.
        """
        self._read()
        self._session.verify(self.record)

    def apply_to(self, model: PreTrainedModel, tok: PreTrainedTokenizerBase) -> None:
        """Puts all batches (and then the token) into another copy of the base model, in place.

        Raises:
            ChainError: `model` is not the chain's base model, or not in its dtype.
        """
        Session(self._store, Workbench.of(model, tok)).at_end(self.record)

    def status(self) -> dict[str, Any]:
        """What the chain is and holds, JSON-ready."""
        return summary(self._store, self.record)

    def _check_new(self, new: Sequence[EditRequest]) -> None:
        editing.check_wanted(new, self.record.settings)
        ids = {request.id: f"batch {self.record.ids[request.id].number}" for request in self.requests}
        questions = {request.question: request.id for request in self.requests}
        for request in new:
            where = request.source or f"request {request.id}"
            if request.id in ids:
                raise RequestError(f"{where}: id {request.id!r} is in the chain already ({ids[request.id]}); rename it")
            if request.question in questions:
                raise RequestError(
                    f"{where}: asks the same as request {questions[request.question]!r}, {request.question!r}; "
                    "take one of the two out"
                )
            ids[request.id], questions[request.question] = "this batch", request.id

    def _refresh(self) -> None:
        """Reads the folder again where another process wrote it since; called by the only writer."""
        if self._store.record() != self.record:
            self._read()
