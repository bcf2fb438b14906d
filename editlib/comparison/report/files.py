"""What a comparison leaves: results.json, table.md, report.html, each written whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from editlib.comparison.report.page import page
from editlib.comparison.report.tables import markdown
from editlib.files import atomic_path


def write_all(results: Mapping[str, Any], out: Path) -> list[Path]:
    """Writes the three files and returns their paths.

    Raises:
        OutputError: one cannot be written.
    """
    texts = {
        "results.json": json.dumps(results, indent=1, ensure_ascii=False) + "\n",
        "table.md": markdown(results),
        "report.html": page(results),
    }
    for name, text in texts.items():
        with atomic_path(Path(out) / name) as temporary:
            temporary.write_bytes(text.encode("utf-8", "replace"))
    return [Path(out) / name for name in texts]
