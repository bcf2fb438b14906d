"""Write a receipt to share: JSON and one self-contained HTML page with the requests and results of an edit."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from editlib.errors import ModelError, RequestError
from editlib.export import Delta, read_receipt
from editlib.export.private import open_receipt, private_receipt
from editlib.files import atomic_folder, atomic_path, check_file, check_output, write_json
from editlib.reports.page import filled, groups, headline, plain, verdict_line
from editlib.reports.summary import RATIO, SHARES, number, rows, verdict
from editlib.requests.reading import read_requests
from editlib.requests.request import EditRequest

KINDS = {
    "request": "questions to forget or edit",
    "paraphrase": "paraphrases of them",
    "neighbour": "neighbours",
    "same_subject": "other questions about the same subjects",
    "same_subject_anchored": "other questions about them, in relations that were held",
    "crossed": "other questions about them, in relations that others lose",
}
HASH = 16  # hex digits of a hash that the page shows


def write_receipt(
    edited: str | Path,
    out: str | Path,
    *,
    requests_file: Path | None = None,
    metrics_file: Path | None = None,
    private: bool = False,
    skip_bad: bool = False,
    overwrite: bool = False,
) -> tuple[Path, Path | None]:
    """Writes `receipt.json` and `receipt.html` for an edited folder, or a delta file, to the folder `out`.

    Args:
        requests_file: the request file; without it the receipt has ids only.
        metrics_file, private: see `write_pages`.
        skip_bad: leave out unusable rows of `requests_file`, see `read_requests`; the receipt lists them.

    Returns:
        The page, and the key's file when `private`.

    Raises:
        EditlibError: any input that does not fit; nothing is written then.
    """
    check_place(Path(out), private=private, overwrite=overwrite, inputs=(edited, requests_file, metrics_file))
    receipt = _receipt_of(edited)
    rows: dict[str, list[str]] = {}
    requests = None
    if requests_file is not None:
        requests = read_requests(requests_file, skip_bad=skip_bad, left_out=rows)
    if rows:
        receipt["left_out"] = {**(receipt.get("left_out") or {}), **rows}
    return write_pages(receipt, requests, Path(out), metrics_file=metrics_file, private=private, overwrite=overwrite)


def write_pages(
    receipt: Mapping[str, Any],
    requests: Sequence[EditRequest] | None,
    out: Path,
    *,
    metrics_file: Path | None = None,
    private: bool = False,
    overwrite: bool = False,
) -> tuple[Path, Path | None]:
    """Writes `receipt` with its part about `requests` to the folder `out`, as JSON and as a page.

    Args:
        metrics_file: `metrics.json` of `editlib eval` for this edited model.
        private: hashes instead of text. Their key is written beside `out`, never into it, for the owner alone.

    Returns:
        The page, and the key's file when `private`.

    Raises:
        EditlibError: any input that does not fit; nothing is written then.
    """
    key_file = check_place(out, private=private, overwrite=overwrite)
    key: dict[str, Any] = {}
    if private:
        if requests is None:
            raise RequestError("--private needs --requests, to know what must not be in the receipt")
        # The only random number without a seed: anyone who can repeat it can test guesses against the hashes.
        shown, key = private_receipt(receipt, requests, secrets.token_bytes(32))
    else:
        shown = open_receipt(receipt, requests)
    if metrics_file is not None:
        shown["metrics"] = numbers_of(_metrics_of(metrics_file, receipt))
    text = page(shown)
    with atomic_folder(out, overwrite=overwrite) as folder:
        write_json(folder / "receipt.json", shown, sort_keys=True)
        (folder / "receipt.html").write_bytes(text.encode("utf-8", "replace"))
        if key_file is not None:
            _write_secret(key_file, _dumped(key))
    return out / "receipt.html", key_file


def check_place(out: Path, *, private: bool, overwrite: bool, inputs: Iterable[str | Path | None] = ()) -> Path | None:
    """Returns the key's file, if there will be one; raises `OutputError` if it or the folder cannot be written."""
    key_file = key_path(out) if private else None
    check_output(out, overwrite=overwrite, inputs=inputs)
    if key_file is not None:
        check_file(key_file, overwrite=overwrite)
    return key_file


