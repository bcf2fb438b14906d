"""Write TOFU's results as files: `metrics.json`, one file of results per model, a Markdown table and a page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from editlib.evaluation.metrics import MetricResult, write_results
from editlib.files import atomic_path, write_json
from editlib.reports.page import filled, groups, receipt_table, small, verdict_line
from editlib.reports.summary import number
from editlib.reports.tables import write_table
from editlib.tofu.sets import SETS

SUMMARY = "summary"
TITLES = {
    "forget": "Questions to forget",
    "forget_paraphrased": "The same in other words",
    "retain": "Questions to keep",
    "real_authors": "Real authors",
    "world_facts": "World facts",
    SUMMARY: "Together",
}
HEADLINE = ("forget_quality", "model_utility", "forget_efficacy", "retain_ability", "balance")
ARROWS = {True: "↑", False: "↓", None: ""}
KINDS = ("generated", "teacher_forced")


def write_tofu(metrics: Mapping[str, Any], out: Path) -> None:
    """Writes all files to the folder `out`, each atomically: `metrics.json`; `base.json` and `edited.json`, in
    open-unlearning's shape and usable for `--reference`; `table.md`; `report.html`."""
    write_json(out / "metrics.json", metrics)
    for side, scores in metrics["scores"].items():
        results = [MetricResult.from_dict({name: body}) for name, body in scores.items()]
        write_results(out / f"{side}.json", results)
    write_table(table_rows(metrics), out / "table.md", conditions(metrics))
    with atomic_path(out / "report.html") as temporary:
        temporary.write_bytes(_page(metrics).encode("utf-8", "replace"))


