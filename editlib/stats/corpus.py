"""Text for layer statistics and perplexity: a file, a streamed dataset, or a small Wikipedia sample."""

from __future__ import annotations

import bz2
import contextlib
import csv
import hashlib
import importlib
import io
import json
import logging
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from editlib.errors import CorpusError, EditlibError, FetchError, RequestError, first_line
from editlib.files import sync
from editlib.models.packaged.fetch import cache_dir
from editlib.models.packaged.wheels import download_package
from editlib.requests.rows import file_rows, is_saved
from editlib.stats.wiki_markup import clean_wiki

logger = logging.getLogger(__name__)

SAMPLES = ("wiki-sample", "wiki-sample:heldout")
KINDS = (
    "a .txt, .jsonl, .json, .csv, .tsv or .parquet file, hf:NAME[/CONFIG][:SPLIT], wiki-sample, or wiki-sample:heldout"
)

# The sample is test data inside one fixed wheel, which any host can download: only its zip is opened.
WIKI_PACKAGE, WIKI_VERSION = "gensim", "4.4.0"
WIKI_WHEEL = "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8"
WIKI_PIP_OPTIONS = (
    *("--platform", "manylinux_2_28_x86_64", "--implementation", "cp"),
    *("--python-version", "3.11", "--abi", "cp311"),
)
WIKI_MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
WIKI_CLEANING = 1  # raised when the cleaner's output changes, so that cached text is made again
HELD_OUT_EVERY = 8


@dataclass(frozen=True)
class Corpus:
    """Holds the documents with a name for the statistics folder and a hash to recognise the same text again.

    `documents` may be walked more than once; its length is known unless the text is streamed. `sha256` is
    over all documents, or, streamed, over the dataset's fingerprint and its first documents.
    """

    name: str
    documents: Iterable[str]
    sha256: str


def load_corpus(spec: str, *, text_field: str | None = None) -> Corpus:
    """Opens a corpus.

    Args:
        spec: a .txt file (documents are separated by blank lines); rows with a text (.jsonl, .json, .csv, .tsv,
            .parquet, a folder by `save_to_disk`); `hf:NAME[/CONFIG][:SPLIT]`
            (split `train` unless named); `wiki-sample`, about 90 English Wikipedia articles for statistics;
            `wiki-sample:heldout`, every 8th article of that sample, kept apart for perplexity. The text of
            the sample is under CC BY-SA, by Wikipedia's contributors.
        text_field: the field with the text (rows and hf: only); `text`, or the only string field.

    Raises:
        CorpusError: no such file, split or field, a line that cannot be read, or no text at all.
        FetchError: the sample or the dataset is neither at hand nor can be downloaded.
    """
    if spec in SAMPLES:
        if text_field is not None:
            raise CorpusError(f"{spec}: text_field={text_field!r} is for .jsonl files and hf: datasets")
        held_out = spec.endswith(":heldout")
        last = HELD_OUT_EVERY - 1
        documents = [a for i, a in enumerate(_wiki_articles()) if (i % HELD_OUT_EVERY == last) == held_out]
        return Corpus(spec.replace(":", "-"), documents, hash_documents(documents))
    if spec.startswith("hf:"):
        return _load_hf(spec, text_field)
    return _load_file(Path(spec), text_field)


def check_corpus(spec: str) -> None:
    """Checks what can be said of a corpus without the network; call it before a model is loaded.

    Raises:
        CorpusError: no such file, or one that holds no text that is read.
    """
    if spec.startswith("hf:"):
        _hf_parts(spec)
    elif spec not in ("self", *SAMPLES):
        load_corpus(spec)


