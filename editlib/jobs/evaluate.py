"""Run `editlib eval`: from two models and a protocol to metrics.json and pages, in one of three modes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from editlib.chain import Chain
from editlib.chain.export import chain_receipt, check_filled
from editlib.chain.store import RECORD
from editlib.errors import RequestError
from editlib.evaluation.protocol import NamedModel, Protocol
from editlib.export import asked_as, read_receipt
from editlib.export.receipt import check_base, prompts_of
from editlib.files import check_output
from editlib.models.anatomy import Anatomy, anatomy
from editlib.models.loading import DeviceMap, load
from editlib.models.outline import Outline, load_checked, outline_of
from editlib.models.prompt_settings import PromptSettings
from editlib.models.prompts import PromptFormat, settled
from editlib.models.source import check_model
from editlib.models.thinking import warn_of_block
from editlib.models.weights import weights_sha256
from editlib.reports.tables import write_table
from editlib.requests.request import EditRequest
from editlib.version import library_version

log = logging.getLogger(__name__)


def is_chain(path: str | Path) -> bool:
    """Returns whether a folder is a chain and not a model."""
    return (Path(path) / RECORD).is_file()


def batch(protocol: Protocol, base: NamedModel, edited: Edited, request: str | None = None) -> dict[str, Any]:
    """Measures all requests after the whole edit."""
    return protocol.measure(base, edited.side(), protocol.requests)


def sequential(protocol: Protocol, base: NamedModel, edited: Edited, request: str | None = None) -> dict[str, Any]:
    """Measures all requests so far, after every batch of a chain; returns the last measurement with all `points`."""
    metrics: dict[str, Any] = {}
    points = []
    with closing(edited.steps(protocol.requests)) as steps:
        for number, so_far, side in steps:
            metrics = protocol.measure(base, side, so_far)
            points.append({"batch": number, "requests": len(so_far), **protocol.headline(metrics)})
            log.info("batch %d, %d requests so far", number, len(so_far))
    return {**metrics, "points": points}


def single(protocol: Protocol, base: NamedModel, edited: Edited, request: str | None = None) -> dict[str, Any]:
    """Measures one request; all others should still be answered."""
    wanted = [other for other in protocol.requests if other.id == request]
    others = [other for other in protocol.requests if other.id != request]
    return {**protocol.measure(base, edited.side(), wanted, others), "request": request}


ChainStep = tuple[int, list[EditRequest], NamedModel]
"""A batch's number, the requests that were edited so far, and the model after it."""

Mode = Callable[[Protocol, NamedModel, "Edited", str | None], dict[str, Any]]
MODES: Mapping[str, Mode] = {"batch": batch, "sequential": sequential, "single": single}
OLD_MODES = {"precise": "single"}
"""Earlier names of modes, which are still accepted."""


def check_mode(protocol: Protocol, edited: str, mode: str, request: str | None) -> None:
    """Raises `RequestError` for a mode that is unknown or does not fit the edit; call it before models are loaded."""
    mode = OLD_MODES.get(mode, mode)
    if mode not in MODES:
        raise RequestError(f"--mode {mode!r}: expected one of {', '.join(MODES)}")
    if mode == "sequential" and not is_chain(edited):
        raise RequestError(f"{edited} is not a chain; --mode sequential follows the batches of one (`editlib chain`)")
    if mode != "single":
        if request is not None:
            raise RequestError("--request is for --mode single; leave one of the two out")
        return
    if request is None:
        raise RequestError("--mode single needs --request with the id of the one that was forgotten")
    ids = [known.id for known in protocol.requests]
    if request not in ids:
        raise RequestError(f"--request {request!r}: no request has this id; expected one of {', '.join(ids[:3])}, ...")


