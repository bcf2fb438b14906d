"""Describe the measures of `metrics.json` in words: one row each for a table, and one sentence for all."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

FORGET, KEEP = "forgetting", "keeping"
RATIO = "perplexity_ratio"


class ShareLabel(NamedTuple):
    """Holds the texts for one share of `metrics.json`: its side, noun in the verdict, head of a narrow column, and
    meaning."""

    family: str
    noun: str  # "" leaves it out of the verdict
    head: str
    meaning: str  # for a file without a meaning

    @property
    def short(self) -> str:
        return self.head.replace("-\n", "").replace("\n", " ")


SHARES = {
    "efficacy": ShareLabel(FORGET, "questions to forget", "direct\nquestion", "the question itself is refused"),
    "paraphrase_efficacy": ShareLabel(FORGET, "rephrasings", "para-\nphrase", "asked in other words it is refused"),
    "refusal_quality": ShareLabel(FORGET, "", "fluent\nrefusal", "the refusal is fluent"),
    "neighbour_retention": ShareLabel(KEEP, "neighbours", "neigh-\nbours", "others are still answered"),
    "same_subject_retention": ShareLabel(
        KEEP, "other facts about the same subjects", "same\nsubject", "its other questions are still answered"
    ),
    "same_subject_anchored_retention": ShareLabel(
        KEEP,
        "facts about them in relations that were held",
        "same subj.,\nheld",
        "its questions in relations that were anchored for others are still answered",
    ),
    "crossed_retention": ShareLabel(
        KEEP, "crossed pairs", "crossed\npairs", "its questions in relations that others lose are still answered"
    ),
    "other_retention": ShareLabel(KEEP, "unrelated answers", "other\nanswers", "unrelated ones are still answered"),
}


UNCOUNTED = {
    "efficacy": ("request", "there is no request"),
    "paraphrase_efficacy": ("paraphrase", 'no request has "paraphrases"'),
    "refusal_quality": ("", "nothing was refused"),
    "neighbour_retention": ("neighbour", 'no request has "neighbours"'),
    "same_subject_retention": ("same_subject", "no retain prompt asks about these subjects"),
    "same_subject_anchored_retention": ("same_subject_anchored", "no held-out prompt about them is in such a relation"),
    "crossed_retention": ("crossed", "no retain prompt asks for another forgotten relation of these subjects"),
    "other_retention": ("other_question", "there is no other retain prompt"),
}
"""For each share: the kind of question that it counts, and why there may be none."""


class SummaryRow(NamedTuple):
    """Holds one measure as text."""

    metric: str
    value: str
    n: str
    interval: str
    direction: str
    meaning: str


def summary_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Lists (metric, value, n, meaning with the better direction) of every measure, for a table in a terminal."""
    return [(r.metric, r.value, r.n, f"{r.meaning} ({r.direction})".strip()) for r in rows(metrics)]


def rows(metrics: Mapping[str, Any]) -> Iterator[SummaryRow]:
    """Yields the known measures in a fixed order, then further ones in the file."""
    groups = metrics.get("groups") or {}
    known = [name for name in [*SHARES, RATIO] if name in metrics or name in groups]
    for name in dict.fromkeys([*known, *groups]):
        group = measure(metrics, name)
        value, n, ends = number(group["value"]), group.get("n"), interval(group)
        yield SummaryRow(
            name.replace("_", " "),
            "–" if value is None else f"{value:.{4 if name == RATIO else 3}f}",
            "–" if n is None else str(n),
            f"{ends[0]:.2f} to {ends[1]:.2f}" if ends and value is not None else "–",
            "higher is better" if group.get("higher_is_better", name != RATIO) else "lower is better",
            str(group.get("meaning") or "") + uncounted(metrics, name, group),
        )


def uncounted(metrics: Mapping[str, Any], name: str, group: Mapping[str, Any]) -> str:
    """Explains after a measure's meaning why it has no value, as far as the file shows it; "" if it has one."""
    if number(group["value"]) is not None or name not in UNCOUNTED or group.get("n"):
        return ""
    kind, reason = UNCOUNTED[name]
    asked = any(item.get("kind") == kind for item in metrics.get("items") or ())
    return f"; not counted: {'the base model answers none of them right' if asked else reason}"


def verdict(metrics: Mapping[str, Any]) -> str:
    """Says in one sentence how much is refused, how much is kept, and how the perplexity changed."""
    parts = []
    for family, verb in ((FORGET, "refused"), (KEEP, "kept")):
        nouns = {name: share.noun for name, share in SHARES.items() if share.family == family and share.noun}
        said = [_count(measure(metrics, name), noun) for name, noun in nouns.items()]
        said = [words for words in said if words]
        if said:
            parts.append(f"{_listed(said)} are {verb}")
    ratio = number(measure(metrics, RATIO)["value"])
    if ratio is not None:
        change = f"{abs(ratio - 1) * 100:.1f}"
        more = f"{change} % {'higher' if ratio > 1 else 'lower'}"
        parts.append(f"perplexity is {'unchanged' if change == '0.0' else more}")
    return "; ".join(parts) + "." if parts else "Nothing was counted."


def measure(metrics: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns one measure with its value and meaning, also from a file that has only its value."""
    group = {"value": metrics.get(name), **((metrics.get("groups") or {}).get(name) or {})}
    if name in SHARES and not group.get("meaning"):
        group["meaning"] = SHARES[name].meaning
    if name == RATIO and not group.get("meaning"):
        before, after = (number((metrics.get("perplexity") or {}).get(side)) for side in ("before", "after"))
        seen = f": {before:.2f} before, {after:.2f} after" if before is not None and after is not None else ""
        group["meaning"] = f"perplexity on ordinary text, after over before, 1 is unchanged{seen}"
    return group


def right_of(group: Mapping[str, Any]) -> str:
    """Returns "31 of 32", from the count if the file has one, otherwise from the share; "" without an n."""
    n, right = number(group.get("n")), number(group.get("right"))
    return f"{round(group['value'] * n) if right is None else right:.0f} of {n:.0f}" if n else ""


def interval(group: Mapping[str, Any]) -> tuple[float, float] | None:
    """Returns the two ends of a measure's interval, if it has one."""
    ends = [end for end in map(number, group.get("interval") or ()) if end is not None]
    return (ends[0], ends[1]) if len(ends) == 2 else None


def number(value: object) -> float | None:
    """Returns `value` if it is a finite number; `None` for anything else, so that nan and null are the same."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) <= sys.float_info.max else None  # whole numbers may be too big for math.isfinite


def _count(group: Mapping[str, Any], noun: str) -> str:
    """Says how many items of a measure passed; "" if nothing was counted."""
    value = number(group["value"])
    if value is None:
        return ""
    return f"{right_of(group)} {noun}" if group.get("n") else f"{value * 100:.0f} % of the {noun}"


def _listed(words: list[str]) -> str:
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]