def hash_documents(documents: Iterable[str]) -> str:
    """Hashes the documents in order (SHA-256, hex); where one ends and the next begins counts."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


# --- files -------------------------------------------------------------------------------------------


LINES, TABLES, PLAIN = (".jsonl", ".ndjson"), {".csv": ",", ".tsv": "\t"}, ("", ".txt", ".text", ".md", ".rst", ".tex")
TOO_LONG = 2**31 - 1  # characters that a field of a table may have


def _load_file(path: Path, text_field: str | None) -> Corpus:
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
    name = re.sub(r"[^\w.-]+", "-", path.stem).strip("-.") or "corpus"
    return Corpus(name, documents, hash_documents(documents))


def _read_text(path: Path) -> str:
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
        CorpusError: it is in a form whose marks would be read as text.
    """
    text = _read_text(path)
    if found := "no text file by its name" if kind not in PLAIN else _form_of(text):
        wanted = "expected plain text (.txt), or rows with a field 'text' (.jsonl, .json, .csv, .tsv, .parquet)"
        raise CorpusError(f"{path}: {found}; {wanted}; rename or convert it")
    return text


def _form_of(text: str) -> str | None:
    """Returns what a text is that is no plain one, `None` for plain text."""
    begin = text.lstrip()[:100].lower()
    if begin.startswith(("<?xml", "<!doctype html", "<html")):
        return "XML or HTML"
    if begin.startswith(("{", "[")):
        for part in (text.strip().split("\n", 1)[0], text):  # of JSON Lines, or the whole
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(json.loads(part), (dict, list)):
                    return "JSON"
    return None


def _paragraphs(text: str) -> list[str]:
    return [p.strip() for p in re.split(r"\n(?:[ \t\r\f\v]*\n)+", text) if p.strip()]


def _documents(rows: Iterable[tuple[str, Any]], field: str | None, *, bare: bool = False) -> list[str]:
    """Returns the texts of rows, each with its place.

    Args:
        bare: a row may be the text itself.
    """
    documents = []
    for where, row in rows:
        if bare and isinstance(row, str):
            document = _text_of({"text": row}, "text", where)
        else:
            field = field or _find_text_field(row, where)
            document = _text_of(row, field, where)
        if document.strip():
            documents.append(document)
    return documents


def _json_rows(path: Path, text: str, *, lines: bool) -> Iterator[tuple[str, Any]]:
    """Yields the rows of JSON Lines, or, where not `lines`, those of one array or object."""
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
            raise CorpusError(f"{where}: not JSON ({first_line(error)}); expected one object a line") from error


