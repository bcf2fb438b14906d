"""Run one model on one task, scored by lm-eval through its Python API."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib.ability.measured import Aggregate, TaskResult, TaskScore
from editlib.ability.prompting import asked_through, tagged
from editlib.ability.tasks import AbilityTask, require_lm_eval, seeds
from editlib.errors import MetricError
from editlib.models.prompts import PromptFormat

log = logging.getLogger(__name__)


def wrap(
    model: PreTrainedModel, tok: PreTrainedTokenizerBase, batch_size: int, form: PromptFormat | None = None
) -> Any:
    """Wraps the model as lm-eval's `hf` expects it. The tokenizer is copied, since lm-eval adds a pad token.

    Args:
        form: prompt format of tasks; `None`: lm-eval's default.
    """
    from lm_eval.models.huggingface import HFLM

    # A chat template writes the leading tokens (BOS) itself.
    front: dict[str, Any] = {"add_bos_token": False} if form is not None and form.uses_chat else {}
    with _level("lm_eval", logging.ERROR):  # it warns about models that are already loaded
        return asked_through(HFLM(pretrained=model, tokenizer=copy.deepcopy(tok), batch_size=batch_size, **front), form)


def measure_task(
    lm: Any,
    task: AbilityTask,
    *,
    documents: Sequence[int] | None = None,
    limit: int | None = None,
    bootstrap: int,
    form: PromptFormat | None = None,
) -> TaskResult:
    """Runs a task. Values and standard errors are lm-eval's, equal to those of its command line with the same batch
    size.

    Args:
        documents: indices of the documents to use, ascending.
        limit: use only the first documents. At most one of both is given.
        bootstrap: number of draws for standard errors that lm-eval bootstraps.
        form: prompt format of the task, the one given to `wrap`.

    Raises:
        MetricError: lm-eval cannot run the task, or cannot score it.
    """
    begun = time.perf_counter()
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), seeds(), tagged(task.object, form) as asked:  # lm-eval prints
            results = require_lm_eval().evaluate(
                lm,
                {"tasks": {task.name: task.object}},
                limit=limit,
                samples=None if documents is None else {task.name: list(documents)},
                bootstrap_iters=bootstrap,
                log_samples=True,
                **asked,
            )
    except Exception as error:  # any kind, from the task's own code
        what = (str(error).strip().splitlines() or [""])[0][:160]
        what = f"{type(error).__name__}: {what}"
        raise MetricError(f"task {task.name}: lm-eval stopped ({what}); leave the task out") from error
    log.debug("%s", said.getvalue())
    samples = results["samples"][task.name]
    ids, hashes, items = _by_metric(samples)
    numbers = results["results"][task.name]
    better = results["higher_is_better"][task.name]
    measures = [
        TaskScore(
            name=name if chosen == "none" else f"{name} ({chosen})",
            agg_value=_finite(numbers[f"{name},{chosen}"]),
            stderr=_finite(numbers.get(f"{name}_stderr,{chosen}")),
            higher_is_better=better.get(name),
            aggregation=_aggregation_name(task.object, name),
            items=tuple(scores.get(i) for i in ids),
        )
        for (name, chosen), scores in items.items()
        if _finite(numbers.get(f"{name},{chosen}")) is not None
    ]
    seconds = round(time.perf_counter() - begun, 2)
    return TaskResult(tuple(hashes), tuple(measures), seconds, first_prompt=_first_prompt(samples))


def chosen(total: int, limit: int | None, seed: int | None) -> list[int] | None:
    """Draws `limit` of `total` documents with `seed`, ascending; `None` without a seed, or if all are taken."""
    if seed is None or limit is None or limit >= total:
        return None
    return sorted(random.Random(seed).sample(range(total), limit))


def aggregate_function(name: str | None) -> Aggregate | None:
    """Finds lm-eval's function of this name."""
    if name is None:
        return None
    from lm_eval.api.registry import get_aggregation

    return get_aggregation(name)


def _first_prompt(samples: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns the model's input for the first document; `None` for a task that only scores texts."""
    given: Sequence[Any] = samples[0]["arguments"][0] if samples and samples[0]["arguments"] else ()
    return str(given[0]) if len(given) > 1 else None


def _by_metric(
    samples: Sequence[Mapping[str, Any]],
) -> tuple[list[int], list[str], dict[tuple[str, str], dict[int, Any]]]:
    """Collects numbers and hashes of the documents, and each document's score by metric and filter."""
    hashes: dict[int, str] = {}
    items: dict[tuple[str, str], dict[int, Any]] = {}
    for sample in samples:
        hashes[sample["doc_id"]] = sample["doc_hash"]
        for name in sample["metrics"]:
            items.setdefault((name, sample["filter"]), {})[sample["doc_id"]] = _plain(sample[name])
    return list(hashes), list(hashes.values()), items


def _aggregation_name(task: Any, metric: str) -> str | None:
    from lm_eval.api.registry import AGGREGATION_REGISTRY

    function = task.aggregation().get(metric, AGGREGATION_REGISTRY["mean"])  # as lm-eval does
    return next((name for name, known in AGGREGATION_REGISTRY.items() if known is function), None)


def _plain(value: Any) -> Any:
    """Converts Numpy's numbers and arrays to Python's."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _finite(value: Any) -> float | None:
    """Returns a finite number, or `None`: lm-eval writes "N/A" if there is no standard error."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


@contextlib.contextmanager
def _level(name: str, level: int) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