def key_path(out: Path) -> Path:
    """Returns the path of a private receipt's key: beside its folder, which can then be published unchanged."""
    return out.with_name(f"{out.name}.private.json")


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Reads from `metrics.json` the known measures and the counts of right answers before and after, without texts."""
    known = [name for name in [*SHARES, RATIO] if name in metrics or name in (metrics.get("groups") or {})]
    numbers: dict[str, Any] = {"groups": {}, "answers": {}}
    for name in known:
        group = {"value": metrics.get(name), **((metrics.get("groups") or {}).get(name) or {})}
        ends = [number(end) for end in group.get("interval") or ()]
        numbers["groups"][name] = {
            **{part: number(group.get(part)) for part in ("value", "n", "right")},
            **({"interval": ends} if ends else {}),
        }
    perplexity = metrics.get("perplexity") or {}
    numbers["perplexity"] = {side: number(perplexity.get(side)) for side in ("before", "after")}
    for kind in KINDS:
        items = [item for item in metrics.get("items") or () if item.get("kind") == kind]
        if items:
            right = {side: sum(bool(item.get(f"right_{side}")) for item in items) for side in ("before", "after")}
            refused = sum(bool(item.get("refused_after")) for item in items)
            numbers["answers"][kind] = {"n": len(items), **right, "refused": refused}
    return numbers


def page(receipt: Mapping[str, Any]) -> str:
    """Builds the page of a complete receipt; equal receipts give equal pages."""
    forgets, base = bool(receipt.get("token")), str(receipt["base"]["name"])
    count = len(receipt["requests"])
    metrics = receipt.get("metrics")
    done = "unlearned from" if forgets else "edited in"
    title = f"{count} {'fact' if count == 1 else 'facts'} {done} {base}"
    by = f"by editlib {receipt.get('editlib')} with {receipt.get('algorithm')}, {when_of(receipt.get('created', ''))}"
    return filled(
        __package__,
        "receipt",
        title=escape(f"{title} · receipt"),
        heading=escape(title),
        models=escape(by),
        summary=verdict_line(verdict(metrics) if metrics else "No measurements were given."),
        note=escape(_note(receipt)),
        asked="\n".join(_asked(receipt)),
        measures="\n".join(_measures(metrics)) if metrics else "",
        details="\n".join(_details(receipt)),
        footer=escape(f"editlib {receipt.get('editlib')}"),
    )


def _note(receipt: Mapping[str, Any]) -> str:
    if "private" in receipt:
        return (
            f"Hashes replace texts, here their first {HASH} digits: {receipt['private']}. "
            "Who made the edit holds the salt."
        )
    return "" if "asked" in receipt else "The receipt tells ids only; the texts are in the file of the requests."


def _asked(receipt: Mapping[str, Any]) -> Iterator[str]:
    """Yields a row for each request: its texts, and the result of its edit."""
    private = "private" in receipt
    entries: Sequence[Mapping[str, Any]] = receipt["requests"]
    texts = {item["id"]: item for item in receipt.get("asked") or ()}
    fields = [field for field in ("question", "subject", "answer", "target_new") if _any(texts.values(), field)]
    measured = [name for name in dict.fromkeys(name for entry in entries for name in entry) if name != "id"]
    heads = ["id", *[field.replace("_", " ") for field in fields], *[name.replace("_", " ") for name in measured]]
    yield '<table class="stack">\n<thead><tr>'
    yield "".join(f'<th scope="col">{escape(head)}</th>' for head in heads) + "</tr></thead>\n<tbody>"
    for entry in entries:
        asked = texts.get(entry["id"], {})
        cells = [str(asked.get(field, "")) for field in fields]
        name = str(entry["id"])
        if private:
            name, *cells = (f"{text[:HASH]}…" if text else "" for text in (name, *cells))
        cells += [plain(entry.get(item)) for item in measured]
        yield f'<tr><th scope="row" dir="auto">{escape(name)}</th>' + "".join(
            f'<td data-label="{escape(head)}" dir="auto">{escape(cell)}</td>'
            for head, cell in zip(heads[1:], cells, strict=True)
        )
        yield "</tr>"
    yield "</tbody>\n</table>"
    for item in receipt.get("revoked") or ():
        ids = item["ids"] if isinstance(item.get("ids"), list) else []
        count = "1 request" if item["requests"] == 1 else f"{item['requests']} requests"
        yield f"<p>Taken back {escape(when_of(item['time']))}: {escape(', '.join(map(str, ids)) or count)}</p>"


def when_of(time: object) -> str:
    """Formats a time as a person would write it."""
    return str(time).replace("T", " ").replace("+00:00", " UTC")


def _any(texts: Any, field: str) -> bool:
    return any(field in text for text in texts)


def _measures(metrics: Mapping[str, Any]) -> Iterator[str]:
    yield '<section aria-labelledby="measures">\n<h2 id="measures">Before and after</h2>'
    if metrics["answers"]:
        yield _head("questions", numbers=("n", "right before", "right after", "refused after"))
        for kind, entry in metrics["answers"].items():
            labels = {"n": "n", "before": "right before", "after": "right after", "refused": "refused after"}
            yield f'<tr><th scope="row">{KINDS[kind]}</th>' + "".join(
                f'<td class="number" data-label="{label}">{entry[part]}</td>' for part, label in labels.items()
            )
            yield "</tr>"
        yield "</tbody>\n</table>"
    yield _head("metric", numbers=("value", "n"), texts=("95 % interval", "direction", "meaning"))
    yield from map(headline, rows(metrics))
    yield "</tbody>\n</table>\n</section>"


def _head(first: str, *, numbers: Sequence[str], texts: Sequence[str] = ()) -> str:
    """Makes the opening of a table of measures, with its columns' heads."""
    cells = [f'<th scope="col" class="number">{name}</th>' for name in numbers]
    cells = [f'<th scope="col">{first}</th>', *cells, *[f'<th scope="col">{name}</th>' for name in texts]]
    return f'<table class="headline stack">\n<thead><tr>{"".join(cells)}</tr></thead>\n<tbody>'


