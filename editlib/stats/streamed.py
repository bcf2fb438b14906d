"""Stream the text of a data set from the Hugging Face Hub (`hf:NAME[/CONFIG][:SPLIT]`)."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from editlib.errors import CorpusError, EditlibError, FetchError, first_line
from editlib.stats.text_files import find_text_field, text_of
from editlib.version import install_line


@dataclass(frozen=True)
class _Streamed:
    """Yields the text of a streamed dataset, from its start in each iteration."""

    rows: Iterable[Mapping[str, Any]]
    field: str
    spec: str

    def __iter__(self) -> Iterator[str]:
        with _one_line_errors(self.spec):
            for number, row in enumerate(self.rows):
                text = text_of(row, self.field, f"{self.spec}, row {number}")
                if text.strip():
                    yield text


def dataset_parts(spec: str) -> tuple[str, str]:
    """Returns the name and the split of a data set.

    Raises:
        CorpusError: not a valid name, or the package `datasets` is missing.
    """
    name, _, split = spec.removeprefix("hf:").partition(":")
    if not re.fullmatch(r"[^/\s]+(?:/[^/\s]+){0,2}", name):
        raise CorpusError(f"{spec!r}: expected hf:NAME[/CONFIG][:SPLIT], where NAME may be OWNER/NAME")
    try:
        # Not at the top: datasets is an extra, and slow to import.
        importlib.import_module("datasets")
    except ImportError as error:
        raise CorpusError(f"{spec}: needs the datasets package: {install_line('eval')}") from error
    return name, split or "train"


def open_dataset(spec: str, text_field: str | None) -> tuple[str, Iterable[str], list[str]]:
    """Opens a streamed data set; returns its name with the split, its documents, and strings that identify it.

    Raises:
        CorpusError: no such data set, split or field, or no text.
        FetchError: it cannot be reached.
    """
    name, split = dataset_parts(spec)
    datasets = importlib.import_module("datasets")
    with _one_line_errors(spec):
        rows = _open_stream(datasets, name, split, spec)
        first = next(iter(rows), None)
    if first is None:
        raise CorpusError(f"{spec}: the dataset holds no rows")
    field = text_field or find_text_field(first, f"{spec}, row 0")
    documents = _Streamed(rows, field, spec)
    head = [text for text, _ in zip(documents, range(32), strict=False)]
    if not head:
        raise CorpusError(f"{spec}: field {field!r} holds no text")
    return f"{name}-{split}", documents, [name, split, field, str(getattr(rows, "_fingerprint", "")), *head]


def _open_stream(datasets: Any, name: str, split: str, spec: str) -> Any:
    """Opens a data set as OWNER/NAME before NAME/CONFIG: both are written `a/b`."""
    readings: list[tuple[str, str | None]] = [(name, None)]
    if "/" in name:
        dataset, _, config_name = name.rpartition("/")
        readings.append((dataset, config_name))
    if name.count("/") == 2:
        del readings[0]
    problem = None
    for dataset, config in readings:
        try:
            return datasets.load_dataset(dataset, config, split=split, streaming=True)
        except FileNotFoundError as error:  # also what datasets raises for an unknown name
            problem = problem or error
    raise CorpusError(f"{spec}: no such dataset ({first_line(problem)})") from problem


@contextlib.contextmanager
def _one_line_errors(spec: str) -> Iterator[None]:
    """Turns the OSErrors, ValueErrors and own errors of `datasets` into ours."""
    try:
        yield
    except EditlibError:
        raise
    except OSError as error:
        raise FetchError(
            f"{spec}: cannot be reached ({first_line(error)}); connect, or give a .txt or .jsonl file"
        ) from error
    except Exception as error:
        raise CorpusError(f"{spec}: cannot be read ({first_line(error)})") from error
