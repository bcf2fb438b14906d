"""What the HTML pages share: the template with its style, and tables of values in words. All text is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from html import escape
from importlib.resources import files
from string import Template

from editlib.reports.summary import Row


def filled(package: str, template: str, **parts: str) -> str:
    """Fills the page `template`, a file of `package`, with its `parts`, which are markup, and with the common style."""
    page = files(package).joinpath(template).read_text(encoding="utf-8")
    return Template(page).substitute(style=page_style(), **parts)


def page_style() -> str:
    """The style sheet that all pages share."""
    return files(__package__).joinpath("page.css").read_text(encoding="utf-8")


def headline(row: Row) -> str:
    """A measure as a row of the table of measures."""
    metric, value, n, interval, direction, meaning = map(escape, row)
    return (
        f'<tr><th scope="row">{metric}</th><td class="number">{value}</td>'
        f'<td class="number" data-label="n">{n}</td>'
        f'<td class="interval" data-label="95 % interval">{interval}</td>'
        f'<td class="direction">{direction}</td><td class="meaning">{meaning}</td></tr>'
    )


def groups(told: Mapping[str, Mapping[str, object]]) -> Iterator[str]:
    """One table body for each group of values that holds any, under its name."""
    for title, values in told.items():
        lines = {key: text for key, value in values.items() if (text := plain(value))}
        if lines:
            cells = [(escape(str(key)), escape(text)) for key, text in lines.items()]
            body = "".join(f'<tr><th scope="row">{key}</th><td>{text}</td></tr>' for key, text in cells)
            head = escape(str(title).replace("_", " "))
            yield f'<tbody><tr><th scope="rowgroup" colspan="2">{head}</th></tr>{body}</tbody>'


def small(notes: Iterable[str]) -> str:
    """Notes below a cell's text."""
    return "".join(f"<small>{escape(note)}</small>" for note in notes if note)


def plain(value: object) -> str:
    """A value of a receipt on one line, as a person would write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)
