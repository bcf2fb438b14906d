"""Find the licence terms in a model's folder, which must go with every copy and every model made from it."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

# File names that licences require (Apache's NOTICE, Gemma's terms, Llama's LICENSE and USE_POLICY).
_FILE = re.compile(r"(licen[cs]e|notice|copying|copyright|use_policy|.*terms)([ ._-].*)?", re.IGNORECASE)
_LINE = re.compile(r"license(_name|_link)?:\s*\S")


@dataclass(frozen=True)
class Terms:
    """Holds the licence lines of a model card's header, and the licence files that must accompany the weights."""

    lines: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    def copy_to(self, folder: Path) -> None:
        """Copies the files into `folder`."""
        for file in self.files:
            shutil.copyfile(file, folder / file.name)

    @property
    def header(self) -> str:
        """The lines for another card's header."""
        return "".join(f"{line}\n" for line in self.lines)

    @property
    def sentence(self) -> str:
        """A paragraph for another model's card; empty if there are no files."""
        if not self.files:
            return ""
        names = ", ".join(f"`{file.name}`" for file in self.files)
        return f"\nThe terms of the base model apply to this one too: {names}.\n"


def terms_of(model: PreTrainedModel) -> Terms:
    """Reads the terms in the folder that `model` was loaded from; empty for a model that is not from a folder."""
    folder = Path(model.name_or_path or "")
    if not model.name_or_path or not folder.is_dir():
        return Terms()
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and _FILE.fullmatch(file.name))
    return Terms(_licence_lines(folder / "README.md"), tuple(files))


def _licence_lines(card: Path) -> tuple[str, ...]:
    try:
        first, *lines = card.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):  # no card, an empty one, or one that is not text
        return ()
    if first.strip() != "---":
        return ()
    header = lines[: next((i for i, line in enumerate(lines) if line.strip() == "---"), 0)]
    return tuple(line for line in header if _LINE.match(line))
