"""Finished measurements in a folder: one file for each model and task, found again by the hash of its job."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from editlib.ability.measured import Measured
from editlib.files import check_output, write_json

FINISHED = "finished"


class Kept:
    """The folder `out/finished`; without `out`, nothing is kept.

    Args:
        overwrite: measure again what is there; and use a folder that holds other things.

    Raises:
        OutputError: `out` is a file, or a folder with something else in it.
    """

    def __init__(self, out: Path | None, *, overwrite: bool = False) -> None:
        self.folder = None if out is None else out / FINISHED
        self.overwrite = overwrite
        if out is not None and not (out / FINISHED).is_dir():
            check_output(out, overwrite=overwrite)

    def find(self, job: Mapping[str, Any]) -> Measured | None:
        """What an earlier run came to in the same job; `None` where there is none, or its file is damaged."""
        if self.folder is None or self.overwrite:
            return None
        for path in sorted(self.folder.glob(f"*.{_digest(job)}.json")):  # the same model may have had another name
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
                if kept["job"] == job:
                    return Measured.from_dict(kept["measured"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return None

    def keep(self, label: str, job: Mapping[str, Any], measured: Measured) -> None:
        """Writes one result, atomically."""
        if self.folder is not None:
            write_json(self._path(label, job), {"job": job, "measured": measured.to_dict()})

    def _path(self, label: str, job: Mapping[str, Any]) -> Path:
        """The name is for the eye, the hash for the machine."""
        return self.folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', label)[-60:].strip('-')}.{_digest(job)}.json"


def _digest(job: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]
