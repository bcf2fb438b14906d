"""Build the table of attacks on a page: the share of forgotten facts that each one recovers, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from editlib.reports.page import small
from editlib.reports.summary import number

HEADS = {"edited": "edited model", "base": "before the edit", "control": "facts never known"}

HEAD = """<section aria-labelledby="attacks">
<h2 id="attacks">Attacks</h2>
<p>The share of facts whose answer an attack brings back, with its 95 % interval. A fact counts as forgotten where the
edited model leaks no more than it does of facts that the base never knew. An attack that brings little out of the
model before the edit shows nothing.</p>
<table class="stack">"""


def attack_section(results: Sequence[Mapping[str, Any]]) -> str:
    """Makes the section for the `results` of an `attacks.json`; an empty text if there are none.

    Of each result, `attack`, `meaning` and `shares` by column are read.
    """
    if not results:
        return ""
    columns = "".join(f'<th scope="col">{head}</th>' for head in HEADS.values())
    lines = [HEAD, f'<thead><tr><th scope="col">attack</th>{columns}</tr></thead>', "<tbody>"]
    for result in results:
        cells = "".join(_cell(head, result["shares"].get(column) or {}) for column, head in HEADS.items())
        name = f'<th scope="row">{escape(str(result["attack"]))}{small([str(result.get("meaning") or "")])}</th>'
        lines.append(f"<tr>{name}{cells}</tr>")
    return "\n".join([*lines, "</tbody>\n</table>\n</section>"])


def _cell(head: str, share: Mapping[str, Any]) -> str:
    """Formats a share with its counts and its interval: the bootstrap's, or Wilson's if all or no facts leaked."""
    rate = number(share.get("rate"))
    if rate is None:
        return f'<td data-label="{head}"><span class="empty">not tried</span></td>'
    low, high = share["interval"] if 0 < share["leaked"] < share["n"] else share["wilson"]
    notes = [f"{share['leaked']} of {share['n']}", f"{low:.2f} to {high:.2f}"]
    return f'<td data-label="{head}">{rate:.2f}{small(notes)}</td>'
