"""Open text for layer statistics and perplexity: a file, a streamed data set, or a small Wikipedia sample."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from editlib.errors import CorpusError
from editlib.stats.streamed import dataset_parts, open_dataset
from editlib.stats.text_files import file_documents
from editlib.stats.wiki_sample import wiki_articles

SAMPLES = ("wiki-sample", "wiki-sample:heldout")
HELD_OUT_EVERY = 8  # every eighth article of the sample is for perplexity, the others for statistics


@dataclass(frozen=True)
class Corpus:
    """Holds documents, with a name for the statistics folder and a hash that identifies the text.

    `documents` may be iterated more than once; its length is known unless the text is streamed. `sha256` covers all
    documents or, for streamed text, the dataset's fingerprint and first documents.
    """

    name: str
    documents: Iterable[str]
    sha256: str


def load_corpus(spec: str, *, text_field: str | None = None) -> Corpus:
    """Opens a corpus.

    Args:
        spec: a .txt file (documents are separated by blank lines); rows with a text field (.jsonl, .json, .csv, .tsv,
            .parquet, a folder by `save_to_disk`); `hf:NAME[/CONFIG][:SPLIT]` (split `train` unless named);
            `wiki-sample`, about 90 English Wikipedia articles for statistics; `wiki-sample:heldout`, every 8th article
            of that sample, held out for perplexity. The text of the sample is under CC BY-SA, by Wikipedia's
            contributors.
        text_field: the field with the text (rows and hf: only); `text`, or the only string field.

    Raises:
        CorpusError: no such file, split or field, a line that cannot be read, or no text at all.
        FetchError: the sample or the dataset is not on disk and cannot be downloaded.
    """
    if spec in SAMPLES:
        if text_field is not None:
            raise CorpusError(f"{spec}: text_field={text_field!r} is for .jsonl files and hf: datasets")
        held_out = spec.endswith(":heldout")
        last = HELD_OUT_EVERY - 1
        documents = [a for i, a in enumerate(wiki_articles()) if (i % HELD_OUT_EVERY == last) == held_out]
        return Corpus(spec.replace(":", "-"), documents, hash_documents(documents))
    if spec.startswith("hf:"):
        name, streamed, fingerprint = open_dataset(spec, text_field)
        return Corpus(re.sub(r"[^\w.-]+", "-", name), streamed, hash_documents(fingerprint))
    documents = file_documents(Path(spec), text_field)
    name = re.sub(r"[^\w.-]+", "-", Path(spec).stem).strip("-.") or "corpus"
    return Corpus(name, documents, hash_documents(documents))


def check_corpus(spec: str) -> None:
    """Checks a corpus as far as possible without the network; call it before a model is loaded.

    Raises:
        CorpusError: no such file, or one without usable text.
    """
    if spec.startswith("hf:"):
        dataset_parts(spec)
    elif spec not in ("self", *SAMPLES):
        load_corpus(spec)


def hash_documents(documents: Iterable[str]) -> str:
    """Hashes the documents in order (SHA-256, hex), including the boundaries between them."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
