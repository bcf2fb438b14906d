"""Score an edit by CounterFact's measures (ROME, 2202.05262, sec. 3.4): efficacy, generalisation, specificity."""

from __future__ import annotations

from collections.abc import Sequence

from editlib.evaluation.metrics import Kind, MetricResult, wilson_interval
from editlib.models.anatomy import Anatomy
from editlib.models.generation import continuation_nll, greedy
from editlib.models.prompts import PromptFormat
from editlib.requests.request import EditRequest

MEANINGS: dict[str, tuple[Kind, str]] = {
    "efficacy": ("teacher_forced", "prompts after which the new answer is likelier than the true one"),
    "generalisation": ("teacher_forced", "paraphrases after which the new answer is likelier than the true one"),
    "specificity": ("teacher_forced", "prompts about neighbours after which the true answer is likelier than the new"),
    "generated": ("generated", "prompts whose greedy continuation is the new answer, word for word"),
}
"""How each share is measured, and its meaning. Likelier means: in mean log probability per token. `generated` shows
more than a comparison of two answers: that the new one is the model's first choice among all."""


def score_edits(anat: Anatomy, form: PromptFormat, requests: Sequence[EditRequest]) -> dict[str, MetricResult]:
    """Scores a model on the facts in `requests`, those with a true `answer`.

    A neighbour's own answer is compared with the request's `target_new`.

    Returns:
        The shares of `MEANINGS` by name, in 0..1, with Wilson's interval; `agg_value` is `None` if nothing was asked.
        Higher is better for all of them.
    """
    requests = [request for request in requests if request.answer is not None and request.target_new is not None]
    prompts = [(request.question, str(request.target_new), str(request.answer)) for request in requests]
    rephrased = [
        (text, str(request.target_new), str(request.answer))
        for request in requests
        for text in request.filled_paraphrases
    ]
    near = [
        (probe.prompt, str(request.target_new), str(probe.answer))
        for request in requests
        for probe in request.neighbours
        if probe.answer is not None and probe.answer != request.target_new
    ]
    preferred = _prefers_new(anat, form, [*prompts, *rephrased, *near])
    first, second = len(prompts), len(prompts) + len(rephrased)
    wanted = [form.answer_ids(new, text) for text, new, _ in prompts]
    said = greedy(anat, [form.encode(text) for text, _, _ in prompts], max_new_tokens=max(map(len, wanted), default=0))
    passed = {
        "efficacy": preferred[:first],
        "generalisation": preferred[first:second],
        "specificity": [not new for new in preferred[second:]],
        "generated": [got[: len(ids)] == ids for got, ids in zip(said, wanted, strict=True)],
    }
    return {name: _share(name, verdicts) for name, verdicts in passed.items()}


def known_facts(
    anat: Anatomy, form: PromptFormat, requests: Sequence[EditRequest], most: int, *, at_once: int = 64
) -> list[EditRequest]:
    """Picks the first `most` requests whose prompt the model continues greedily with the true answer, word for word."""
    known: list[EditRequest] = []
    for start in range(0, len(requests), at_once):
        chunk = [request for request in requests[start : start + at_once] if request.answer is not None]
        wanted = [form.answer_ids(str(request.answer), request.question) for request in chunk]
        rows = [form.encode(request.question) for request in chunk]
        said = greedy(anat, rows, max_new_tokens=max(map(len, wanted), default=0))
        known += [one for one, got, ids in zip(chunk, said, wanted, strict=True) if got[: len(ids)] == ids]
        if len(known) >= most:
            break
    return known[:most]


def _prefers_new(anat: Anatomy, form: PromptFormat, asked: Sequence[tuple[str, str, str]]) -> list[bool]:
    """Returns for each `(prompt, new, true)` whether the new answer is the likelier one."""
    rows = [form.encode(text) for text, _, _ in asked]
    new = continuation_nll(anat, rows, [form.answer_ids(answer, text) for text, answer, _ in asked])
    true = continuation_nll(anat, rows, [form.answer_ids(answer, text) for text, _, answer in asked])
    return [a < b for a, b in zip(new, true, strict=True)]


def _share(name: str, passed: Sequence[bool]) -> MetricResult:
    """Makes a measured share from verdicts."""
    n, right = len(passed), sum(passed)
    kind, meaning = MEANINGS[name]
    items = {str(i): {"score": float(verdict)} for i, verdict in enumerate(passed)}
    return MetricResult(name, right / n if n else None, items, kind, True, n, meaning, wilson_interval(right, n))
