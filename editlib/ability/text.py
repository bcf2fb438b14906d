"""Measure perplexity on the text of a corpus, window by window."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Sequence

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib.ability.measured import TaskResult, TaskScore
from editlib.evaluation.intervals import bootstrap_stderr
from editlib.evaluation.perplexity import text_windows
from editlib.models.anatomy import anatomy
from editlib.models.generation import perplexity


def measure_text(
    model: PreTrainedModel, tok: PreTrainedTokenizerBase, documents: Iterable[str], *, seed: int = 0
) -> TaskResult:
    """Measures perplexity over the windows of `editlib eval`; its standard error is a bootstrap over windows.

    An item is `(nats, tokens)` of a window. Models with different tokenizers have different windows.

    Raises:
        CorpusError: there is no window of two tokens.
    """
    begun, anat = time.perf_counter(), anatomy(model)
    windows = text_windows(tok, documents)
    items = []
    for ids in tqdm(windows, desc="perplexity", leave=False):
        count = len(ids) - 1
        items.append((math.log(perplexity(anat, [ids])) * count, count))
    value = over_windows(items)
    measure = TaskScore(
        name="perplexity",
        agg_value=value,
        stderr=bootstrap_stderr(over_windows, items, seed=seed),
        higher_is_better=False,
        aggregation=None,
        items=tuple(items),
    )
    hashes = tuple(hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest() for ids in windows)
    return TaskResult(hashes, (measure,), round(time.perf_counter() - begun, 2))


def over_windows(items: Sequence[tuple[float, int]]) -> float:
    """Computes `exp` of all nats over all tokens; lower is better."""
    return math.exp(math.fsum(nats for nats, _ in items) / sum(count for _, count in items))
