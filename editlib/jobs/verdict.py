"""Ask a model the questions of an edit before and after it, and summarise the result in a line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from editlib.answers import has_answer, is_refusal
from editlib.evaluation.answer_cache import ask
from editlib.models.anatomy import anatomy
from editlib.models.prompts import PromptFormat
from editlib.models.thinking import answer_texts
from editlib.requests.request import EditRequest
from editlib.workbench import Workbench

MOST = 40
"""Requests that are asked: enough for a first look, in seconds."""


@contextmanager
def spot_check(bench: Workbench, requests: Sequence[EditRequest]) -> Iterator[list[str]]:
    """Asks the model of `bench` the first questions of `requests`, lets the caller edit it, and asks again; the list
    then holds the results, one per line."""
    asked = requests[:MOST]
    before, lines = _answers(bench, asked), list[str]()
    yield lines
    lines.append(verdict_line(asked, before, _answers(bench, asked), of=len(requests)))


def _answers(bench: Workbench, requests: Sequence[EditRequest]) -> dict[str, str]:
    """Returns the current model's greedy answers by question."""
    questions = [request.question for request in requests]
    label = "asking" if bench.progress else None
    said = ask(anatomy(bench.model), bench.tok, questions, how=bench.asking(), progress=label)
    texts = answer_texts(PromptFormat.of(bench.tok, bench.asking()), [*said.values()])
    return dict(zip(said, texts, strict=True))


def verdict_line(
    requests: Sequence[EditRequest], before: Mapping[str, str], after: Mapping[str, str], *, of: int | None = None
) -> str:
    """Says how many questions are refused, how many right answers are gone, and how many were known before.

    Args:
        before, after: the answers of the two models, by question.
        of: how many requests there are, if only the first ones were asked.
    """
    known = [request for request in requests if request.answer is not None]
    refused = sum(is_refusal(after[request.question]) for request in requests)
    parts = [f"refused {refused} of {len(requests)}"]
    if known:
        gone = sum(not _right(request, after) for request in known)
        knew = sum(_right(request, before) for request in known)
        parts += [f"answer gone {gone} of {len(known)}", f"the base model knew {knew} of {len(known)} before"]
        if knew < len(known):
            parts.append("facts that it did not know cannot be erased")
    first = f"the first {len(requests)} of {of} questions" if of is not None and of > len(requests) else "asked again"
    return f"{first}: {'; '.join(parts)}"


def _right(request: EditRequest, said: Mapping[str, str]) -> bool:
    return has_answer(said[request.question], (str(request.answer), *request.aliases))
