"""Measure models on text and tasks (`editlib ability`): one model in memory at a time, every result saved."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from editlib.ability.harness import aggregate_function, chosen, measure_task, wrap
from editlib.ability.measured import TaskResult, difference
from editlib.ability.prompting import form_of, given_prompts
from editlib.ability.report import AbilityReport, AbilityRow, table_rows
from editlib.ability.tasks import AbilityTask, load_tasks, require_lm_eval
from editlib.ability.text import measure_text, over_windows
from editlib.errors import MetricError
from editlib.files import write_json
from editlib.models.loading import DeviceMap, load
from editlib.models.outline import outline_of
from editlib.models.prompt_settings import PromptSettings
from editlib.models.source import check_models
from editlib.models.weights import weights_sha256
from editlib.reports.tables import write_table
from editlib.shelf import Finished
from editlib.stats.corpus import Corpus, load_corpus
from editlib.version import library_version

log = logging.getLogger(__name__)

BATCH_SIZE = 4
BOOTSTRAP = 100_000  # lm-eval's own number


def run_ability(
    models: Mapping[str, str | Path],
    tasks: Sequence[str] = (),
    *,
    text: str | None = "wiki-sample:heldout",
    limit: int | None = None,
    seed: int | None = None,
    batch_size: int = BATCH_SIZE,
    dtype: str | None = None,
    device_map: DeviceMap = None,
    out: Path | None = None,
    overwrite: bool = False,
    bootstrap: int = BOOTSTRAP,
    prompts: PromptSettings | None = None,
) -> AbilityReport:
    """Measures the abilities of models, one after another, and compares each with the first.

    Args:
        models: packaged models, local folders or Hugging Face ids, by display name. The first is the base.
        tasks: names that lm-eval knows, its task files (.yaml), or files of questions (.jsonl). They need lm-eval.
        text: corpus for perplexity, `None` for none.
        limit: number of documents of each task: the first ones, like lm-eval's `--limit`, or with a `seed` a random
            sample, the same for all models.
        batch_size: rows at a time; numbers of two sizes differ by rounding.
        device_map: where the weights go, as in transformers ("auto", or a device); default: the CPU.
        out: folder for finished models and tasks, from which the same job resumes, and for `ability.json` and
            `table.md`.
        overwrite: measure everything in `out` again.
        bootstrap: draws for the standard errors that lm-eval bootstraps (LAMBADA's perplexity).
        prompts: prompt settings of tasks; `None`: lm-eval's default, without chat template. The text is read unchanged.

    Raises:
        MetricError: nothing to measure, lm-eval missing, or a task that it does not know or cannot run.
        RequestError: a file of questions that does not fit; names file, line and field.
        EditlibError: a model, corpus or folder that cannot be used. All input except the weights is checked first.
    """
    out = None if out is None else Path(out)
    _check(models, tasks, text, limit, batch_size)
    if prompts is not None and not tasks:
        raise MetricError("--prompt is for tasks, and none is given; text is read without it: leave --prompt out")
    if tasks:
        require_lm_eval()
    kept = Finished(out, overwrite=overwrite)
    names = [str(where) for where in models.values()]
    check_models(*names)
    how = given_prompts(names, prompts)
    corpus = None if text is None else load_corpus(text)
    with tempfile.TemporaryDirectory(prefix="editlib-ability-") as folder:
        loaded = load_tasks(tasks, Path(folder)) if tasks else ()
        for name in names:  # all of them, before the first one is measured
            form_of(outline_of(name, dtype=dtype).tok, how)
        plan = _Plan(kept, corpus, loaded, limit, seed, batch_size, bootstrap, dtype, device_map, how)
        results = {name: _measure(name, str(where), plan) for name, where in models.items()}
    base = next(iter(models))
    rows = [row for name in models for row in _rows(name, results[name], base, results[base], plan)]
    job = {
        "editlib": library_version(),
        "models": {name: {"from": str(where), **results[name].identity} for name, where in models.items()},
        "text": None if corpus is None else {"corpus": text, "sha256": corpus.sha256},
        "tasks": {
            task.name: {**task.identity, "first_prompt": results[base].by_task[task.name].first_prompt}
            for task in loaded
        },
        "prompts": results[base].prompts,
        **{name: getattr(plan, name) for name in ("limit", "seed", "batch_size", "bootstrap", "dtype", "device_map")},
    }
    report = AbilityReport(job, base, tuple(rows))
    if out is not None:
        write_json(out / "ability.json", report.to_dict())
        write_table(table_rows(report), out / "table.md", report.note())
    return report


def _check(models: Mapping[str, Any], tasks: Sequence[str], text: str | None, limit: int | None, size: int) -> None:
    if not models:
        raise MetricError("no model was given; give the base, and edited models to compare with it")
    if not tasks and text is None:
        raise MetricError("nothing to measure: neither tasks nor a text for perplexity; give one of them")
    for name, value in (("limit", limit), ("batch size", size)):
        if value is not None and value < 1:
            raise MetricError(f"{name} {value}: expected 1 or more")


@dataclass(frozen=True)
class _Plan:
    """Holds the settings with which every model is measured."""

    kept: Finished
    corpus: Corpus | None
    tasks: tuple[AbilityTask, ...]
    limit: int | None
    seed: int | None
    batch_size: int
    bootstrap: int
    dtype: str | None
    device_map: DeviceMap
    prompts: PromptSettings | None

    @property
    def text_name(self) -> str:
        """The name of the text among the tasks; no task's name has a space."""
        return f"text {self.corpus.name}" if self.corpus is not None else ""


@dataclass(frozen=True)
class _Results:
    """Holds the results of one model by task, the hashes that identify the model, and its prompt format."""

    identity: Mapping[str, str]
    prompts: Mapping[str, Any] | None
    by_task: Mapping[str, TaskResult]


def _measure(name: str, where: str, plan: _Plan) -> _Results:
    """Loads one model and measures everything without a saved result. Its memory is free when this returns."""
    model, tok = load(where, dtype=plan.dtype, device_map=plan.device_map)
    identity = {"weights": weights_sha256(model), "tokenizer": _tokenizer_sha256(tok)}
    form = form_of(tok, plan.prompts)
    how = None if form is None else form.settings.to_dict()
    shared = {"editlib": library_version(), **identity}
    results: dict[str, TaskResult] = {}

    def once(task: str, job: Mapping[str, Any], measure: Callable[[], TaskResult]) -> None:
        label = f"{name}, {task}"
        measured = plan.kept.find(job, TaskResult.from_dict)
        if measured is None:
            log.info("%s", label)
            measured = measure()
            plan.kept.keep(label, job, measured.to_dict())
        else:
            log.info("%s: kept from an earlier run", label)
        results[task] = measured

    if plan.corpus is not None:
        documents = plan.corpus.documents
        once(plan.text_name, {**shared, "text": plan.corpus.sha256}, lambda: measure_text(model, tok, documents))
    lm = wrap(model, tok, plan.batch_size, form) if plan.tasks else None
    for task in plan.tasks:
        drawn = chosen(task.total, plan.limit, plan.seed)
        limit = None if drawn is not None else plan.limit
        job = {
            **shared,
            **task.identity,
            "documents": drawn if drawn is not None else limit,
            "batch_size": plan.batch_size,
            "bootstrap": plan.bootstrap,
            **({} if how is None else {"prompts": how}),
        }
        run = partial(measure_task, lm, task, documents=drawn, limit=limit, form=form)
        once(task.name, job, partial(run, bootstrap=plan.bootstrap))
    return _Results(identity, how, results)


def _tokenizer_sha256(tok: PreTrainedTokenizerBase) -> str:
    """Hashes the vocabulary, and the tokens added around a text (BOS)."""
    fingerprint = [sorted(tok.get_vocab().items()), list(tok("A text.")["input_ids"])]
    return hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()


def _rows(name: str, results: _Results, base: str, reference: _Results, plan: _Plan) -> Iterator[AbilityRow]:
    totals = {task.name: task.total for task in plan.tasks}
    for task, measured in results.by_task.items():
        before = reference.by_task[task]
        paired = name != base and before.documents == measured.documents
        if name != base and not paired:
            log.warning("%s and %s did not have the same documents of %s: no difference is given", base, name, task)
        known = {measure.name: measure for measure in before.measures}
        for measure in measured.measures:
            function = over_windows if task == plan.text_name else aggregate_function(measure.aggregation)
            change = None
            if paired and measure.name in known:
                change = difference(known[measure.name], measure, function)
            yield AbilityRow(
                model=name,
                task=task,
                metric=measure.name,
                value=measure.value,
                stderr=measure.stderr,
                higher_is_better=measure.higher_is_better,
                n=len(measured.documents),
                total=totals.get(task, len(measured.documents)),
                difference=None if change is None else change.value,
                difference_stderr=None if change is None else change.stderr,
            )
