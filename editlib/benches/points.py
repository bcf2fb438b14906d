"""Hold the points of a benchmark's curves: the scores after a number of edits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CounterFactPoint:
    """Holds one point of CounterFact's curve: an algorithm after `edits` edits.

    `mode` says whether they were made at once (`batch`) or one after another. A point is one row of `cells.jsonl`, flat
    so that a resumed run and a plot can read it directly; the measured numbers are those of `score_edits`.
    """

    algorithm: str
    mode: str
    edits: int
    efficacy: float | None
    generalisation: float | None
    specificity: float | None
    generated: float | None
    perplexity: float
    seconds: float
    job: str = ""  # hash of everything that determines the numbers; cells of another job are not reused


@dataclass(frozen=True)
class SequentialPoint:
    """Holds one point of a chain's curve: its measures after `edits` edits in batches of `size`.

    Shares in 0..1, higher is better: `efficacy` over all facts edited so far (a fluent refusal replaces the answer),
    `gone` (any text without the answer counts), `paraphrases` as efficacy. `neighbours`, `same_subject` and `other` are
    shares of the answers that were right before and still are. `perplexity_ratio` is perplexity after over before (1 is
    best), `seconds` the mean time of a batch since the previous point. A point is one row of `points.jsonl`, flat for
    the same reasons as `CounterFactPoint`.
    """

    algorithm: str
    size: int
    edits: int
    efficacy: float | None
    gone: float
    paraphrases: float | None
    neighbours: float | None
    same_subject: float | None
    other: float | None
    perplexity_ratio: float
    seconds: float
    job: str = ""
