"""The job behind `editlib eval`: two model folders and request files -> metrics.json and report.html."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from editlib import bundled
from editlib.corpus import load_corpus
from editlib.errors import CorpusError, RequestError
from editlib.evaluation.facts import Before, build_items, evaluate
from editlib.evaluation.report import require_matplotlib, write_report
from editlib.export import library_version, read_receipt
from editlib.models.anatomy import anatomy
from editlib.models.files import atomic_path, check_output, weights_sha256
from editlib.models.loading import load
from editlib.models.prompts import cut
from editlib.request import read_requests

log = logging.getLogger(__name__)

WINDOWS, WINDOW = 16, 256


def evaluate_folders(
    base: str,
    edited: str,
    requests_file: Path,
    out: Path,
    *,
    retain_file: Path | None = None,
    text: str | None = "wiki-sample:heldout",
    before_file: Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Loads both models with plain transformers, asks them, and writes `metrics.json` and `report.html` to `out`.

    Args:
        retain_file: prompts that must still be answered; those that the edit's receipt lists as anchors are left out.
        text: corpus for perplexity, `None` for none.
        before_file: answers of the base model, read when they are its own, completed and written.

    Raises:
        EditlibError: any input that does not fit; nothing is written then.
    """
    out = Path(out)
    check_output(out, overwrite=overwrite)
    require_matplotlib()
    requests = read_requests(requests_file)
    retain = (
        bundled.retain_prompts(requests) + bundled.general("test")
        if retain_file is None
        else read_requests(retain_file)
    )
    receipt = read_receipt(edited)
    documents = [] if text is None else load_corpus(text).documents
    base_model, base_tok = load(base, dtype=dtype)
    sha = weights_sha256(base_model)
    edited_model, edited_tok = load(edited, dtype=dtype)
    if receipt is not None and dtype is None and receipt["base"]["sha256"] != sha:
        raise RequestError(
            f"{edited} was edited from another model than {base} (see its editlib.json); give its own base"
        )
    before = Before(sha, {}) if before_file is None else Before.load(before_file, sha)
    items = build_items(requests, retain, set(receipt["anchors"]) if receipt else ())
    metrics = evaluate(
        (anatomy(base_model), base_tok),
        (anatomy(edited_model), edited_tok),
        items,
        before=before,
        windows=text_windows(base_tok, documents) if text is not None else (),
        progress=progress,
    )
    metrics = {
        "editlib": library_version(),
        "base": {"name": base, "sha256": sha},
        "edited": {"name": str(edited), "sha256": weights_sha256(edited_model)},
        **metrics,
        "receipt": receipt,
    }
    write_outputs(metrics, out)
    if before_file is not None:
        before.save(before_file)
    return metrics


def write_outputs(metrics: dict[str, Any], out: Path) -> None:
    """Writes `metrics.json` and `report.html`, each atomically."""
    out.mkdir(parents=True, exist_ok=True)
    write_report(metrics, out / "report.html")
    with atomic_path(out / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def text_windows(tok: PreTrainedTokenizerBase, documents: Sequence[str]) -> list[list[int]]:
    """The first `WINDOW` tokens of the first `WINDOWS` documents that are long enough (or of what there is).

    Raises:
        CorpusError: not one window of two tokens.
    """
    found: list[list[int]] = []
    for document in documents:
        windows = list(cut(tok, document, WINDOW))
        found += [ids for ids in windows if len(ids) == len(windows[0])]  # no shorter rests
        if len(found) >= WINDOWS:
            break
    found = found[:WINDOWS]
    if not found:
        raise CorpusError("the text for perplexity holds no two tokens; give a longer one, or --text none")
    return found