def headline_of(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """Picks the summary numbers, and a generated and a teacher-forced metric of the forget and the retain set."""
    names = [name for wanted in HEADLINE for name in scores if name == wanted or name.startswith(f"{wanted}_without")]
    for part in ("forget", "retain"):
        names += [f"{part}_generated_rouge_l_recall", f"{part}_teacher_forced_probability"]
    return {name: scores[name]["agg_value"] for name in names if name in scores}


def table_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Builds a table: the head, then the summary, then both models side by side with the better direction."""
    rows = [["set", "metric", "before", "after", "n", "good"]]
    for part, names in _by_set(metrics).items():
        for name in names:
            before, after, body = _both(metrics, name)
            rows.append(
                [TITLES[part], _short(part, name), before, after, str(body["n"]), ARROWS[body["higher_is_better"]]]
            )
    return rows


def conditions(metrics: Mapping[str, Any]) -> str:
    """Describes in sentences how many questions were asked and which parts were left out."""
    limit = metrics.get("limit")
    sizes = ", ".join(f"{TITLES[name].lower()} {n}" for name, n in metrics["sets"].items())
    sentences = [f"Asked: {sizes}."]
    if limit is not None:
        sentences.append(f"At most {limit} of each set were drawn (seed {metrics.get('seed')}).")
    if gone := {name: n for name, n in metrics.get("unlearned", {}).items() if n}:
        counts = " and ".join(f"{n} to {'forget' if name == 'forget' else 'keep'}" for name, n in gone.items())
        sentences.append(f"Left out, since the model never learned them: {counts}.")
    if missing := metrics.get("missing"):
        sentences.append(f"Not there: {', '.join(TITLES[name].lower() for name in missing)}.")
    if metrics.get("reference") is None:
        sentences.append("No forget quality, since no retain-only model was given.")
    if not metrics.get("judges"):
        sentences.append("No similarity and no entailment, since no model to judge them was given.")
    return " ".join(sentences)


def verdict(metrics: Mapping[str, Any]) -> str:
    """Says in one sentence which share of the answers is still generated, on the forget and on the retain set."""
    changes = []
    for part, what in (("forget", "to be forgotten"), ("retain", "to be kept")):
        name = f"{part}_generated_rouge_l_recall"
        if name in metrics["scores"]["edited"]:
            before, after, body = _both(metrics, name, digits=2)
            changes.append(f"of {body['n']} answers {what} the models say {before} before and {after} after")
    words = "; ".join(changes)
    return f"{words[:1].upper()}{words[1:]} (ROUGE-L recall)." if changes else "Nothing was measured."


def _by_set(metrics: Mapping[str, Any]) -> dict[str, list[str]]:
    """Lists the names of all results: those of both sets together, then set by set."""
    named: dict[str, list[str]] = {SUMMARY: [], **{name: [] for name in SETS}}
    for name in metrics["scores"]["edited"]:
        owner = next((part for part in SETS if any(name.startswith(f"{part}_{kind}_") for kind in KINDS)), SUMMARY)
        named[owner].append(name)
    return {part: names for part, names in named.items() if names}


def _short(part: str, name: str) -> str:
    if part == SUMMARY:
        return name.replace("_", " ")
    rest = name.removeprefix(f"{part}_")
    kind = next(kind for kind in KINDS if rest.startswith(kind))
    return f"{rest.removeprefix(f'{kind}_').replace('_', ' ')} ({kind.replace('_', '-')})"


def _both(metrics: Mapping[str, Any], name: str, *, digits: int = 3) -> tuple[str, str, Mapping[str, Any]]:
    """Returns a result's value before and after as text, and its body."""
    bodies = [metrics["scores"][side].get(name) for side in ("base", "edited")]
    values = [None if body is None else number(body["agg_value"]) for body in bodies]
    before, after = ("–" if value is None else f"{value:.{digits}f}" for value in values)
    return before, after, bodies[1]


# --- the page ----------------------------------------------------------------------------------------------


def _page(metrics: Mapping[str, Any]) -> str:
    base, edited = metrics["base"]["name"], metrics["edited"]["name"]
    return filled(
        __package__,
        "tofu",
        title=escape(f"{edited} · TOFU · editlib report"),
        heading=f"What {escape(edited)} forgot of TOFU, and what it kept",
        models=f"edited model <b>{escape(edited)}</b>, compared with its base <b>{escape(base)}</b>; "
        f"{escape(metrics['forget'])}, mode {escape(metrics['mode'])}",
        summary=verdict_line(verdict(metrics)),
        note=escape(conditions(metrics)),
        measures="\n".join(_measures(metrics)),
        points="\n".join(_points(metrics.get("points") or [])),
        answers="\n".join(_answers(metrics["items"])),
        receipt=receipt_table(_receipt(metrics)),
        footer=escape(f"editlib {metrics['editlib']} · evaluated in {metrics['seconds']:.0f} s"),
    )


def _measures(metrics: Mapping[str, Any]) -> Iterator[str]:
    for part, names in _by_set(metrics).items():
        yield f'<tbody><tr><th scope="rowgroup" colspan="6">{TITLES[part]}</th></tr>'
        for name in names:
            before, after, body = _both(metrics, name)
            better = {True: "higher is better", False: "lower is better", None: ""}[body["higher_is_better"]]
            yield (
                f'<tr><th scope="row">{escape(_short(part, name))}</th>'
                f'<td class="number" data-label="before">{before}</td>'
                f'<td class="number" data-label="after">{after}</td>'
                f'<td class="number" data-label="n">{body["n"]}</td>'
                f'<td class="direction">{better}</td><td class="meaning">{escape(body["meaning"])}</td></tr>'
            )
        yield "</tbody>"


def _points(points: list[Mapping[str, Any]]) -> Iterator[str]:
    """Yields a row for each batch of a chain."""
    if not points:
        return
    names = [name for name in points[-1] if name != "batch"]
    heads = "".join(f'<th scope="col" class="number">{escape(name.replace("_", " "))}</th>' for name in names)
    yield '<section aria-labelledby="points">\n<h2 id="points">After every batch</h2>\n<table class="stack">'
    yield f'<thead><tr><th scope="col">batch</th>{heads}</tr></thead>\n<tbody>'
    for point in points:
        cells = "".join(
            f'<td class="number" data-label="{escape(name.replace("_", " "))}">{_shown(point.get(name))}</td>'
            for name in names
        )
        yield f'<tr><th scope="row">{point["batch"]}</th>{cells}</tr>'
    yield "</tbody>\n</table>\n</section>"


def _answers(items: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    items = list(items)
    for part in SETS:
        asked = [item for item in items if item["set"] == part]
        if not asked:
            continue
        yield (
            f"<section>\n<h3>{TITLES[part]} <span>{len(asked)}</span></h3>\n"
            '<table class="stack">\n<thead><tr><th scope="col">scores</th><th scope="col">question</th>'
            '<th scope="col">before</th><th scope="col">after</th></tr></thead>\n<tbody>'
        )
        for item in asked:
            scores = [
                f"{_shown(item[f'{name}_before'], 2)} → {_shown(item[f'{name}_after'], 2)}"
                for name in ("rouge", "probability")
            ]
            about = [f"answer: {item['answer']}", item["id"]]
            yield (
                f"<tr><td><b>{scores[0]}</b>{small(scores[1:])}</td>"
                f'<th scope="row" dir="auto"><span class="text">{escape(item["question"])}</span>{small(about)}</th>'
                f"{_text(item, 'before')}{_text(item, 'after')}</tr>"
            )
        yield "</tbody>\n</table>\n</section>"


def _text(item: Mapping[str, Any], side: str) -> str:
    said = str(item[side]).strip()
    shown = f'<span class="text">{escape(said)}</span>' if said else '<span class="empty">empty</span>'
    return f'<td data-label="{side}" dir="auto">{shown}</td>'


def _shown(value: object, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if isinstance(value, float) else "–" if value is None else escape(str(value))


def _receipt(metrics: Mapping[str, Any]) -> Iterator[str]:
    names = ("limit", "seed", "max_new_tokens", "reference", "judges", "subjects", "unlearned", "request")
    evaluation = {f"{side} model sha256": metrics[side]["sha256"] for side in ("base", "edited")}
    evaluation |= {name.replace("_", " "): metrics.get(name) for name in names}
    receipt = metrics.get("receipt") or {}
    inner = {name: value for name, value in receipt.items() if isinstance(value, Mapping)}
    yield from groups({"evaluation": evaluation, "edit": {k: v for k, v in receipt.items() if k not in inner}, **inner})
