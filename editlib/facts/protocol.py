"""Evaluate real facts: whether answers are gone and refused, and which other answers changed (`facts.scores`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from editlib import data
from editlib.evaluation.answer_cache import AnswerCache, check_answers_file
from editlib.evaluation.perplexity import text_windows
from editlib.evaluation.protocol import NamedModel
from editlib.facts.plots import require_matplotlib
from editlib.facts.report import write_outputs
from editlib.facts.scores import ANSWER_TOKENS, KINDS, NOT_JUDGED, RATIO, build_items, evaluate
from editlib.models.positions import check_requests_fit
from editlib.models.prompts import PromptFormat
from editlib.reports.summary import summary_rows
from editlib.requests.reading import read_requests
from editlib.requests.request import EditRequest
from editlib.stats.corpus import load_corpus


class FactsProtocol:
    """Measures questions to forget, prompts that must still be answered, and perplexity on a text."""

    name = "facts"

    def __init__(
        self,
        requests: Sequence[EditRequest],
        retain: Sequence[EditRequest],
        *,
        documents: Iterable[str] = (),
        before_file: Path | None = None,
        endings: int = 0,
        progress: bool = False,
        left_out: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._left_out = {name: list(rows) for name, rows in (left_out or {}).items()}
        self.requests, self._retain, self._documents = list(requests), list(retain), documents
        self._before_file, self._endings, self._progress = before_file, endings, progress
        self._before: AnswerCache | None = None

    @classmethod
    def read(
        cls,
        requests: Sequence[EditRequest],
        *,
        retain_file: Path | None = None,
        text: str | None = "wiki-sample:heldout",
        before_file: Path | None = None,
        skip_bad: bool = False,
        endings: int = 0,
        progress: bool = False,
        left_out: Mapping[str, Sequence[str]] | None = None,
    ) -> FactsProtocol:
        """Makes the protocol with its inputs from files.

        Args:
            retain_file: prompts that must still be answered; those that the edit's receipt lists as anchors are left
                out. Default: bundled ones.
            text: corpus for perplexity, `None` for none.
            before_file: file of the base model's answers; read if they belong to this model, completed and written.
            skip_bad: leave out unusable rows of `retain_file`, see `read_requests`.
            left_out: unusable rows of the requests' file, by file; `metrics.json` lists them, and those of
                `retain_file`.
            endings: letters that an inflected ending of an answer may have (see `has_answer`).

        Raises:
            EditlibError: an unusable file, or matplotlib is missing.
        """
        require_matplotlib()
        if before_file is not None:
            check_answers_file(before_file)
        given = data.retain_prompts(requests) + data.general("test")
        rows = {name: list(bad_rows) for name, bad_rows in (left_out or {}).items()}
        retain = given if retain_file is None else read_requests(retain_file, skip_bad=skip_bad, left_out=rows)
        documents: Iterable[str] = () if text is None else load_corpus(text).documents
        return cls(
            requests, retain, documents=documents, before_file=before_file, endings=endings, progress=progress,
            left_out=rows,
        )  # fmt: skip

    def check(self, model: PreTrainedModel, form: PromptFormat) -> None:
        check_requests_fit(model, form, self.requests, answer_tokens=ANSWER_TOKENS)

    def measure(
        self, base: NamedModel, edited: NamedModel, requests: Sequence[EditRequest], kept: Sequence[EditRequest] = ()
    ) -> dict[str, Any]:
        of = edited.prompts.key(base.sha256)
        if self._before is None or self._before.model_sha256 != of:
            empty = AnswerCache(of, {})
            self._before = empty if self._before_file is None else AnswerCache.load(self._before_file, of)
        anchors = set(edited.receipt.get("anchors") or ()) if edited.receipt else set()
        measured = evaluate(
            base,
            edited,
            build_items(requests, [*kept, *self._retain], anchors),
            before=self._before,
            windows=text_windows(base.tok, self._documents) if self._documents else (),
            endings=self._endings,
            how=edited.prompts,
            progress=self._progress,
        )
        return {**measured, **({"left_out": self._left_out} if self._left_out else {})}

    def headline(self, metrics: Mapping[str, Any]) -> dict[str, float | None]:
        return {name: metrics.get(name) for name in (*KINDS, RATIO) if name in metrics}

    def table(self, metrics: Mapping[str, Any]) -> list[list[str]]:
        return [["metric", "value", "n", "meaning"], *map(list, summary_rows(metrics))]

    def note(self, metrics: Mapping[str, Any]) -> str:
        if not (unjudged := metrics.get(NOT_JUDGED)):
            return ""
        return f"{unjudged} answers are in a language whose refusals are not known; they count as no refusals"

    def write(self, metrics: Mapping[str, Any], out: Path) -> None:
        write_outputs(dict(metrics), out)

    def finish(self) -> None:
        if self._before_file is not None and self._before is not None:
            self._before.save(self._before_file)
