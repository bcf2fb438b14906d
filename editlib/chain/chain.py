"""Keep edits in order in a folder: a chain, which can be resumed, verified, undone and revoked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
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
from editlib.chain.store import Store, summary
from editlib.errors import ChainError, RequestError
from editlib.hparams import HyperParams
from editlib.models.anatomy import Anatomy
from editlib.models.loading import DeviceMap
from editlib.models.positions import check_requests_fit
from editlib.models.prompts import PromptFormat
from editlib.requests.request import EditRequest
from editlib.workbench import Workbench


def now() -> str:
    """Returns the time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class _Notes:
    """Holds a batch's requests and anchor answers, kept in memory; its tensors are read from disk when needed."""

    requests: tuple[EditRequest, ...]
    answers: Mapping[str, Sequence[int]]

    @classmethod
    def of(cls, batch: Batch) -> _Notes:
        return cls(batch.requests, batch.answers)


class Chain:
    """Represents edits of one base model by one algorithm, in batches.

    Made by `Chain.create` or `Chain.open`. The folder holds everything except the base model and the layer statistics;
    an object of this class is a view of it. Only `add`, `undo` and `revoke` write, each in one step: a process that is
    killed leaves the chain as it was before the step or as it is after it. One process may write at a time.
    """

    def __init__(self, session: Session, clock: Callable[[], str] = now) -> None:
        """Reads the folder of `session`; see `Chain.open`."""
        self._session, self._store, self._clock = session, session.store, clock
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
        left_out: Mapping[str, Sequence[str]] | None = None,
        clock: Callable[[], str] = now,
    ) -> Chain:
        """Starts a chain without batches in the folder `path`.

        Statistics and, for UniErase, the token are found or made as in `editing.load_inputs`.

        Args:
            bench: the base model; the dtype given to `Workbench.load` is recorded with it.
            retain: prompts whose answers must stay (UniErase only); `None`: the bundled ones.
            chat: whether to ask through the chat template; `None`: as `editlib unlearn` and `editlib edit` do.
            seed: every random draw of the chain follows from it and from the requests of a batch.
            left_out: unusable rows of the retain file, by file; the record lists them.
            clock: returns the times that are recorded.

        Raises:
            EditlibError: settings that do not fit the model, or a folder that is in use. Nothing is written then.
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
            left_out=left_out,
        )
        return cls.open(path, bench, clock=clock)

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
        """Opens the chain in `path` and compares every file of it with its hash.

        Args:
            bench: the base model, if it is loaded already; otherwise it is loaded when first needed.
            model: the base model's path or id, if it is no longer the recorded one.
            stats_dir: folder of the statistics, if it is no longer the recorded one.
            device_map: devices for the base model when it is loaded; see `models.loading.load`.

        Raises:
            ChainError: no chain, or a file that is missing or damaged (named in the message).
        """
        folder = None if stats_dir is None else Path(stats_dir)
        return cls(Session(Store(path), bench, model, folder, device_map), clock)

    def _read(self) -> None:
        def notes_of(entry: BatchEntry, raw: bytes) -> _Notes:
            return _Notes.of(Batch.from_bytes(raw, entry.file))

        self.record, self._notes = self._store.read_all(notes_of)
        self._session.state = None

    @property
    def path(self) -> Path:
        """The chain's folder."""
        return self._store.path

    @property
    def batches(self) -> tuple[BatchEntry, ...]:
        """The entries of all batches, in order."""
        return self.record.batches

    @property
    def requests(self) -> list[EditRequest]:
        """All requests, in the order of their batches."""
        return [request for notes in self._notes for request in notes.requests]

    @property
    def model(self) -> PreTrainedModel:
        """The base model with all batches (and the token, if there are any) applied; loaded on first use.

        Later calls of `add`, `undo` and `revoke` on this object change it too.
        """
        return self._session.at_end(self.record).model

    @property
    def tok(self) -> PreTrainedTokenizerBase:
        """The tokenizer of `model`."""
        return self._session.at_end(self.record).tok

    @property
    def anat(self) -> Anatomy:
        """The anatomy of `model`."""
        return self._session.at_end(self.record).anat

    @property
    def base_weights(self) -> Mapping[int, Tensor]:
        """The base model's matrices of the layers that the chain may change, `[d_model, d_ff]`, on the CPU."""
        return self._session.base(self.record).base

    @property
    def token(self) -> UnlearningToken | None:
        """The tokens that a UniErase chain makes the model generate instead of the answers; `None` for other
        algorithms."""
        return self._session.token(self.record)

    def contents(self) -> Iterator[tuple[BatchEntry, Batch]]:
        """Yields every batch's entry with the content of its file, in order."""
        for entry in self.batches:
            yield entry, self._session.batch(entry)

    def steps(self) -> Iterator[tuple[BatchEntry, tuple[EditRequest, ...]]]:
        """Yields every batch's entry and requests, in order; meanwhile `model` is in the state right after that batch.

        The token is in place from the first batch on. When the iteration ends or is closed, the model is back in the
        state after the last batch.
        """
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
        """Returns the sum of all batches' updates, as factors by layer; layers that no batch has changed are absent."""
        return self._session.updates(self.record)

    def add(
        self,
        requests: Iterable[EditRequest],
        *,
        left_out: Mapping[str, Sequence[str]] | None = None,
        guessed: Mapping[str, str] | None = None,
    ) -> BatchEntry:
        """Edits `requests` as one more batch, and writes it.

        Args:
            left_out: unusable rows of the request file, by file; the record lists them.
            guessed: guessed subjects (`guess_subjects`), by id; the record lists them.

        Raises:
            RequestError: no request, one that is in the chain already, or one that lacks what the algorithm needs.
            EditlibError: the base model or the statistics have changed; no finite solution; a folder that cannot be
                written or that another process is writing. Chain and model are then unchanged.
        """
        new = list(requests)
        self._check_new(new)
        with self._store.writing():
            self._refresh()
            self._check_new(new)
            session, seed = self._session, self.record.seed_of(new)
            session.check_inputs(self.record)
            bench = session.at_end(self.record, partial(self._check_fit, new))
            before = session.state
            assert before is not None  # `at_end` sets it
            try:
                self._check_fit(new, bench)
                editor = session.editor(self.record)
                known = {question: ids for notes in self._notes for question, ids in notes.answers.items()}
                anchors = editor.anchors_for(new, self.requests, known)
                batch, result = editor.edit(before, new, anchors, seed)
                state = before.after(batch)
                weights = state.write(bench.anat)
                number = len(self.batches) + 1
                time, rows = self._clock(), {name: list(rows) for name, rows in (left_out or {}).items()}
                entry = write_entry(self._store, batch, result, weights, number, seed, time, rows, guessed or {})
                record = self.record.with_batches([*self.batches, entry])
                self._store.commit(record)
            except BaseException:
                session.restore()
                self._store.discard()
                raise
            self.record, session.state = record, state
            self._notes.append(_Notes.of(batch))
        return entry

    def _check_fit(self, new: Sequence[EditRequest], bench: Workbench) -> None:
        """Raises `RequestError` if a prompt is longer than the positions of the model, which may be a draft."""
        check_requests_fit(bench.model, PromptFormat.of(bench.tok, self.record.asking), new)

    def undo(self) -> BatchEntry:
        """Removes the last batch and returns its entry. Needs no model.

        Requests that were revoked earlier stay revoked.

        Raises:
            ChainError: the chain has no batch.
        """
        with self._store.writing():
            self._refresh()
            if not self.batches:
                raise ChainError(f"{self.path} holds no batch; there is nothing to undo")
            *remaining, last = self.batches
            record = self.record.with_batches(remaining)
            self._store.commit(record)
            self.record, self._notes = record, self._notes[:-1]
            self._session.follow(record)
        return last

    def revoke(self, ids: Iterable[str]) -> Revocation:
        """Removes single requests from any batches.

        The batches from the first affected one on are solved again on the base model with their stored values; nothing
        is optimised again. The old files are removed after the new ones are committed.

        Raises:
            ChainError: an id that is not in the chain, or no id.
            EditlibError: see `add`; the chain is then unchanged.
        """
        revoked_ids = list(dict.fromkeys(ids))
        with self._store.writing():
            self._refresh()
            known = self.record.ids
            for name in revoked_ids:
                if name not in known:
                    raise ChainError(
                        f"request {name!r} is not in {self.path}; `editlib chain log {self.path}` lists all requests"
                    )
            if not revoked_ids:
                raise ChainError("no request to revoke was given; give the id of at least one")
            numbers = tuple(sorted({known[name].number for name in revoked_ids}))
            revocation = Revocation(self._clock(), tuple(revoked_ids), numbers)
            try:
                kept, made = replayed(
                    self._session, self.record, frozenset(revoked_ids), [notes.answers for notes in self._notes]
                )
                record = replace(self.record.with_batches(kept), revoked=(*self.record.revoked, revocation))
                self._store.commit(record)
            except BaseException:
                self._session.restore()
                self._store.discard()
                raise
            unchanged = self._notes[: len(kept) - len(made)]
            self.record, self._notes = record, [*unchanged, *map(_Notes.of, made)]
            self._session.follow(record)
        return revocation

    def verify(self) -> None:
        """Checks every file and the base model against their hashes, and recomputes the weights after each batch.

        Raises:
            ChainError: the first difference; names the file, or the batch and layer.
        """
        self._read()
        self._session.verify(self.record)

    def apply_to(self, model: PreTrainedModel, tok: PreTrainedTokenizerBase) -> None:
        """Applies all batches (and the token, if there are any) to another copy of the base model, in place.

        Raises:
            ChainError: `model` is not the chain's base model, or not in its dtype.
        """
        Session(self._store, Workbench.of(model, tok)).at_end(self.record)

    def status(self) -> dict[str, Any]:
        """Returns a summary of the chain and its batches, JSON-ready; see `store.summary`."""
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
                    "remove one of the two"
                )
            ids[request.id], questions[request.question] = "this batch", request.id

    def _refresh(self) -> None:
        """Reads the folder again if another process has written it; called while holding the lock."""
        if self._store.record() != self.record:
            self._read()
