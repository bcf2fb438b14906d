"""Format the results as tables of text, for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Rows = list[list[str]]
DASH = "-"
BARS = str.maketrans({"|": "\\|", "\n": " "})

COST_HEADS = {
    "search_seconds": "search, s",
    "seconds": "itself, s",
    "prepared_seconds": "made once, s",
    "more_mb": "memory, MiB",
    "touched": "weights changed",
    "touched_share": "of all",
    "update_bytes": "update, kB",
}
COST_MEANINGS = {
    "search_seconds": "looking for the best settings, all trials together; - for a method that has nothing to search",
    "seconds": "the method itself, mean over seeds",
    "prepared_seconds": "statistics, tokens and the model's own answers, made once per model and kept; 0 where they "
    "were there already",
    "more_mb": "most memory above what was held when the method began, the model loaded; on an accelerator, the most "
    "that was allocated there",
    "touched": "numbers in the model that are other ones than before",
    "touched_share": "the same as a share of all",
    "update_bytes": "what the change takes when it is stored by itself: factors of a closed-form edit, otherwise the "
    "changed numbers",
}


def share(value: float | None, digits: int = 2) -> str:
    """Returns a share or ratio as text."""
    return DASH if value is None else f"{value:.{digits}f}"


def ratio(value: float | None) -> str:
    """Formats a perplexity ratio, which may be any size."""
    return DASH if value is None else (f"{value:.3f}" if value < 100 else f"{value:.1e}")


def amount(key: str, value: float | None) -> str:
    """Formats one number of a cost."""
    if value is None:
        return DASH
    if key == "touched_share":
        return f"{100 * value:.2f} %"
    if key == "touched":
        return f"{value:,.0f}"
    if key == "update_bytes":
        return f"{value / 1000:,.1f}"
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def cost_of(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """Returns a method's cost by the keys of `COST_HEADS`; memory is the accelerator's if the model is on one."""
    cost = dict(summary["cost"])
    if cost["accelerator_mb"]:
        cost["more_mb"] = cost["accelerator_mb"]
    cost["search_seconds"] = cost["search_seconds"] or None
    return {key: cost[key] for key in COST_HEADS}


def worst_attack(summary: Mapping[str, Any]) -> tuple[str, float] | None:
    """Returns the attack that recovered most, with its rate."""
    rates = {name: attack["edited"]["rate"] for name, attack in summary["attacks"].items()}
    known = {name: rate for name, rate in rates.items() if rate is not None}
    if not known:
        return None
    name = max(known, key=lambda name_of: known[name_of])
    return name, known[name]


def main_table(results: Mapping[str, Any], name: str) -> Rows:
    """Builds the table of one set, a row per method; for a terminal."""
    summaries = results["sets"][name]["methods"]
    attacked = any(summary["attacks"] for summary in summaries)
    rows = [["method", "forget", "retain", "front", "perplexity", *(["most leaked by"] if attacked else []), "seconds"]]
    for method in ordered(summaries):
        worst = worst_attack(method)
        leaked = DASH if worst is None else f"{worst[0]} {worst[1]:.2f}" if worst[1] else "nothing"
        rows.append(
            [
                told_label(method),
                share(method["forget"]),
                share(method["retain"]),
                "yes" if method["front"] else "",
                ratio(method["perplexity_ratio"]),
                *([leaked] if attacked else []),
                amount("seconds", method["cost"]["seconds"]),
            ]
        )
    return rows


def ordered(summaries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the summaries on the front first, by their forgetting; then the others, and failed ones last."""
    return sorted(
        summaries, key=lambda summary: (summary["forget"] is None, not summary["front"], -(summary["forget"] or 0))
    )


def told_label(summary: Mapping[str, Any]) -> str:
    """Returns the method's name, with the number of successful runs if some failed."""
    seeds, done = summary["seeds"], summary["done"]
    return summary["method"] if done == seeds else f"{summary['method']} ({done} of {seeds} runs)"


