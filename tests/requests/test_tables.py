"""Requests as spreadsheets and scripts write them: CSV and TSV; and JSON that has a key twice."""

import gzip
import json

import pytest

from editlib import read_requests
from editlib.comparison.config import read_config
from editlib.errors import ConfigError, HparamsError, RequestError
from editlib.requests.reading import read_subjects
from editlib.settings import read_settings

FACT = {"prompt": "What is the capital of {}?", "subject": "France", "answer": "Paris"}
SECOND = {"prompt": "Who, say, is {}?", "subject": "Ann", "answer": 'A "B"'}


@pytest.fixture
def read(tmp_path):
    """`read(text, name)` -> the requests of a file of this text, as dicts without their ids."""

    def run(text, name="facts.csv", **options):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        found = [request.to_dict() for request in read_requests(path, **options)]
        return [{key: value for key, value in one.items() if key != "id"} for one in found]

    return run


def written(separator, end):
    quoted = [["prompt", "subject", "answer"], FACT.values(), SECOND.values()]
    cells = [separator.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in quoted]
    return end.join(cells) + end


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|", ", "])
def test_separators_and_line_ends(read, separator, end):
    assert read(written(separator, end)) == [FACT, SECOND]


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
def test_marks_of_encodings(read, coding):
    assert read(written(";", "\r\n").encode(coding)) == [FACT, SECOND]
    assert read(gzip.compress(written("\t", "\n").encode(coding)), "facts.tsv.gz") == [FACT, SECOND]


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("Question,Answer\nWhat is it?,Paris\n", {"prompt": "What is it?", "answer": "Paris"}),
        ("sep=;\nprompt;answer\nWhat?;It, or so\n", {"prompt": "What?", "answer": "It, or so"}),
        (",prompt,answer,Unnamed: 3\n0,What?,It,\n\n,,,\n", {"prompt": "What?", "answer": "It"}),
        ('prompt,answer\n"Read:\r\n[a; b]",It\n', {"prompt": "Read:\n[a; b]", "answer": "It"}),
        ("prompt,answer,note\n[1],{2},later\n", {"prompt": "[1]", "answer": "{2}"}),
        ("prompt, answer\nWhat?,\n", {"prompt": "What?"}),
        ("prompt,subject,target\nAnn is,Ann,Bob\n", {"prompt": "{} is", "subject": "Ann", "target_new": "Bob"}),
        (
            "question,subject,answer,target_new,paraphrases\n"
            'Where is Rome?,Rome,Italy,Spain,"[""Rome?"", ""And it?""]"\n',
            {"prompt": "Where is {}?", "subject": "Rome", "answer": "Italy", "target_new": "Spain",
             "paraphrases": ["Rome?", "And it?"]},
        ),
        ("prompt,answer,aliases\nWhat?,It,That\n", {"prompt": "What?", "answer": "It", "aliases": ["That"]}),
        ("query,answer,level\nWhat?,It,1\n", {"prompt": "What?", "answer": "It"}),
        (json.dumps([{"prompt": "What?"}]), {"prompt": "What?"}),
    ],
)  # fmt: skip
def test_columns_as_people_have_them(read, text, request_):
    assert read(text) == [request_]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "What is it?,Paris\nWho?,Ann\n",
            "facts.csv:1: columns 'What is it?, Paris'; expected a first line",
        ),
        ("prompt,answer\nWhat, say, is it?,Paris\n", "facts.csv:2: 4 cells for 2 columns"),
        ('prompt,answer\n"a\nb",c\nWhat\n', "facts.csv:4: 1 cells for 2 columns"),
        ('prompt,answer\nWho?,Ann\n"What,Paris\n', "facts.csv:3: not a table"),
        ('prompt,answer\n"It" is,Paris\n', "facts.csv:2: not a table"),
        ("prompt,answer,Answer\na,b,c\n", "facts.csv:1: column 'answer' is there twice"),
        ("prompt,answer,category\na,b,c\nd,e,f\n", "facts.csv:1: column 'category': unknown"),
        (
            'prompt,neighbours\na,"[{""x"": ""b"", ""x"": ""c""}]"\n',
            "facts.csv:2: key 'x' is there twice",
        ),
        ("", "holds no request"),
        ("prompt,answer\n", "holds no request"),
    ],
)
def test_bad_tables_are_one_line(read, text, told):
    with pytest.raises(RequestError) as error:
        read(text)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_bad_rows_of_a_table_may_be_left_out(read):
    assert read("prompt,answer\na,b,c\nWhat?,It\n", skip_bad=True) == [{"prompt": "What?", "answer": "It"}]


def test_a_table_under_another_name_says_which(read):
    with pytest.raises(RequestError, match=r"a table called .csv or .tsv"):
        read("prompt,answer\nWhat?,It\n", "facts.txt")


DOUBLED = '{"prompt": "Who?", "answer": "Ann", "answer": "Bob"}'
NESTED = '{"prompt": "Who?", "neighbours": [{"prompt": "a"}, {"answer": "b", "answer": "c"}]}'


@pytest.mark.parametrize("row", [DOUBLED, NESTED])
@pytest.mark.parametrize(
    ("form", "where"),
    [
        ('{{"prompt": "What?"}}\n{}\n', "facts.json:2: "),
        ('[{{"prompt": "What?"}},\n\n{}]', "facts.json: row 2: "),
        ('{{"data": [{{"prompt": "What?"}}, {}]}}', "facts.json: row 2: "),
        ("\n{}", "facts.json:2: "),
    ],
)
def test_a_key_twice_is_refused_by_row_and_name(read, form, row, where):
    with pytest.raises(RequestError) as error:
        read(form.format(row), "facts.json")
    assert f"{where}key 'answer' is there twice in one object" in str(error.value)
    assert "\n" not in str(error.value)
    if "What?" in form:
        assert read(form.format(row), "facts.json", skip_bad=True) == [{"prompt": "What?"}]


@pytest.mark.parametrize(
    ("reads", "error", "name", "text"),
    [
        (read_settings, HparamsError, "a.json", '{"layers": [1], "lr": 1, "lr": 2}'),
        (read_settings, HparamsError, "a.yaml", "layers: [1]\nlr: 1\nlr: 2\n"),
        (read_config, ConfigError, "a.json", '{"model": "m", "lr": 1, "lr": 2}'),
        (read_subjects, RequestError, "a.json", '{"lr": "a", "lr": "b"}'),
    ],
)
def test_other_files_of_the_users_have_each_key_once_too(tmp_path, reads, error, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(error, match="'lr' is there twice"):
        reads(tmp_path / name)