class Edited:
    """Loads the edited model: a folder, or a chain with its state after each batch."""

    def __init__(
        self,
        path: str,
        base: str,
        dtype: str | None,
        device_map: DeviceMap,
        prompts: PromptSettings | None = None,
    ) -> None:
        self.path, self._base, self._dtype, self._device_map = path, base, dtype, device_map
        self._chain = Chain.open(path, model=base, device_map=device_map) if is_chain(path) else None
        self._receipt = None if self._chain is not None else read_receipt(path)
        recorded: Mapping[str, Any] | None = self._receipt
        if self._chain is not None:
            asking = self._chain.record.asking
            how = asking if isinstance(asking, PromptSettings) else PromptSettings(chat=asking)
            recorded = {"prompts": how.to_dict()}
        self.prompts = prompts_of(recorded, prompts)  # how both models are asked, if known
        self._side: NamedModel | None = None

    def check(self, protocol: Protocol, *, follow: bool = False) -> None:
        """Checks what can be checked before a model is loaded: the edited folder, prompts, a chain's requests.

        Args:
            follow: the chain is followed batch by batch.

        Raises:
            EditlibError: what does not fit.
        """
        check_model(self._base)
        if self._chain is not None:
            check_filled(self._chain)
            if follow:
                self._check_requests(protocol.requests)
            return
        check_model(self.path)
        settled(outline_of(self.path, dtype=self._dtype).tok, self.prompts)

    def check_base(self, sha256: str) -> None:
        """Raises `RequestError` if the edit was made from other weights than those of the base, which have this
        hash."""
        if self._receipt is not None and self._dtype is None:  # in another dtype, the same weights have another hash
            check_base(self._receipt, sha256, edited=self.path, base=self._base)

    def side(self) -> NamedModel:
        """Returns the model after the whole edit."""
        if self._side is None:
            if self._chain is not None:
                chain, receipt = self._chain, chain_receipt(self._chain)
                self._side = self._named(chain.anat, chain.tok, receipt)
            else:
                model, tok = load(self.path, dtype=self._dtype, device_map=self._device_map)
                self._side = self._named(anatomy(model), tok, self._receipt)
        return self._side

    def _named(self, anat: Anatomy, tok: PreTrainedTokenizerBase, receipt: Mapping[str, Any] | None) -> NamedModel:
        sha256 = weights_sha256(anat.model)
        return NamedModel(anat, tok, settled(tok, self.prompts), name=self.path, sha256=sha256, receipt=receipt)

    def steps(self, requests: Sequence[EditRequest]) -> Generator[ChainStep, None, None]:
        """Yields after each batch of the chain its number, the `requests` that were edited so far, and the model.

        Raises:
            RequestError: this is not a chain, or its requests are not among `requests`.
        """
        if self._chain is None:
            raise RequestError(
                f"{self.path} is not a chain; --mode sequential follows the batches of one (`editlib chain`)"
            )
        self._check_requests(requests)
        receipt = chain_receipt(self._chain)
        so_far: set[str] = set()
        for entry, batch_requests in self._chain.steps():
            so_far |= {request.question for request in batch_requests}
            chain = self._chain
            side = self._named(chain.anat, chain.tok, receipt)
            yield entry.number, [request for request in requests if request.question in so_far], side

    def _check_requests(self, requests: Sequence[EditRequest]) -> None:
        """Raises `RequestError` if the chain has requests that are not measured, or one is to be measured twice."""
        first: dict[str, EditRequest] = {}
        for wanted in requests:
            if (other := first.setdefault(wanted.question, wanted)) is not wanted:
                raise RequestError(
                    f"{wanted.source or f'request {wanted.id}'}: asks the same as request {other.id!r}, "
                    f"{wanted.question!r}; a chain holds a question once: remove one of the two"
                )
        held = [] if self._chain is None else self._chain.requests
        strange = {wanted.question for wanted in held} - {request.question for request in requests}
        if strange:
            raise RequestError(
                f"{self.path}: {len(strange)} of its requests are not among the measured ones "
                f"({next(iter(sorted(strange)))!r}); give the requests of that edit"
            )


def evaluate_models(
    protocol: Protocol,
    base: str,
    edited: str,
    out: Path,
    *,
    mode: str = "batch",
    request: str | None = None,
    dtype: str | None = None,
    device_map: DeviceMap = None,
    prompts: PromptSettings | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Loads both models, measures them by `protocol`, and writes its results to `out`.

    Args:
        edited: a model or a folder of a chain.
        mode: one of `MODES`.
        request: the id of the one request of `single`.
        prompts: how both models are asked; `None`: as recorded in the edit's receipt.

    Raises:
        EditlibError: any input that does not fit; nothing is written then.
    """
    out = Path(out)
    check_output(out, overwrite=overwrite)
    check_mode(protocol, edited, mode, request)
    mode = OLD_MODES.get(mode, mode)
    after = Edited(edited, base, dtype, device_map, prompts)
    after.check(protocol, follow=mode == "sequential")

    def look(outline: Outline) -> None:
        form = PromptFormat.of(outline.tok, settled(outline.tok, after.prompts))
        warn_of_block(form)
        protocol.check(outline.model, form)

    model, tok = load_checked(base, look, dtype=dtype, device_map=device_map)
    before = NamedModel(anatomy(model), tok, name=base, sha256=weights_sha256(model))
    after.check_base(before.sha256)
    measured = MODES[mode](protocol, before, after, request)
    side = after.side()
    metrics = {
        "editlib": library_version(),
        "protocol": protocol.name,
        "mode": mode,
        "base": {"name": base, "sha256": before.sha256},
        "edited": {"name": str(edited), "sha256": side.sha256},
        **measured,
        **asked_as(side.tok, side.prompts, protocol.requests),
        "receipt": side.receipt,
    }
    out.mkdir(parents=True, exist_ok=True)
    protocol.write(metrics, out)
    if points := measured.get("points"):
        write_table(point_rows(points), out / "points.md")
    protocol.finish()
    return metrics


def point_rows(points: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Builds the head and one row per batch, with the headline numbers of the edited model."""

    def shown(value: object) -> str:
        return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    names = list(dict.fromkeys(name for point in points for name in point))
    head = [name.replace("_", " ") for name in names]
    return [head, *[[shown(point.get(name)) for name in names] for point in points]]