def measures_table(results: Mapping[str, Any], name: str) -> Rows:
    """Builds the table of every measure of a set, a row per method."""
    about = results["sets"][name]
    names = [key for key in about["measures"] if key not in ("forget", "retain")]
    rows = [["method", *(key.replace("_", " ") for key in names), "perplexity"]]
    for summary in ordered(about["methods"]):
        values = [share(summary["measures"].get(key)) for key in names]
        rows.append([told_label(summary), *values, ratio(summary["perplexity_ratio"])])
    return rows


def attack_table(results: Mapping[str, Any], name: str) -> Rows:
    """Builds the table of leak rates with their intervals: a row per attack, a column per method."""
    summaries = [method for method in ordered(results["sets"][name]["methods"]) if method["attacks"]]
    names = dict.fromkeys(attack for summary in summaries for attack in summary["attacks"])
    rows = [["attack", *(summary["method"] for summary in summaries)]]
    for attack in names:
        rows.append([attack, *(leak(summary["attacks"].get(attack)) for summary in summaries)])
    return rows


def leak(attack: Mapping[str, Any] | None) -> str:
    """Formats a leak rate: "0.12 (0.05-0.21)"."""
    if attack is None or attack["edited"]["rate"] is None:
        return DASH
    low, high = attack["edited"]["interval"]
    return f"{attack['edited']['rate']:.2f} ({low:.2f}-{high:.2f})"


def ability_table(results: Mapping[str, Any], name: str) -> Rows:
    """Builds the table of every task's value with its standard error: a row per method."""
    summaries = [method for method in ordered(results["sets"][name]["methods"]) if method["ability"]]
    names = list(dict.fromkeys(task for summary in summaries for task in summary["ability"]))
    rows = [["method", *names]]
    for method in summaries:
        rows.append([told_label(method), *(scored(method["ability"].get(task)) for task in names)])
    return rows


def scored(score: Mapping[str, Any] | None) -> str:
    """Formats a score: "0.412 ± 0.010"."""
    if score is None or score["value"] is None:
        return DASH
    error = "" if score["stderr"] is None else f" ± {score['stderr']:.3f}"
    return f"{score['value']:.3f}{error}"


def cost_table(results: Mapping[str, Any], name: str) -> Rows:
    """Builds the table of time, memory and size: a row per method."""
    rows = [["method", *COST_HEADS.values()]]
    for summary in ordered(results["sets"][name]["methods"]):
        rows.append([told_label(summary), *(amount(key, value) for key, value in cost_of(summary).items())])
    return rows


def markdown(results: Mapping[str, Any]) -> str:
    """Writes all tables of all sets, and the failed cells, as Markdown."""
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Mapping[str, Any]) -> Iterator[str]:
    for name, about in results["sets"].items():
        yield from (f"## {_text(name)}", "")
        yield f"{_text(about['model'])}, {about['forget']} facts forgotten. forget: {about['axes'][0]}; retain: "
        yield f"{about['axes'][1]}; both: higher is better. perplexity: after over before, lower is better."
        tables = {
            "": main_table,
            "Measures": measures_table,
            "Attacks: how much came back, with 95 % intervals (lower is better)": attack_table,
            "Ability": ability_table,
            "Cost": cost_table,
        }
        for title, table in tables.items():
            rows = table(results, name)
            if len(rows[0]) > 1 and len(rows) > 1:
                yield from ("", f"### {title}", "") if title else ("",)
                yield from _table(rows)
        yield ""
    failed = [cell for cell in results["cells"] if cell["failed"]]
    if failed:
        yield from ("## Failed", "")
        rows = [[cell["set"], cell["method"], str(cell["seed"]), cell["failed"]] for cell in failed]
        yield from _table([["set", "method", "seed", "reason"], *rows])


def _table(rows: Rows) -> Iterator[str]:
    head, *rest = rows
    for row in (head, ["---"] * len(head), *rest):
        yield f"| {' | '.join(_text(cell) for cell in row)} |"


def _text(text: str) -> str:
    return str(text).translate(BARS)
