"""Evaluate the forgetting of TOFU's fictitious authors, for `editlib eval --protocol tofu`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from editlib.evaluation.memory import peak_rss_mb
from editlib.evaluation.metrics import MetricResult
from editlib.evaluation.protocol import NamedModel
from editlib.models.loading import DeviceMap, load
from editlib.models.outline import outline_of
from editlib.models.positions import check_prompts, check_requests_fit
from editlib.models.prompts import Asking, PromptFormat, settled
from editlib.requests.request import EditRequest
from editlib.tofu.report import conditions, headline_of, table_rows, write_tofu
from editlib.tofu.scores import (
    ANSWER_TOKENS,
    Judges,
    TofuReading,
    check_scoring,
    check_wrong_answers,
    compare_tofu,
    document,
    reference_results,
    retain_only_results,
)
from editlib.tofu.sets import Asked, TofuSets, questions_in, read_tofu


class TofuProtocol:
    """Measures TOFU's sets, with an optional limit on the questions of each."""

    name = "tofu"

    def __init__(
        self,
        sets: TofuSets,
        *,
        limit: int | None = None,
        seed: int = 0,
        reference: str | None = None,
        judges: Judges | None = None,
        max_new_tokens: int = ANSWER_TOKENS,
        dtype: str | None = None,
        device_map: DeviceMap = None,
        progress: bool = False,
    ) -> None:
        self._sets, self._limit, self._seed, self._judges = sets, limit, seed, judges
        self._reference, self._max_new_tokens, self._progress = reference, max_new_tokens, progress
        self._dtype, self._device_map = dtype, device_map
        self._before: dict[Asked, TofuReading] = {}
        self._base_sha = ""
        self._retain_only: Mapping[str, MetricResult] | None = None

    @classmethod
    def read(
        cls,
        source: str | None = None,
        forget: str = "forget01",
        *,
        learned_file: Path | None = None,
        reference: str | None = None,
        whole: bool = True,
        skip_bad: bool = False,
        **options: Any,
    ) -> TofuProtocol:
        """Makes the protocol with its sets from a folder or the Hub; see `read_tofu` and, for `options`, the class.

        Args:
            learned_file: the questions that the model was trained on, in TOFU's form; default: all.
            reference: a model that was trained on the retain set only, or its results from an earlier run of this
                protocol (`edited.json`); forget quality needs it.
            skip_bad: leave out unusable rows, see `read_tofu`.
            whole: the whole forget set will be asked, not one request of it, so a reference must cover all questions.

        Raises:
            EditlibError: an unusable file, or sets that cannot be reached.
        """
        check_scoring(options.get("judges"), reference)
        learned = None if learned_file is None else questions_in(learned_file, skip_bad=skip_bad)
        made = cls(read_tofu(source, forget, learned=learned, skip_bad=skip_bad), reference=reference, **options)
        sets = made._sets.limited(made._limit, made._seed)
        if reference is not None:
            check_wrong_answers(sets, whole=whole)
        if reference is not None and Path(reference).is_file():
            made._retain_only = reference_results(Path(reference), sets, whole=whole)
        return made

    @property
    def requests(self) -> Sequence[EditRequest]:
        return self._sets.forget

    def check(self, model: PreTrainedModel, form: PromptFormat) -> None:
        check_requests_fit(model, form, self.requests)
        asked = self._sets.limited(self._limit, self._seed).probes.values()
        prompts = [(probe.id, probe.question) for probes in asked for probe in probes]
        check_prompts(model, form, prompts, answer_tokens=self._max_new_tokens)
        if self._reference is not None and self._retain_only is None:
            settled(outline_of(self._reference, dtype=self._dtype).tok, form.settings)

    def measure(
        self, base: NamedModel, edited: NamedModel, requests: Sequence[EditRequest], kept: Sequence[EditRequest] = ()
    ) -> dict[str, Any]:
        begun = time.perf_counter()
        if self._base_sha != (of := edited.prompts.key(base.sha256)):
            self._before, self._base_sha = {}, of
        sets = self._sets.forgetting(requests, kept).limited(self._limit, self._seed)
        scores = compare_tofu(
            base,
            edited,
            sets,
            retain_only=self._ratios(edited.prompts),
            judges=self._judges,
            max_new_tokens=self._max_new_tokens,
            how=edited.prompts,
            before=self._before,
            progress=self._progress,
        )
        judges = {} if self._judges is None else {k: str(v) for k, v in vars(self._judges).items() if v is not None}
        return {
            "limit": self._limit,
            "seed": self._seed,
            "max_new_tokens": self._max_new_tokens,
            "reference": self._reference,
            "judges": judges,
            **document(scores),
            **({"left_out": dict(sets.left_out)} if sets.left_out else {}),
            "seconds": time.perf_counter() - begun,
            "peak_rss_mb": peak_rss_mb(),
        }

    def _ratios(self, how: Asking) -> Mapping[str, MetricResult] | None:
        """Returns the retain-only model's results on the whole forget set; a model is measured once."""
        if self._retain_only is None and self._reference is not None:
            model, tok = load(self._reference, dtype=self._dtype, device_map=self._device_map)
            label = "retain-only" if self._progress else None
            self._retain_only = retain_only_results(model, tok, self._sets, how=how, progress=label)
        return self._retain_only

    def headline(self, metrics: Mapping[str, Any]) -> dict[str, float | None]:
        return headline_of(metrics["scores"]["edited"])

    def table(self, metrics: Mapping[str, Any]) -> list[list[str]]:
        return table_rows(metrics)

    def note(self, metrics: Mapping[str, Any]) -> str:
        return conditions(metrics)

    def write(self, metrics: Mapping[str, Any], out: Path) -> None:
        write_tofu(metrics, out)

    def finish(self) -> None:
        """Does nothing: there is nothing to save."""
