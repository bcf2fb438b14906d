"""Make the receipt of an edit: its requests, settings and base model."""

from __future__ import annotations

import json
import logging
import platform
import typing
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from editlib.algorithms.edit import EditResult
from editlib.algorithms.unierase.token import UnlearningToken
from editlib.errors import ModelError, RequestError, first_line, quote
from editlib.hparams import HyperParams
from editlib.models.prompt_settings import PromptSettings, differing
from editlib.models.prompts import Asking, PromptFormat
from editlib.requests.reading import requests_hash
from editlib.requests.request import EditRequest
from editlib.stats.file import LayerStats
from editlib.stats.store import stats_hash
from editlib.version import library_version

log = logging.getLogger(__name__)

RECEIPT = "editlib.json"


class UsedSettings(typing.Protocol):
    """Defines the interface of the settings that a receipt records; hyper-parameters and baselines have it."""

    @property
    def algorithm(self) -> str:
        """The algorithm's name."""
        ...

    @property
    def source(self) -> str:
        """The file of the settings; "" if there is none."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings JSON-ready."""
        ...


def make_receipt(
    result: EditResult,
    *,
    base: str,
    base_sha256: str,
    requests: Sequence[EditRequest],
    hparams: HyperParams,
    stats: Mapping[int, LayerStats],
    token: UnlearningToken | None,
    seed: int,
) -> dict[str, Any]:
    """Makes a receipt of requests, settings, base model and size of the change; JSON-ready."""
    return {
        **origin(base, base_sha256, requests, hparams, token, seed),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "requests": result.diagnostics,
        "anchors": list(result.anchors),
        "stats_sha256": stats_hash({layer: layer_stats.sha256() for layer, layer_stats in stats.items()}),
        "stats": {str(layer): str(layer_stats.path) for layer, layer_stats in stats.items()},
        "layers": {str(layer): result.norms[layer] for layer in hparams.edited_layers if layer in result.norms},
        **({"neurons": {str(layer): list(some) for layer, some in result.neurons.items()}} if result.neurons else {}),
        "timings": {name: round(seconds, 2) for name, seconds in result.timings.items()},
    }


def origin(
    base: str,
    base_sha256: str,
    requests: Sequence[EditRequest],
    hparams: UsedSettings,
    token: UnlearningToken | None,
    seed: int,
) -> dict[str, Any]:
    """Makes the part of a receipt that is known before the edit: base model, algorithm and settings."""
    return {
        "editlib": library_version(),
        "algorithm": hparams.algorithm,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "safetensors")},
        },
        "base": {"name": base, "sha256": base_sha256},
        "seed": seed,
        "hparams": hparams.to_dict(),
        "hparams_source": hparams.source,
        "requests_sha256": requests_hash(requests),
        "token": token
        and {
            "token": token.header.token,
            **({"tokens": list(token.names)} if len(token.names) > 1 else {}),
            "seed": token.header.seed,
            **token.header.metrics,
        },
    }


def asked_as(tok: PreTrainedTokenizerBase, how: Asking, requests: Sequence[EditRequest]) -> dict[str, Any]:
    """Makes the part of a receipt about prompts: their settings, and the first prompt as the model read it."""
    form = PromptFormat.of(tok, how)
    first = form.render(requests[0].question) if requests else None
    return {"prompts": form.settings.to_dict(), "first_prompt": first}


def prompts_of(receipt: Mapping[str, Any] | None, given: PromptSettings | None = None) -> PromptSettings | None:
    """Chooses the prompt settings for an edited model: those `given`, with a warning if they differ from its receipt,
    else those of the receipt; `None` without either."""
    recorded = None if receipt is None else receipt.get("prompts")
    if given is None or recorded is None:
        return given if recorded is None else PromptSettings.from_dict(recorded)
    now = given if given.date is not None else replace(given, date=recorded.get("date"))
    if now.to_dict() != recorded:
        log.warning("%s", differing(recorded, now.to_dict(), "the model was edited"))
    return now


def check_base(receipt: Mapping[str, Any], sha256: str, *, edited: str | Path, base: str | Path) -> None:
    """Raises `RequestError` if by its receipt `edited` was made from other weights than those of `base`, whose hash is
    `sha256`."""
    if receipt["base"]["sha256"] != sha256:
        raise RequestError(
            f"{edited} was edited from another model than {base} (see its editlib.json); give its own base"
        )


def read_receipt(folder: str | Path) -> dict[str, Any] | None:
    """Reads the receipt of an edited folder; `None` if there is none (a base model, or a name on the Hub).

    Raises:
        ModelError: a receipt that cannot be read.
    """
    path = Path(folder) / RECEIPT
    if not path.is_file():
        return None
    remedy = "make the edit again, or remove the file"
    try:
        receipt = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not a readable receipt ({first_line(error)}); {remedy}") from None
    if said := _misfit(receipt):
        raise ModelError(f"{path}: not a readable receipt ({said}); {remedy}")
    return receipt


_TEXTS = ("editlib", "algorithm", "requests_sha256")
_OBJECTS = ("base", "layers", "token", "prompts", "timings", "left_out", "guessed_subjects")


def _misfit(receipt: Any) -> str | None:
    """Names the first part of a receipt that `make_receipt` cannot have written; `None` if all parts are valid."""
    if not isinstance(receipt, dict):
        return f"{quote(receipt)}; expected an object"
    if not isinstance(receipt.get("base"), dict) or not isinstance(receipt["base"].get("sha256"), str):
        return 'key "base": no hash of the model before the edit'
    wrong = [name for name in _TEXTS if not isinstance(receipt.get(name, ""), str)]
    wrong += [name for name in _OBJECTS if not isinstance(receipt.get(name) or {}, dict)]
    wrong += ["prompts"] if receipt.get("prompts") is not None and not isinstance(receipt["prompts"], dict) else []
    if not wrong and receipt.get("token") and not isinstance(receipt["token"].get("token"), str):
        wrong.append("token")
    anchors, requests = receipt.get("anchors") or [], receipt.get("requests") or []
    if not isinstance(anchors, list) or not all(isinstance(anchor, str) for anchor in anchors):
        wrong.append("anchors")
    if not isinstance(requests, list) or not all(
        isinstance(request, dict) and isinstance(request.get("id"), str) for request in requests
    ):
        wrong.append("requests")
    if wrong:
        return f'key "{wrong[0]}": {quote(receipt[wrong[0]])}'
    try:
        PromptSettings.from_dict(receipt.get("prompts") or {})
    except RequestError as error:
        return str(error)
    return None
