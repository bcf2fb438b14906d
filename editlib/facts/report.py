"""Build the page that shows the effect of an edit: one HTML file, made from the numbers of `editlib eval` alone.

All text by models is escaped, equal numbers give equal bytes, and the page loads nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from editlib.facts.plots import ReportError, plot_png, plots, require_matplotlib
from editlib.files import atomic_path, write_json
from editlib.reports.attacks import attack_section
from editlib.reports.page import filled, groups, headline, receipt_table, small, verdict_line
from editlib.reports.summary import number, rows, summary_rows, verdict

__all__ = ["ReportError", "plot_png", "require_matplotlib", "summary_rows", "verdict", "write_report"]

SECTIONS = {
    "Questions to forget": ("request",),
    "Paraphrases of them": ("paraphrase",),
    "Neighbours": ("neighbour",),
    "Same subject, other question": ("same_subject", "same_subject_anchored", "crossed"),
    "Other questions and instructions": (),  # and every kind without its own section
}
TO_FORGET = ("request", "paraphrase")
MARKS = {"fail": "✗ failed", "pass": "✓ passed", "skip": "– not counted"}  # in the order of a section


def write_report(metrics: Mapping[str, Any], path: Path) -> None:
    """Writes the page for the measurements of `editlib eval`, atomically.

    Raises:
        ReportError: matplotlib is not installed.
        OutputError: `path` cannot be written.
    """
    base, edited = _name(metrics, "base"), _name(metrics, "edited")
    page = filled(
        __package__,
        "report",
        title=escape(f"{edited} · editlib report"),
        heading=f"What {escape(edited)} forgot, and what it kept",
        models=f"edited model <b>{escape(edited)}</b>, compared with its base <b>{escape(base)}</b>",
        summary=verdict_line(verdict(metrics)),
        headline="\n".join(map(headline, rows(metrics))),
        plots=_plots(metrics),
        attacks=attack_section(metrics.get("attacks") or []),
        answers="\n".join(_answers(metrics.get("items") or [])),
        receipt=receipt_table(_receipt(metrics)),
        footer=escape(" · ".join(_footer(metrics))),
    )
    with atomic_path(Path(path)) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))


def _name(metrics: Mapping[str, Any], side: str) -> str:
    return str((metrics.get(side) or {}).get("name") or f"the {side} model")


def _plots(metrics: Mapping[str, Any]) -> str:
    """Draws one figure for each plot; no section without plots."""
    drawn = [
        f"<figure><figcaption><b>{escape(plot.title)}</b> <span>{escape(plot.note)}</span></figcaption>\n"
        + plot.svg.replace("<svg", f'<svg role="img" aria-label="{escape(f"{plot.title}: {plot.words}")}"', 1)
        + "</figure>"
        for plot in plots(metrics)
    ]
    if not drawn:
        return ""
    head = '<section aria-labelledby="plots">\n<h2 id="plots">Plots</h2>\n<div class="plots">'
    return "\n".join([head, *drawn, "</div>\n</section>"])


# --- answers -----------------------------------------------------------------------------------------------


def _answers(items: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yields a section for each kind of question, failures first, otherwise in the order of the file."""
    section_of = {kind: title for title, kinds in SECTIONS.items() for kind in kinds}
    sections: dict[str, list[Mapping[str, Any]]] = {title: [] for title in SECTIONS}
    last = [*SECTIONS][-1]
    for item in items:
        sections[section_of.get(str(item.get("kind")), last)].append(item)
    for title, asked in sections.items():
        if not asked:
            continue
        outcomes = [_outcome(item) for item in asked]
        counted = len(asked) - outcomes.count("skip")
        yield (
            f"<section>\n<h3>{title} <span>{outcomes.count('fail')} of {counted} failed</span></h3>\n"
            '<table class="stack">\n<thead><tr><th scope="col">outcome</th><th scope="col">question</th>'
            '<th scope="col">before</th><th scope="col">after</th></tr></thead>\n<tbody>'
        )
        order = [*MARKS]
        yield from map(_answer, sorted(asked, key=lambda item: order.index(_outcome(item))))
        yield "</tbody>\n</table>\n</section>"


def _outcome(item: Mapping[str, Any]) -> str:
    if item.get("passed") is None or not item.get("counted", True):
        return "skip"
    return "pass" if item["passed"] else "fail"


def _answer(item: Mapping[str, Any]) -> str:
    outcome = _outcome(item)
    change = number(item.get("nats_change"))
    notes = [_reason(item, outcome), "" if change is None else f"{change:+.3f} nats"]
    about = ["" if item.get("answer") is None else f"answer: {item['answer']}", str(item.get("id") or "")]
    return (
        f'<tr class="{outcome}"><td><b>{MARKS[outcome]}</b>{small(notes)}</td>'
        f'<th scope="row" dir="auto"><span class="text">{escape(str(item.get("question") or ""))}</span>'
        f"{small(about)}</th>{_text(item, 'before')}{_text(item, 'after')}</tr>"
    )


def _reason(item: Mapping[str, Any], outcome: str) -> str:
    """Says why an item failed or was left out, as far as its fields show it."""
    if outcome == "skip":
        return "wrong already before" if item.get("right_before") is False else ""
    if outcome == "pass":
        return ""
    if item.get("kind") in TO_FORGET:
        return "the answer is still there" if item.get("right_after") else "no fluent refusal"
    return "refused" if item.get("refused_after") else "the answer changed"


def _text(item: Mapping[str, Any], side: str) -> str:
    said = item.get(side)
    if said is None or not str(said).strip():
        nothing = "not asked" if said is None else "empty"
        return f'<td data-label="{side}"><span class="empty">{nothing}</span></td>'
    return f'<td data-label="{side}" dir="auto"><span class="text">{escape(str(said).strip())}</span></td>'


# --- receipt and footer ------------------------------------------------------------------------------------


def _receipt(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Lists the compared models and costs, then the receipt: its single values, then its groups."""
    hashes = {f"{side} model sha256": (metrics.get(side) or {}).get("sha256") for side in ("base", "edited")}
    cost = {"seconds": _whole(metrics.get("seconds")), "peak memory, MB": _whole(metrics.get("peak_rss_mb"))}
    cost |= {"first prompt, as the models saw it": metrics.get("first_prompt")} if metrics.get("first_prompt") else {}
    receipt = metrics.get("receipt") or {}
    inner = {name: values for name, values in receipt.items() if isinstance(values, Mapping)}
    single = {name: values for name, values in receipt.items() if name not in inner}
    yield from groups({"evaluation": hashes | cost, "edit": single, **inner})
    if not receipt:
        yield '<tbody><tr><td colspan="2">The edited model has no receipt (editlib.json).</td></tr></tbody>'


def _whole(value: object) -> str | None:
    return None if (finite := number(value)) is None else f"{finite:.0f}"


def _footer(metrics: Mapping[str, Any]) -> Iterator[str]:
    yield f"editlib {metrics.get('editlib') or '(version unknown)'}"
    if (seconds := _whole(metrics.get("seconds"))) is not None:
        yield f"evaluated in {seconds} s"
    if (memory := _whole(metrics.get("peak_rss_mb"))) is not None:
        yield f"{memory} MB of memory at most"


def write_outputs(metrics: dict[str, Any], out: Path) -> None:
    """Writes `metrics.json` and `report.html`, each atomically."""
    out.mkdir(parents=True, exist_ok=True)
    write_report(metrics, out / "report.html")
    write_json(out / "metrics.json", metrics)