def _details(receipt: Mapping[str, Any]) -> Iterator[str]:
    shown_elsewhere = {"requests", "asked", "metrics", "private", "revoked"}
    inner = {
        name: value for name, value in receipt.items() if isinstance(value, Mapping) and name not in shown_elsewhere
    }
    single = {name: value for name, value in receipt.items() if name not in inner and name not in shown_elsewhere}
    return groups({"edit": single, **inner})


def _receipt_of(edited: str | Path) -> dict[str, Any]:
    path = Path(edited)
    receipt = Delta.load(path).receipt if path.is_file() else read_receipt(path)
    if not receipt:
        raise ModelError(f"{edited} has no receipt (editlib.json); give a folder or a delta file that editlib wrote")
    if not receipt.get("requests") or "name" not in receipt["base"]:
        raise ModelError(f"{edited}: its receipt does not say of what and which requests; make the edit again")
    return receipt


def read_metrics(path: Path) -> dict[str, Any]:
    """Reads `metrics.json` of `editlib eval`; raises `RequestError` for anything else."""
    try:
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _ = metrics["edited"]["sha256"]
        numbers_of(metrics)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f"{path}: not metrics of `editlib eval` ({error}); give its metrics.json") from None
    return metrics


def _metrics_of(path: Path, receipt: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the metrics of the model that a receipt is for."""
    metrics = read_metrics(path)
    of = metrics["edited"]["sha256"]
    if of != receipt.get("result_sha256"):
        raise RequestError(
            f"{path}: metrics of a model with hash {str(of)[:12]}, but the receipt is for "
            f"{str(receipt.get('result_sha256'))[:12]}; give those of the same model, in the dtype it is stored in"
        )
    return metrics


def _dumped(value: object) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _write_secret(path: Path, text: str) -> None:
    """Writes a file that only its owner may read."""
    with atomic_path(path, private=True) as temporary:
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
