"""Read documents from a file: plain text, JSON, a table, Parquet, or a folder that `datasets` saved."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from editlib.errors import CorpusError, RequestError, first_line
from editlib.requests.rows import file_rows, is_saved

KINDS = (
    "a .txt, .jsonl, .json, .csv, .tsv or .parquet file, hf:NAME[/CONFIG][:SPLIT], wiki-sample, or wiki-sample:heldout"
)
LINES, TABLES, PLAIN = (".jsonl", ".ndjson"), {".csv": ",", ".tsv": "\t"}, ("", ".txt", ".text", ".md", ".rst", ".tex")
TOO_LONG = 2**31 - 1  # most characters of a field of a table


def file_documents(path: Path, text_field: str | None) -> list[str]:
    """Reads the documents of a file, or of a folder by `save_to_disk`, except empty ones.

    Raises:
        CorpusError: no such file, another kind of file, a line or row that cannot be read, or no text at all.
    """
    kind = path.suffix.lower()
    if is_saved(path) or kind == ".parquet":
        documents = _documents(_stored_rows(path), text_field)
    elif kind in (*LINES, *TABLES, ".json"):
        text = _read_text(path)
        rows = _table_rows(path, text) if kind in TABLES else _json_rows(path, text, lines=kind in LINES)
        documents = _documents(rows, text_field, bare=kind == ".json")
    else:
        if text_field is not None:
            raise CorpusError(f"{path}: text_field={text_field!r} is for .jsonl; this is read as plain text")
        documents = _paragraphs(_plain_text(path, kind))
    if not documents:
        empty = path.is_file() and not path.stat().st_size
        raise CorpusError(f"{path}: the file {'is empty' if empty else 'holds no text'}; expected documents")
    return documents


def _read_text(path: Path) -> str:
    """Reads a UTF-8 file, with `\\n` at its line ends; raises `CorpusError` for any other file."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise CorpusError(f"corpus {str(path)!r}: no such file; expected {KINDS}") from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from error
    except OSError as error:
        reason = "Is a directory" if path.is_dir() else error.strerror or error
        raise CorpusError(f"{path}: cannot be read ({reason}); expected {KINDS}") from error
    except ValueError as error:  # a null byte in the name
        raise CorpusError(f"corpus {str(path)!r}: {error}; expected {KINDS}") from error
    if "\0" in text:
        raise CorpusError(f"{path}: holds null bytes, as UTF-16 and binary files do; expected UTF-8 text; convert it")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _plain_text(path: Path, kind: str) -> str:
    """Reads the text of a file without converting it.

    Raises:
        CorpusError: it is in a format whose markup would be read as text.
    """
    text = _read_text(path)
    if form := "no text file by its name" if kind not in PLAIN else _form_of(text):
        wanted = "expected plain text (.txt), or rows with a field 'text' (.jsonl, .json, .csv, .tsv, .parquet)"
        raise CorpusError(f"{path}: {form}; {wanted}; rename or convert it")
    return text


def _form_of(text: str) -> str | None:
    """Names the format of a text that is not plain; `None` for plain text."""
    begin = text.lstrip()[:100].lower()
    if begin.startswith(("<?xml", "<!doctype html", "<html")):
        return "XML or HTML"
    if begin.startswith(("{", "[")):
        for part in (text.strip().split("\n", 1)[0], text):  # a line of JSON Lines, or the whole text
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(json.loads(part), (dict, list)):
                    return "JSON"
    return None


def _paragraphs(text: str) -> list[str]:
    """Splits a text at its blank lines."""
    return [p.strip() for p in re.split(r"\n(?:[ \t\r\f\v]*\n)+", text) if p.strip()]


def _documents(rows: Iterable[tuple[str, Any]], field: str | None, *, bare: bool = False) -> list[str]:
    """Returns the texts of rows; each row comes with a name of its position in the file, for errors.

    Args:
        bare: a row may be the text itself.
    """
    documents = []
    for where, row in rows:
        if bare and isinstance(row, str):
            document = text_of({"text": row}, "text", where)
        else:
            field = field or find_text_field(row, where)
            document = text_of(row, field, where)
        if document.strip():
            documents.append(document)
    return documents


def _json_rows(path: Path, text: str, *, lines: bool) -> Iterator[tuple[str, Any]]:
    """Yields the rows of JSON Lines or, without `lines`, those of one array or object."""
    if not lines and text.strip():
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            if text.lstrip().startswith("["):
                raise CorpusError(f"{path}: not JSON ({first_line(error)}); expected an array of objects") from error
        else:
            rows = whole if isinstance(whole, list) else [whole]
            yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
            return
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would cut at U+2028 too
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{where}: not JSON ({first_line(error)}); expected one object per line") from error


def _table_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yields the rows of a table whose first line names its columns."""
    limit = csv.field_size_limit(TOO_LONG)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=TABLES[path.suffix.lower()], strict=True)
        rows = [(f"{path}, line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise CorpusError(f"{path}: not a table of {path.suffix.lower()[1:].upper()} ({error}); fix it") from error
    finally:
        csv.field_size_limit(limit)
    for where, row in rows:
        if None in row or None in row.values():  # more cells, or fewer
            columns = ", ".join(reader.fieldnames or ())
            wanted = f"expected as many cells as columns ({columns}); put a text that holds the separator in quotes"
            raise CorpusError(f"{where}: {'more' if None in row else 'fewer'} cells; {wanted}")
        yield where, row


def _stored_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields the rows of a Parquet file or of a folder that `datasets` saved."""
    try:
        for row in file_rows(path):
            yield f"{path}, {row.place}", row.value
    except RequestError as error:
        raise CorpusError(str(error)) from None


def find_text_field(row: Any, where: str) -> str:
    """Finds the field with the text: `text`, or the only string field; `where` names the row in errors.

    Raises:
        CorpusError: there is no such field.
    """
    if not isinstance(row, Mapping):
        raise CorpusError(f"{where}: a {type(row).__name__}; expected an object with a text field")
    strings = [key for key, value in row.items() if isinstance(value, str)]
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    named = ", ".join(strings) or "none"
    raise CorpusError(
        f"{where}: no field 'text', nor just one string field ({named}); rename one to text (in Python: text_field)"
    )


def text_of(row: Any, field: str, where: str) -> str:
    """Returns the text in a field of a row; raises `CorpusError` if there is none."""
    value = row.get(field) if isinstance(row, Mapping) else None
    if not isinstance(value, str):
        given = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise CorpusError(f"{where}: field {field!r} is missing or not a string (found: {given})")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{where}: field {field!r} holds half a surrogate pair") from error
    return value
