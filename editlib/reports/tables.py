"""Write tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from editlib.files import atomic_path


def write_table(rows: Sequence[Sequence[str]], path: Path, note: str = "") -> None:
    """Writes head and rows as a Markdown table, with a `note` below."""
    head, *rest = rows
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rest)]
    lines += ["", note] if note else []
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
