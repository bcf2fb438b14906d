"""Write the files of a comparison: results.json, table.md, report.html, each in one step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from editlib.comparison.report.page import page
from editlib.comparison.report.tables import markdown
from editlib.files import atomic_path, write_json


def write_all(results: Mapping[str, Any], out: Path) -> list[Path]:
    """Writes the three files and returns their paths.

    Raises:
        OutputError: a file cannot be written.
    """
    out = Path(out)
    write_json(out / "results.json", results)
    texts = {"table.md": markdown(results), "report.html": page(results)}
    for name, text in texts.items():
        with atomic_path(out / name) as temporary:
            temporary.write_bytes(text.encode("utf-8", "replace"))
    return [out / "results.json", *[out / name for name in texts]]
