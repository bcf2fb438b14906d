"""What the evaluation of facts writes, and the text that it takes perplexity on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from editlib.errors import CorpusError
from editlib.evaluation.report import write_report
from editlib.models.files import atomic_path
from editlib.models.prompts import cut

WINDOWS, WINDOW = 16, 256


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
