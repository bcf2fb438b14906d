"""Write request texts into a receipt: in clear, or as salted hashes for a receipt that is shared.

A receipt names the requests by their ids alone. This module adds their texts from the requests' own file: in clear, or
as hashes that can only be checked against a text with the salt.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from editlib.errors import RequestError
from editlib.requests.reading import requests_hash
from editlib.requests.request import EditRequest

# The fields of a request in a receipt. Paraphrases and neighbours are only for evaluation.
FIELDS = ("question", "subject", "answer", "target_new")
HOW = "HMAC-SHA256 of the JSON list [field, text] under the request's own key, the HMAC-SHA256 of its id under the salt"
# Settings and facts about the edit that reveal nothing about the requests.
_OPEN = ("editlib", "algorithm", "created", "versions", "seed", "result_sha256", "stats_sha256", "layers", "timings")


def check_asked(receipt: Mapping[str, Any], requests: Sequence[EditRequest]) -> None:
    """Raises `RequestError` if `requests` are not those of the receipt."""
    if requests_hash(requests) != receipt.get("requests_sha256"):
        raise RequestError(
            "--requests: not the requests that the receipt was made for (their hash differs); give the file as it was "
            "then, under its name, since ids may follow from it"
        )


def open_receipt(receipt: Mapping[str, Any], requests: Sequence[EditRequest] | None) -> dict[str, Any]:
    """Returns the receipt; with `requests`, their texts are added under `asked`."""
    if requests is None:
        return dict(receipt)
    check_asked(receipt, requests)
    return {**receipt, "asked": [{"id": request.id, **_told(request)} for request in requests]}


def private_receipt(
    receipt: Mapping[str, Any], requests: Sequence[EditRequest], salt: bytes
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Makes the receipt without any text of the requests, and the key to its hashes, which the owner keeps.

    Every text becomes a hash under a key of its own request. So equal answers have different hashes, and one request
    can be proved by its key without revealing the others. Only fields known to contain no text are copied. The unsalted
    hash over all requests is left out, since guesses could be tested against it.

    Returns:
        (receipt, key): the key has the salt, and per request its key and its text.

    Raises:
        RequestError: `requests` are not those of the receipt.
    """
    check_asked(receipt, requests)
    keys = {request.id: _mac(salt, request.id) for request in requests}

    def hashed(name: str, field: str, text: str) -> str:
        key = keys[name] if name in keys else _mac(salt, name)
        return _mac(key, json.dumps([field, text])).hex()

    words = _words(requests)
    base, token = receipt["base"], receipt.get("token")
    public = {
        **{name: receipt[name] for name in _OPEN if name in receipt},
        "base": {"name": _without(words, re.split(r"[\\/]", str(base["name"]))[-1]), "sha256": base["sha256"]},
        "hparams": {name: _setting(words, value) for name, value in (receipt.get("hparams") or {}).items()},
        "requests": [
            {"id": hashed(entry["id"], "id", entry["id"]), **_numbers(entry), **_when(entry)}
            for entry in receipt["requests"]
        ],
        "anchors": [hashed(name, "id", name) for name in receipt.get("anchors") or ()],
        "token": token and {"token": _without(words, str(token["token"])), **_numbers(token)},
        "asked": [
            {"id": hashed(request.id, "id", request.id)}
            | {field: hashed(request.id, field, text) for field, text in _told(request).items()}
            for request in requests
        ],
        "revoked": [{"requests": item["requests"], **_when(item)} for item in receipt.get("revoked") or ()],
        **_left_out(receipt),
        **({"guessed_subjects": len(guessed)} if (guessed := receipt.get("guessed_subjects")) else {}),
        "private": HOW,
    }
    key = {
        "hash": HOW,
        "salt": salt.hex(),
        "requests_sha256": receipt["requests_sha256"],
        "requests": {
            hashed(request.id, "id", request.id): {
                "key": keys[request.id].hex(), "id": request.id, **_told(request)
            }
            for request in requests
        },
        "anchors": {hashed(name, "id", name): name for name in receipt.get("anchors") or ()},
    }  # fmt: skip
    return public, key


def _mac(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), hashlib.sha256).digest()


def _told(request: EditRequest) -> dict[str, str]:
    return {field: str(text) for field in FIELDS if (text := getattr(request, field)) is not None}


def _numbers(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if isinstance(value, (int, float))}


def _when(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"time": entry["time"]} if "time" in entry else {}


def _left_out(receipt: Mapping[str, Any]) -> dict[str, int]:
    """Counts the unusable rows of the request files, without file names, which may reveal something."""
    rows = (receipt.get("left_out") or {}).values()
    return {"left_out": sum(len(listed) for listed in rows if isinstance(listed, list))} if rows else {}


def _words(requests: Sequence[EditRequest]) -> set[str]:
    """Collects all longer words in any field of the requests."""
    text = json.dumps([request.to_dict() for request in requests], ensure_ascii=False)
    return {word.casefold() for word in re.findall(r"\w+", text) if len(word) > 3}


def _without(words: set[str], text: str) -> str:
    """Returns `text`, or a note in its place if it contains a word of the requests."""
    return "(left out)" if any(word in text.casefold() for word in words) else text


def _setting(words: set[str], value: Any) -> Any:
    """Returns a setting without its texts, since templates are the user's own words."""
    if isinstance(value, str):
        return _without(words, value) if re.fullmatch(r"[\w./-]*", value) else "(left out)"
    if isinstance(value, (list, tuple)):
        return [_setting(words, item) for item in value]
    if isinstance(value, Mapping):
        return {name: _setting(words, item) for name, item in value.items()}
    return value
