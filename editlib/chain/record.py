"""Hold the record `chain.json`: a chain's initial inputs and its batches, with a hash of the content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from editlib.chain.shape import misfit
from editlib.errors import ChainError, quote
from editlib.hparams import ALGORITHMS, HyperParams
from editlib.models.prompt_settings import PromptSettings
from editlib.models.prompts import Asking
from editlib.requests.reading import requests_hash
from editlib.requests.request import EditRequest

FORMAT = 1  # increased when older chains can no longer be read


@dataclass(frozen=True)
class BatchEntry:
    """Describes one batch in `chain.json`.

    `layers` maps a layer's number to the hash of its weight after the batch (`sha256`), the Frobenius norm of the
    batch's update (`update`), and that norm divided by the norm of the weight before it (`ratio`). `left_out` lists the
    rows of the request files that could not be used, by file, and `guessed_subjects` those that no file named, by id.
    """

    number: int
    file: str
    sha256: str
    time: str
    editlib: str
    seed: int
    keys: int
    ids: tuple[str, ...]
    layers: Mapping[str, Mapping[str, Any]]
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    guessed_subjects: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Revocation:
    """Records when requests were revoked, and the numbers that their batches had then."""

    time: str
    ids: tuple[str, ...]
    batches: tuple[int, ...]


@dataclass(frozen=True)
class ChainRecord:
    """Holds the content of `chain.json` without its hash.

    `base` holds the model's `name`, `sha256`, the `dtype` it is loaded in and the hash of each weight to be edited
    (`layers`); `statistics` path and hash by layer; `files` the hashes of the token and retain prompts in the folder;
    `left_out` the rows of the retain file that could not be used.
    """

    format: int
    created: str
    base: Mapping[str, Any]
    algorithm: str
    hparams: Mapping[str, Any]
    chat: bool | None
    seed: int
    templates: tuple[str, ...]
    statistics: Mapping[str, Mapping[str, str]]
    files: Mapping[str, str]
    batches: tuple[BatchEntry, ...] = ()
    revoked: tuple[Revocation, ...] = ()
    prompts: Mapping[str, Any] = field(default_factory=dict)  # see `PromptSettings`; empty: only `chat` applies
    hparams_source: str = ""
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def asking(self) -> Asking:
        """How the model is asked."""
        return PromptSettings.from_dict(self.prompts) if self.prompts else self.chat

    @property
    def settings(self) -> HyperParams:
        """The hyper-parameters as an object."""
        hparams = ALGORITHMS[self.algorithm].from_dict(dict(self.hparams), "chain.json")
        return replace(hparams, source=self.hparams_source)

    @property
    def ids(self) -> dict[str, BatchEntry]:
        """Every request's id with the entry of its batch."""
        return {name: entry for entry in self.batches for name in entry.ids}

    def with_batches(self, batches: Sequence[BatchEntry]) -> ChainRecord:
        """Copies the record with other batches."""
        return replace(self, batches=tuple(batches))

    def seed_of(self, requests: Sequence[EditRequest]) -> int:
        """Derives the seed of a batch from the chain's seed and the requests, so that a retry uses the same one."""
        digest = hashlib.sha256(f"{self.seed}:{requests_hash(requests)}".encode())
        return int.from_bytes(digest.digest()[:4], "big")

    def to_bytes(self) -> bytes:
        """Serialises the record; equal content gives equal bytes."""
        content = asdict(self)
        for part in (content, *content["batches"]):
            for name in ("left_out", "guessed_subjects"):
                if not part.get(name, True):  # absent, as in files of versions that do not know it
                    del part[name]
        return _render({**content, "sha256": _hash(content)})

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> ChainRecord:
        """Reads the bytes that `to_bytes` wrote; `where` names the file in errors.

        Raises:
            ChainError: a byte was changed, or the format is of another version.
        """
        try:
            content = json.loads(raw.decode("utf-8"))
            recorded = content.pop("sha256")
            sound = recorded == _hash(content) and raw == _render({**content, "sha256": recorded})
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise ChainError(
                f"{where}: damaged: it does not have the hash that is written in it; restore it from a copy"
            )
        if content.get("format") != FORMAT:
            raise ChainError(
                f"{where}: has format {content.get('format')!r}, this editlib reads {FORMAT}; open it with the version "
                "that wrote it"
            )
        try:
            if wrong := misfit(content):
                raise TypeError(wrong)
            batches = [_made(BatchEntry, entry) for entry in content.pop("batches")]
            revoked = [_made(Revocation, entry) for entry in content.pop("revoked")]
            record: ChainRecord = _made(cls, {**content, "batches": batches, "revoked": revoked})
        except (TypeError, KeyError, AttributeError) as error:
            raise ChainError(f"{where}: not the content of a chain ({error}); restore it from a copy") from None
        if record.algorithm not in ALGORITHMS:
            raise ChainError(
                f"{where}: its algorithm {quote(record.algorithm)} is not known; open it with the version that wrote it"
            )
        return record


def sha256(raw: bytes) -> str:
    """Computes the SHA-256 of a file's bytes, in hex."""
    return hashlib.sha256(raw).hexdigest()


def _made(kind: Any, values: Mapping[str, Any]) -> Any:
    """Makes a dataclass from JSON values; lists become tuples."""
    known = {field.name for field in fields(kind)}
    if unknown := set(values) - known:
        raise KeyError(sorted(unknown)[0])
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _hash(content: Mapping[str, Any]) -> str:
    return sha256(_render(content))


def _render(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode("ascii")