def _table_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yields the rows of a table whose first line names its columns."""
    limit = csv.field_size_limit(TOO_LONG)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=TABLES[path.suffix.lower()], strict=True)
        rows = [(f"{path}, line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise CorpusError(f"{path}: not a table of {path.suffix.lower()[1:].upper()} ({error}); mend it") from error
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


def _find_text_field(row: Any, where: str) -> str:
    if not isinstance(row, Mapping):
        raise CorpusError(f"{where}: a {type(row).__name__}; expected an object with a text field")
    strings = [key for key, value in row.items() if isinstance(value, str)]
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    found = ", ".join(strings) or "none"
    raise CorpusError(
        f"{where}: no field 'text', nor just one string field ({found}); rename one to text (in Python: text_field)"
    )


def _text_of(row: Any, field: str, where: str) -> str:
    value = row.get(field) if isinstance(row, Mapping) else None
    if not isinstance(value, str):
        found = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise CorpusError(f"{where}: field {field!r} is missing or not a string (found: {found})")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{where}: field {field!r} holds half a surrogate pair") from error
    return value


# --- datasets ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Streamed:
    """Yields the text of a streamed dataset, from its start each time it is walked."""

    rows: Iterable[Mapping[str, Any]]
    field: str
    spec: str

    def __iter__(self) -> Iterator[str]:
        with _one_line_errors(self.spec):
            for number, row in enumerate(self.rows):
                text = _text_of(row, self.field, f"{self.spec}, row {number}")
                if text.strip():
                    yield text


def _hf_parts(spec: str) -> tuple[str, str]:
    """Returns the name and the split of a data set.

    Raises:
        CorpusError: no name that one may have, or the package that reads it is missing.
    """
    name, _, split = spec.removeprefix("hf:").partition(":")
    if not re.fullmatch(r"[^/\s]+(?:/[^/\s]+){0,2}", name):
        raise CorpusError(f"{spec!r}: expected hf:NAME[/CONFIG][:SPLIT], where NAME may be OWNER/NAME")
    try:
        # Not at the top: datasets is an extra, and slow to import.
        importlib.import_module("datasets")
    except ImportError as error:
        raise CorpusError(f"{spec}: needs the datasets package: pip install 'editlib[eval]'") from error
    return name, split or "train"


def _load_hf(spec: str, text_field: str | None) -> Corpus:
    name, split = _hf_parts(spec)
    datasets = importlib.import_module("datasets")
    with _one_line_errors(spec):
        rows = _open_stream(datasets, name, split, spec)
        first = next(iter(rows), None)
    if first is None:
        raise CorpusError(f"{spec}: the dataset holds no rows")
    field = text_field or _find_text_field(first, f"{spec}, row 0")
    documents = _Streamed(rows, field, spec)
    head = [text for text, _ in zip(documents, range(32), strict=False)]
    if not head:
        raise CorpusError(f"{spec}: field {field!r} holds no text")
    fingerprint = [name, split, field, str(getattr(rows, "_fingerprint", "")), *head]
    return Corpus(re.sub(r"[^\w.-]+", "-", f"{name}-{split}"), documents, hash_documents(fingerprint))


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
    """Turns the OSErrors, ValueErrors and errors of its own that `datasets` raises into ours."""
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


# --- the Wikipedia sample ----------------------------------------------------------------------------


def _wiki_articles() -> list[str]:
    """Gives the cleaned articles, from the cache or made now."""
    folder = cache_dir() / "corpora"
    try:
        data = _cached_wiki(folder) or _make_wiki(folder)
    except FetchError:
        raise
    except OSError as error:
        raise FetchError(
            f"wiki-sample: cannot use the cache {folder} ({error.strerror or error}); "
            f"free some space, or set EDITLIB_CACHE to another folder"
        ) from error
    return [json.loads(line)["text"] for line in data.decode().split("\n") if line]


def _cached_wiki(folder: Path) -> bytes | None:
    """Reads the kept sample; its file carries its own hash in its name, so that a damaged one is seen."""
    for cached in sorted(folder.glob(f"wiki-sample.v{WIKI_CLEANING}.*.jsonl")):
        data = cached.read_bytes()
        if hashlib.sha256(data).hexdigest()[:16] == cached.suffixes[-2][1:]:
            return data
        logger.warning("%s is damaged; making it again", cached)
    return None


def _make_wiki(folder: Path) -> bytes:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".wiki-sample-") as scratch:
        wheel = download_package(
            WIKI_PACKAGE, WIKI_VERSION, WIKI_WHEEL,
            into=Path(scratch), pip_options=WIKI_PIP_OPTIONS, retry="load the corpus wiki-sample again",
        )  # fmt: skip
        articles = _clean_dump(_dump_in(wheel))
        lines = [json.dumps({"title": t, "text": text}, ensure_ascii=False) for t, text in articles]
        data = ("\n".join(lines) + "\n").encode()
        part = Path(scratch) / f"wiki-sample.v{WIKI_CLEANING}.{hashlib.sha256(data).hexdigest()[:16]}.jsonl"
        part.write_bytes(data)
        sync(part)
        os.replace(part, folder / part.name)
    return data


def _dump_in(wheel: Path) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return bz2.decompress(archive.read(WIKI_MEMBER))
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise FetchError(f"wiki-sample: {wheel.name} holds no readable {WIKI_MEMBER} ({error})") from error


def _clean_dump(xml: bytes) -> list[tuple[str, str]]:
    """Cleans a MediaWiki export to (title, prose) of its articles, in order; those without prose are left out."""
    articles = []
    title, namespace = "", ""
    for _, element in ElementTree.iterparse(io.BytesIO(xml)):
        tag = element.tag.rpartition("}")[2]
        if tag == "title":
            title = element.text or ""
        elif tag == "ns":
            namespace = element.text or ""
        elif tag == "text" and namespace == "0":
            paragraphs = clean_wiki(element.text or "")
            if paragraphs:
                articles.append((title, "\n".join(paragraphs)))
        elif tag == "page":
            element.clear()
    return articles
