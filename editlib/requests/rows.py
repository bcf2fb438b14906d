"""Read objects from a file: JSON Lines, a JSON array, a table, Parquet, or a folder that `datasets` saved.

An unusable row is returned with its fault, so that a reader can name all of them at once; an unreadable file is an
error.
"""

from __future__ import annotations

import codecs
import gzip
import importlib
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editlib.errors import RequestError, first_line, quote
from editlib.requests import json_text
from editlib.requests.table import is_table, table_rows
from editlib.version import install_line

WANTED = "expected a JSONL, JSON, CSV or TSV file"
GZIP = b"\x1f\x8b"
_UNPACK = "unpack it"
_OTHERS = {
    b"version https://git-lfs": ("a pointer of Git LFS in the file's place", "fetch it with git lfs pull"),
    b"<!doctype": ("a web page", "download the file itself"),
    b"<html": ("a web page", "download the file itself"),
    b"bzh": ("packed by bzip2", _UNPACK),
    b"\xfd7zxz": ("packed by xz", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("packed by zstd", _UNPACK),
    b"pk\x03\x04": ("a ZIP archive or a spreadsheet", "unpack it, or save it as CSV or JSON"),
    b"par1": ("Parquet under another name", "end its name with .parquet"),
    b"arrow1": ("Arrow", "give the folder by datasets.save_to_disk, or write Parquet"),
}
"""Beginnings of files that are not text, in lower case, with their kind and the remedy."""

VIEWER = frozenset({"features", "rows"})
"""Keys of an answer of the Hub's viewer; its rows are in `row`."""
COLUMNS = frozenset({"prompt", "question", "query", "src"})
"""With one of these columns an object of columns is a table of requests."""


@dataclass(frozen=True)
class FileRow:
    """Holds a value with its place in the file, `line 3` of JSON Lines or `row 3` of anything else, counted from 1."""

    place: str
    value: Any
    complaint: str | None = None

    def where(self, path: Path) -> str:
        """Returns the place with its file, as messages begin: `facts.jsonl:3` or `facts.json: row 3`."""
        kind, number = self.place.split(" ", 1)
        return f"{path}:{number}" if kind == "line" else f"{path}: {self.place}"


def file_rows(path: Path) -> Iterator[FileRow]:
    """Reads the objects of a file or folder, in order.

    Raises:
        RequestError: it cannot be read, or needs a package that is not installed.
    """
    if is_saved(path):
        return _numbered(_saved(path))
    if path.suffix.lower() == ".parquet":
        return _numbered(_parquet(path))
    text = read_text(path)
    if is_table(path) and text.strip() and not text.lstrip().startswith(("[", "{")):
        table = table_rows(path, text)
        return (FileRow(f"line {line}", value, complaint or _doubled(value)) for line, value, complaint in table)
    return _json_rows(path, text)


def _json_rows(path: Path, text: str) -> Iterator[FileRow]:
    """Reads the objects of a JSON array, of JSON Lines, or one object alone.

    Raises:
        RequestError: an array is invalid JSON, or no line is valid JSON.
    """
    if text.lstrip().startswith("["):
        return _numbered(parse_json(path, text, 1))
    try:
        whole = json_text.loads(text)  # one object, printed over several lines
    except (ValueError, RecursionError):
        return iter(_some_json(path, list(_lines(text))))
    if rows := _wrapped(whole):
        return _numbered(rows)
    line = 1 + text[: text.index(text.lstrip()[0])].count("\n")
    return iter([FileRow(f"line {line}", whole, _doubled(whole))])


def read_text(path: Path) -> str:
    """Reads the text of a file.

    Raises:
        RequestError: it is missing, cannot be read, or is not UTF-8.
    """
    try:
        raw = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        if path_is_folder(path):
            reason = "Is a directory"  # Windows reports a missing permission
        raise RequestError(f"{path}: {reason}; {WANTED}; check the path") from None
    return _decoded(path, _unpacked(path, raw))


def _unpacked(path: Path, raw: bytes) -> bytes:
    """Returns the bytes of a file, unpacked if it is gzipped.

    Raises:
        RequestError: a file of another kind, by its first bytes.
    """
    for start, (kind, instead) in _OTHERS.items():
        if raw[: len(start)].lower() == start:
            raise RequestError(f"{path}: {kind}; {WANTED}; {instead}")
    if not raw.startswith(GZIP):
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(f"{path}: damaged gzip ({first_line(error)}); {WANTED}; get it again") from None


def _decoded(path: Path, raw: bytes) -> str:
    try:
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # the "Unicode" of Windows' tools
            return raw.decode("utf-16")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RequestError(f"{path}:{line}: not UTF-8; expected UTF-8 text; save the file as UTF-8") from None


def parse_json(path: Path, text: str, line: int) -> Any:
    """Parses the value of a JSON text that begins at `line` of a file.

    Raises:
        RequestError: it is not JSON; says where.
    """
    complaint = _json_complaint(text)
    if isinstance(complaint, tuple):
        at, said = complaint
        raise RequestError(f"{path}:{line + at - 1}: {said}")
    return json_text.loads(text)


def path_is_folder(path: Path) -> bool:
    """Returns whether a path is a folder; false for an impossible name."""
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that is too long; a null byte, before Python 3.13
        return False


def _json_complaint(text: str) -> tuple[int, str] | None:
    """Returns the line and the fault of a wrong JSON text, or `None`."""
    wanted = "expected one JSON object; fix the line"
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        before, after = text[: error.pos].rstrip(), text[error.pos : error.pos + 1]
        behind = after == "," and not text[error.pos + 1 :].strip()  # an object, and nothing after the comma
        comma = behind or (before.endswith(",") and after in ("]", "}", ""))
        reason = "a comma too many" if comma else error.msg
        return error.lineno, f"not JSON at column {error.colno} ({reason}); {wanted}"
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 100 000 brackets
        return 1, f"not usable as JSON ({first_line(error)}); {wanted}"
    return None


def _wrapped(whole: Any) -> list[Any]:
    """Returns the rows of an object that only holds a table: a list of objects (`{"data": [...]}`), the answer of the
    Hub's viewer, or columns, as pandas writes them; else none."""
    if not isinstance(whole, dict) or not whole or isinstance(whole, json_text.Doubled):
        return []
    values = [whole["rows"]] if whole.keys() >= VIEWER else list(whole.values())
    if len(values) == 1 and isinstance(values[0], list) and all(isinstance(row, dict) for row in values[0]):
        return [row["row"] if "row_idx" in row and "row" in row else row for row in values[0]]
    if not COLUMNS.isdisjoint(whole) and len(values) > 1:
        return _from_columns(whole)
    return []


def _from_columns(whole: dict[str, Any]) -> list[Any]:
    """Returns the rows of an object of columns: lists of one length, or objects with the same keys; else none."""
    columns = list(whole.values())
    if all(isinstance(column, dict) and column.keys() == columns[0].keys() for column in columns):
        columns = [list(column.values()) for column in columns]
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return []
    return [dict(zip(whole, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _some_json(path: Path, rows: list[FileRow]) -> list[FileRow]:
    """Returns the rows; raises `RequestError` if there are several and none is JSON, as in CSV or YAML."""
    if len(rows) > 1 and all(row.complaint is not None for row in rows):
        said = str(rows[0].complaint).partition(";")[0]
        raise RequestError(
            f"{rows[0].where(path)}: {said}, and nor is any other of its {len(rows)} lines; expected JSON Lines (one "
            "object per line), a JSON array, a table called .csv or .tsv, or Parquet; rename or convert the file"
        )
    return rows


def _lines(text: str) -> Iterator[FileRow]:
    for number, line in enumerate(re.split(r"\r?\n|\r", text), 1):  # str.splitlines would cut a string at U+2028
        if line.strip():
            complaint = _json_complaint(line)
            value = None if complaint else json_text.loads(line)
            yield FileRow(f"line {number}", value, complaint[1] if complaint else _doubled(value))


def _numbered(values: list[Any]) -> Iterator[FileRow]:
    return (FileRow(f"row {number}", value, _doubled(value)) for number, value in enumerate(values, 1))


def _doubled(value: Any) -> str | None:
    """Describes an object in `value` with a key twice; `None` if there is none."""
    key = json_text.doubled_key(value)
    return None if key is None else f"key {quote(key)} is there twice in one object; {json_text.MENDED}"


def is_saved(path: Path) -> bool:
    """Returns whether a path is a folder that `datasets` saved."""
    return path_is_folder(path) and any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _saved(path: Path) -> list[Any]:
    """Reads the rows of a folder by `datasets.save_to_disk`."""
    if (path / "dataset_dict.json").is_file():
        splits = sorted(item.name for item in path.iterdir() if (item / "state.json").is_file())
        if len(splits) != 1:
            given = f"{path}: holds the splits {', '.join(splits) or 'none'}; expected one"
            raise RequestError(f"{given}; give the folder of one, as {path / (splits or ['train'])[0]}")
        path = path / splits[0]
    datasets = _package("datasets", path)
    try:
        return list(datasets.load_from_disk(str(path)))
    except Exception as error:  # datasets, pyarrow or json may raise for a damaged folder
        raise RequestError(f"{path}: cannot be read ({first_line(error)[:160]}); save it again") from None


def _parquet(path: Path) -> list[Any]:
    if not path.is_file():
        read_text(path)  # says what is wrong with it
    parquet = _package("pyarrow.parquet", path)
    try:
        return parquet.read_table(str(path)).to_pylist()
    except Exception as error:  # pyarrow has many own classes
        raise RequestError(f"{path}: not Parquet ({first_line(error)[:160]}); {WANTED}, or write it again") from None


def _package(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise RequestError(
            f"{path}: needs the package datasets to be read: {install_line('eval')}, or give JSONL"
        ) from None
