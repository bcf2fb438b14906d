"""Build the page of a comparison: one HTML file made from the results alone. All text by models is escaped, equal
results give equal bytes, and the page loads nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from editlib.comparison.method import FAMILIES
from editlib.comparison.report.answers import drill_down, named
from editlib.comparison.report.plane import mark, plane
from editlib.comparison.report.tables import (
    COST_HEADS,
    COST_MEANINGS,
    amount,
    cost_of,
    ordered,
    ratio,
    scored,
    share,
    told_label,
)
from editlib.reports.page import filled, verdict_line

Summary = Mapping[str, Any]


def page(results: Mapping[str, Any]) -> str:
    """Builds the whole page."""
    sets = results["sets"]
    title = f"Forgetting compared: {', '.join(sets)}"
    models = ", ".join(dict.fromkeys(about["model"] for about in sets.values()))
    methods = dict.fromkeys(cell["method"] for cell in results["cells"])
    seeds = len(results["config"]["seeds"])
    about = f"{len(methods)} methods on <b>{escape(models)}</b>, {seeds} seed{'s' if seeds > 1 else ''}"
    summary = [
        *map(verdict_line, verdicts(results)),
        _failed(results["cells"]),
        f'<nav aria-label="sections"><ul>{"".join(_contents(results))}</ul></nav>',
    ]
    return filled(
        __package__,
        "compare",
        title=escape(title),
        heading=escape(title),
        models=about,
        summary="\n".join(summary),
        sets="\n".join(part for number, name in enumerate(sets, 1) for part in _set(results, name, number)),
        meaning="\n".join(_meaning(results)),
        receipt="\n".join(_receipt(results)),
        footer=escape(
            " · ".join([f"editlib {results['editlib']}", *(f"{k} {v}" for k, v in results["machine"].items())])
        ),
    )


def verdicts(results: Mapping[str, Any]) -> Iterator[str]:
    """Yields one sentence per set: the methods on the front."""
    for name, about in results["sets"].items():
        front = [summary for summary in ordered(about["methods"]) if summary["front"] and summary["family"] != "none"]
        names = [
            f"{summary['method']} (forget {summary['forget']:.2f}, retain {summary['retain']:.2f})" for summary in front
        ]
        if names:
            many = "these do" if len(names) > 1 else "this one does"
            yield f"On {name}, no other method does better on both counts than {many}: {', '.join(names)}."
        else:
            yield f"On {name}, no method has both scores."


def _failed(cells: Sequence[Mapping[str, Any]]) -> str:
    failed = [cell for cell in cells if cell["failed"]]
    if not failed:
        return ""
    rows = "".join(f"<li><b>{escape(_called(cell))}</b>: {escape(cell['failed'])}</li>" for cell in failed)
    return f'<div class="failed" role="note">{len(failed)} of {len(cells)} runs failed:<ul>{rows}</ul></div>'


def _contents(results: Mapping[str, Any]) -> Iterator[str]:
    for number, name in enumerate(results["sets"], 1):
        for part, title in _sections(results["sets"][name]).items():
            heading = title if len(results["sets"]) == 1 else f"{name}: {title.lower()}"
            yield f'<li><a href="#{part}-{number}">{escape(heading)}</a></li>'
    yield '<li><a href="#meaning">What the figures mean</a></li>'


def _sections(about: Mapping[str, Any]) -> dict[str, str]:
    """Lists id and title of each section that a set has."""
    titles = {"plane": "Forget and retain", "measures": "Measures"}
    if any(method["attacks"] for method in about["methods"]):
        titles["attacks"] = "Attacks"
    if any(method["ability"] for method in about["methods"]):
        titles["ability"] = "Ability"
    return {**titles, "cost": "Cost", "answers": "Answers before and after"}


def _set(results: Mapping[str, Any], name: str, number: int) -> Iterator[str]:
    about = results["sets"][name]
    drawn = {
        "plane": _plane,
        "measures": _measures,
        "attacks": _attacks,
        "ability": _ability,
        "cost": _cost,
        "answers": lambda about: drill_down(about, [cell for cell in results["cells"] if cell["set"] == name]),
    }
    of = f" <small>{escape(name)}: {about['forget']} facts forgotten, {escape(about['model'])}</small>"
    for part, title in _sections(about).items():
        head = f'<h2 id="{part}-{number}">{title}{of}</h2>'
        yield f'<section aria-labelledby="{part}-{number}">\n{head}\n' + "\n".join(drawn[part](about)) + "\n</section>"


# --- a section each ----------------------------------------------------------------------------------------


def _plane(about: Mapping[str, Any]) -> Iterator[str]:
    summaries = ordered(about["methods"])
    several = any(len(summary["points"]) > 1 for summary in summaries)
    yield (
        "<p>Further right, more of what was to be forgotten is gone; further up, more of the rest is still answered. "
        "The upper right corner is best. The dashed line is the Pareto front, beyond which nothing was measured; "
        f"methods on it are bold.{' Small points are single seeds.' if several else ''}</p>"
    )
    yield f'<div class="plane"><figure style="max-width:none">{plane(summaries, about["axes"])}</figure>'
    yield '<ol class="legend">'
    for number, method in enumerate(summaries, 1):
        scores = "failed" if method["forget"] is None else f"{share(method['forget'])} / {share(method['retain'])}"
        look = ' class="on"' if method["front"] else ""
        yield f"<li{look}><span>{number}</span>{_sign(method['family'])}<span>{named(told_label(method))}</span>"
        yield f"<span>{scores}</span></li>"
    families = dict.fromkeys(summary["family"] for summary in summaries)
    signs = " ".join(f"<span>{_sign(family)}{escape(FAMILIES.get(family, family))}</span>" for family in families)
    yield f'<li class="families">{signs}</li></ol></div>'


def _sign(family: str) -> str:
    return f'<svg viewBox="-7 -7 14 14" aria-hidden="true">{mark(family)}</svg>'


def _measures(about: Mapping[str, Any]) -> Iterator[str]:
    names = [key for key in about["measures"] if key not in ("forget", "retain")]
    has_text = any(method["perplexity_ratio"] is not None for method in about["methods"])
    heads = [_headed(name, about["measures"][name]["higher_is_better"]) for name in names]
    heads += [_headed("perplexity", False)] if has_text else []
    yield from _open("measures", ["method", *heads])
    for summary in ordered(about["methods"]):
        cells = [_share(summary, name) for name in names] + (
            [_number(ratio(summary["perplexity_ratio"]))] if has_text else []
        )
        yield _row(told_label(summary), cells)
    yield CLOSE


def _headed(name: str, up: bool) -> str:
    short = name.partition("_without_")[0].replace("_", " ")  # spelled out in the section on meanings
    return f"{escape(short)}&nbsp;{'↑' if up else '↓'}"


def _share(summary: Summary, name: str) -> str:
    ends = summary["intervals"].get(name)
    value = summary["measures"].get(name)
    interval = "" if ends is None or value is None else f"<small>{ends[0]:.2f}–{ends[1]:.2f}</small>"
    return f'<td class="number">{share(value)}{interval}</td>'


def _attacks(about: Mapping[str, Any]) -> Iterator[str]:
    summaries = [method for method in ordered(about["methods"]) if method["attacks"]]
    columns = [summary for summary in summaries if summary["family"] != "none"]  # the base has its own column
    attacks: dict[str, Mapping[str, Any]] = {}
    for method in summaries:
        for name, attack in method["attacks"].items():
            attacks.setdefault(name, attack)
    yield (
        f"<p>The share of {about['attacked']} forgotten facts that an attack brings back, with its 95 % interval; "
        "lower is better, and a stronger colour is worse. <i>base</i> is the model before: where it is low, the attack "
        "shows nothing. <i>chance</i> is how often the same attack “brings back” facts that the model never knew: what "
        "is no higher than that is forgotten.</p>"
    )
    yield from _open("attacks", ["attack", "base", *(named(column["method"]) for column in columns)])
    for name, attack in attacks.items():
        cells = [_rate(attack["base"]), *(_attacked(column["attacks"].get(name)) for column in columns)]
        yield f'<tr><th scope="row">{escape(name)}<small>{escape(attack["meaning"])}</small></th>{"".join(cells)}</tr>'
    yield CLOSE


def _attacked(attack: Mapping[str, Any] | None) -> str:
    if attack is None:
        return '<td class="rate">-</td>'
    chance = attack["control"]["rate"]
    return _rate(attack["edited"], "" if chance is None else f"chance {chance:.2f}")


def _rate(column: Mapping[str, Any], note: str = "") -> str:
    rate = column["rate"]
    if rate is None:
        return '<td class="rate">-<small>not tried</small></td>'
    low, high = column["interval"]
    more = f"<small>{note}</small>" if note else ""
    return f'<td class="rate" style="--r:{rate:.2f}">{rate:.2f}<small>{low:.2f}–{high:.2f}</small>{more}</td>'


def _ability(about: Mapping[str, Any]) -> Iterator[str]:
    summaries = [summary for summary in ordered(about["methods"]) if summary["ability"]]
    tasks: dict[str, Mapping[str, Any]] = {}
    for summary in summaries:
        for name, scores in summary["ability"].items():
            tasks.setdefault(name, scores)
    yield "<p>Tasks that have nothing to do with the facts, with standard errors; the base comes first.</p>"
    yield from _open(
        "ability", ["method", *(_headed(name, scores["higher_is_better"]) for name, scores in tasks.items())]
    )
    yield _row("base", [_number(share(scores["base"], 3)) for scores in tasks.values()])
    for summary in summaries:
        yield _row(told_label(summary), [_number(scored(summary["ability"].get(name))) for name in tasks])
    yield CLOSE


def _cost(about: Mapping[str, Any]) -> Iterator[str]:
    yield "<p>What a method takes; less is better in every column.</p>"
    yield from _open("cost", ["method", *map(escape, COST_HEADS.values())])
    for summary in ordered(about["methods"]):
        yield _row(told_label(summary), [_number(amount(key, value)) for key, value in cost_of(summary).items()])
    yield CLOSE


CLOSE = "</tbody></table></div>"


def _open(name: str, heads: Sequence[str]) -> Iterator[str]:
    """Opens a table in its own scrolling box; `heads` are markup."""
    yield f'<div class="scroll" role="region" aria-label="{name}" tabindex="0"><table class="{name}"><thead><tr>'
    first, *rest = heads
    yield f'<th scope="col">{first}</th>' + "".join(f'<th scope="col" class="number">{head}</th>' for head in rest)
    yield "</tr></thead><tbody>"


def _row(label: str, cells: Sequence[str]) -> str:
    return f'<tr><th scope="row">{named(label)}</th>{"".join(cells)}</tr>'


def _number(text: str) -> str:
    return f'<td class="number">{escape(text)}</td>'


# --- meaning, config, hashes -------------------------------------------------------------------------------


def _meaning(results: Mapping[str, Any]) -> Iterator[str]:
    for name, about in results["sets"].items():
        yield f"<h3>{escape(name)}</h3><dl>"
        for measure, described in about["measures"].items():
            yield _entry(measure.replace("_", " "), described["meaning"], described["higher_is_better"])
        yield "</dl>"
    yield "<h3>Everywhere</h3><dl>"
    yield _entry("perplexity", "on ordinary text, after over before; 1 is unchanged", False)
    attacks = {
        name: attack["meaning"]
        for about in results["sets"].values()
        for method in about["methods"]
        for name, attack in method["attacks"].items()
    }
    for name, meaning in attacks.items():
        yield _entry(f"attack {name}", f"the share of forgotten facts that it brings back: {meaning}", False)
    for key, head in COST_HEADS.items():
        yield _entry(head, COST_MEANINGS[key], False)
    yield "</dl>"


def _entry(name: str, meaning: str, up: bool) -> str:
    direction = "higher is better" if up else "lower is better"
    return f"<dt>{escape(name)} <span>{direction}</span></dt><dd>{escape(meaning)}</dd>"


def _receipt(results: Mapping[str, Any]) -> Iterator[str]:
    hashes = {
        "config": results["config_sha256"],
        **{name: about["identity"] for name, about in results["sets"].items()},
        "cells": {_called(cell): cell["weights_sha256"] for cell in results["cells"]},
    }
    for title, value in (("Config", results["config"]), ("Hashes (SHA-256)", hashes), ("Machine", results["machine"])):
        text = json.dumps(value, indent=1, ensure_ascii=False)
        yield f'<h3>{title}</h3><pre tabindex="0">{escape(text)}</pre>'


def _called(cell: Mapping[str, Any]) -> str:
    seed = "" if cell["seed"] is None else f", seed {cell['seed']}"
    return f"{cell['set']}, {cell['method']}{seed}"
