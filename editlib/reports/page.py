"""Build HTML pages: one frame with one style for all of them, and tables of values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from html import escape
from importlib.resources import files
from string import Template

from editlib.reports.summary import SummaryRow


def filled(
    package: str, name: str, *, title: str, heading: str, models: str, summary: str, footer: str, **parts: str
) -> str:
    """Fills the frame of all pages with the page `name` of `package`; every text is markup, that is, already escaped.

    Args:
        name: name of `<name>.html`, the content of `<main>`, and of `<name>.css` and `<name>.js`, if the package has
            them.
        title: the text of the browser's tab.
        models: the line below the heading that names the models.
        summary: the rest of the page's header.
        parts: the texts for the page's own placeholders.
    """
    script = _own(package, f"{name}.js")
    return Template(_own("editlib.reports", "frame.html")).substitute(
        title=title,
        style=_own("editlib.reports", "page.css") + _own(package, f"{name}.css"),
        heading=heading,
        models=models,
        summary=summary,
        main=Template(_own(package, f"{name}.html")).substitute(parts),
        footer=footer,
        script=f"<script>\n{script}</script>\n" if script else "",
    )


def verdict_line(text: str) -> str:
    """Escapes a verdict in words and wraps it for the header of a page."""
    return f'<p class="verdict">{escape(text)}</p>'


def _own(package: str, file: str) -> str:
    """Reads a file of a package; an empty text if it has no such file."""
    path = files(package).joinpath(file)
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def headline(row: SummaryRow) -> str:
    """Formats a measure as a row of the table of measures."""
    metric, value, n, interval, direction, meaning = map(escape, row)
    return (
        f'<tr><th scope="row">{metric}</th><td class="number">{value}</td>'
        f'<td class="number" data-label="n">{n}</td>'
        f'<td class="interval" data-label="95 % interval">{interval}</td>'
        f'<td class="direction">{direction}</td><td class="meaning">{meaning}</td></tr>'
    )


def groups(values_by_group: Mapping[str, Mapping[str, object]]) -> Iterator[str]:
    """Yields one table body for each non-empty group of values, under its name."""
    for title, values in values_by_group.items():
        lines = {key: text for key, value in values.items() if (text := plain(value))}
        if lines:
            cells = [(escape(str(key)), escape(text)) for key, text in lines.items()]
            body = "".join(f'<tr><th scope="row">{key}</th><td>{text}</td></tr>' for key, text in cells)
            head = escape(str(title).replace("_", " "))
            yield f'<tbody><tr><th scope="rowgroup" colspan="2">{head}</th></tr>{body}</tbody>'


def receipt_table(receipt: Iterable[str]) -> str:
    """Formats a receipt's table bodies, folded, for the end of a page."""
    body = "\n".join(receipt)
    return f'<details>\n<summary>Receipt</summary>\n<table class="receipt">\n{body}\n</table>\n</details>'


def small(notes: Iterable[str]) -> str:
    """Formats notes below a cell's text."""
    return "".join(f"<small>{escape(note)}</small>" for note in notes if note)


def plain(value: object) -> str:
    """Formats a value of a receipt on one line, as a person would write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)
