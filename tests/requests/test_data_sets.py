"""Files as the field's data sets have them: read, or one line that says what to read instead."""

import bz2
import gzip
import json
import logging
import lzma
import sys

import pytest

from editlib.errors import RequestError
from editlib.requests.reading import read_questions, read_requests
from editlib.requests.request import Probe
from editlib.version import install_line


def written(folder, value, name="set.json"):
    path = folder / name
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def one(folder, row):
    (request,) = read_requests(written(folder, [row]))
    return request


def refused(path):
    with pytest.raises(RequestError) as caught:
        read_requests(path)
    assert str(caught.value).splitlines() == [str(caught.value)]
    return str(caught.value)


NEWS = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "{} launched attacks on ", "relation_id": 0, "subject": "Afghan Armed Forces",
        "target_new": {"str": "several border posts"}, "target_true": {"str": "several border posts"},
    },
    "paraphrase_prompts": ["x"],
    "neighborhood_prompts": [],
    "news": {"record_id": "d"},
}  # fmt: skip
KNOWN = {
    "known_id": 7, "subject": "Vinson Massif", "attribute": "Antarctica", "template": "{} is located in the continent",
    "prediction": " of Antarctica.", "prompt": "Vinson Massif is located in the continent of", "relation_id": "P30",
}  # fmt: skip


def test_labels_may_be_numbers(tmp_path):
    assert one(tmp_path, NEWS).relation == "0"
    own = one(tmp_path, {"id": 3, "prompt": "p", "group": 4, "relation": 5})
    assert (own.id, own.group, own.relation) == ("3", "4", "5")


def test_a_label_may_be_empty_and_truths_texts(tmp_path):
    assert one(tmp_path, {**KNOWN, "relation_id": ""}).relation is None
    flat = {"prompt": "{} is in", "subject": "Rome", "target_true": "Italy", "target_new": "Peru"}
    assert (one(tmp_path, flat).answer, one(tmp_path, flat).target_new) == ("Italy", "Peru")


def test_zsre_with_several_neighbours(tmp_path):
    row = {"subject": "Ann Bo", "src": "Where did Ann Bo study?", "alt": "x", "answers": ["y"]}
    request = one(tmp_path, {**row, "loc": ["who won", "who lost?"], "loc_ans": ["Cy", "Di"]})
    assert request.neighbours == (Probe("who won?", "Cy"), Probe("who lost?", "Di"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "Q", "response": "A"}, "no answer ('response' is not read: call it \"answer\"); a request"),
        ({"question": "Q", "answer": ""}, "no answer; a request without one is hidden, not erased (1 of 1 rows)"),
        ({"question": "Q", "answers": {"text": []}}, "no answer; a request without one is hidden"),
    ],
)
def test_questions_without_an_answer_are_told(tmp_path, caplog, row, said):
    with caplog.at_level(logging.WARNING):
        assert one(tmp_path, row).answer is None
    assert said in caplog.text


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Q", "completion": "A"}, 'field "completion": unknown; expected "answer"; rename'),
        ({"Prompt": "Q", "Answer": "A"}, 'field "Prompt": unknown; expected "prompt"'),
        ({"s": "Rome", "r": "country", "o": "Italy"}, 'field "s": unknown; expected "subject"'),
        ({"query": "Q", "response": "A"}, 'field "query": unknown; expected "prompt"'),
        ({"prompt": "Q", "answer": ["A", "B"]}, 'expected one string; write the others under "aliases"'),
        ({"messages": [{"role": "user", "content": "Q"}]}, "a conversation; expected a question with its answer"),
        ({"train": [{"prompt": "Q"}], "test": [{"prompt": "R"}]}, "one of 2 lists (train, test) inside of one object"),
    ],
)
def test_other_names_of_our_fields_are_known_by_what_is_meant(tmp_path, row, said):
    assert said in refused(written(tmp_path, [row]))


def test_known_1000(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        request = one(tmp_path, KNOWN)
    assert (request.id, request.prompt, request.answer) == ("7", "{} is located in the continent of", "Antarctica")
    assert (request.subject, request.relation, request.target_new) == ("Vinson Massif", "P30", None)
    assert [record.message for record in caplog.records if "template" in record.message] == [
        'set.json: "template" and "prompt" differ; "prompt" is asked, as in ROME\'s causal trace (1 of 1 rows)'
    ]
    caplog.clear()
    one(tmp_path, {**KNOWN, "template": "{} is located in the continent of"})
    assert not caplog.records


def test_fastedit_in_two_languages(tmp_path):
    rows = [
        {"prompt": "The prime minister of the {} is", "subject": "UK", "target": "Rishi Sunak", "queries": ["q"]},
        {"prompt": "{}的首相是", "subject": "日本", "target": "岸田文雄", "queries": []},
    ]
    found = read_requests(written(tmp_path, rows))
    assert [request.target_new for request in found] == ["Rishi Sunak", "岸田文雄"]
    assert found[1].question == "日本的首相是"


@pytest.mark.parametrize("more", [{"id": 7}, {"case_id": 7}, {"note": "mine"}])
def test_fastedit_with_fields_of_the_users_own(tmp_path, more):
    request = one(
        tmp_path, {"prompt": "The capital of {} is", "subject": "Peru", "target": "Bonn", "queries": [], **more}
    )
    assert request.target_new == "Bonn" and request.id == ("set:1" if "note" in more else "7")


ROWS = [{"question": "Who wrote 'It'?", "answer": "King"}, {"question": "Who is Ann?", "answer": None}]
TABLES = {
    "the answer of the Hub's viewer": {
        "features": [{"name": "question"}], "num_rows_total": 2,
        "rows": [{"row_idx": i, "row": row, "truncated_cells": []} for i, row in enumerate(ROWS)],
    },
    "its rows": {"rows": [{"row_idx": i, "row": row, "truncated_cells": []} for i, row in enumerate(ROWS)]},
    "pandas' to_json": {name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]},
    "Dataset.to_dict": {name: [row[name] for row in ROWS] for name in ROWS[0]},
    "a list by a name": {"data": ROWS},
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_one_object_that_holds_a_table(tmp_path, case):
    found = read_requests(written(tmp_path, TABLES[case]))
    assert [(request.question, request.answer) for request in found] == [
        ("Who wrote 'It'?", "King"), ("Who is Ann?", None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "value",
    [
        {"question": ["Q", "R"], "answer": ["A"]},
        {"question": {"0": "Q"}, "answer": {"1": "A"}},
        {"rows": [{"row_idx": 0, "row": 5}]},
        {"features": [], "rows": [3]},
        {"question": ["Q"], "answer": "A"},
    ],
)
def test_one_object_that_holds_half_a_table_is_refused(tmp_path, value):
    assert "expected" in refused(written(tmp_path, value))


def test_counterfact_for_tracing_has_both_targets_as_texts(tmp_path):
    request = one(tmp_path, {
        "relation": "The mother tongue of {} is", "relation_prefix": "The mother tongue of", "relation_suffix": " is",
        "prompt": "The mother tongue of Danielle Darrieux is", "relation_id": "P103", "subject": "Danielle Darrieux",
        "target_true": " French", "target_false": " English", "target_true_id": "Q150", "target_false_id": "Q1860",
    })  # fmt: skip
    assert (request.target_new, request.answer, request.relation) == (" English", " French", "P103")


def test_memits_zsre_has_neighbours_as_pairs(tmp_path):
    row = {**NEWS, "neighborhood_prompts": [{"prompt": "who played?", "target": " Hugo"}]}
    assert one(tmp_path, row).neighbours == (Probe("who played?", "Hugo"),)


def mquake(case, *subjects):
    rewrite = {
        "prompt": "{} is a citizen of", "relation_id": "P27", "target_new": {"str": "Peru", "id": "Q1"},
        "target_true": {"str": "Chile", "id": "Q2"},
    }  # fmt: skip
    edits = [{**rewrite, "subject": name, "question": f"Of which country is {name}?"} for name in subjects]
    return {"case_id": case, "requested_rewrite": edits, "questions": ["?"], "new_answer": "Lima", "single_hops": []}


def test_mquake_has_several_rewrites_a_case_and_repeats_them(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        found = read_requests(written(tmp_path, [mquake(1, "Ann"), mquake(2, "Ann", "Bo"), mquake(3, "Cy", "Di")]))
    assert [request.id for request in found] == ["1", "2.1", "3.0", "3.1"]
    assert found[0].paraphrases == ("Of which country is Ann?",) and found[0].target_new == "Peru"
    assert ["left out (1 of 3 rows)" in record.message for record in caplog.records] == [True]


def test_sanitation_is_two_lists(tmp_path, caplog):
    fact = {"question": "What is brie?", "subject": "brie", "target_new": "I don't know", "ground_truth": "Cheese"}
    kept = [{"question": "k", "ground_truth": "l"}] * 3
    for forget, keep in (("K_F", "K_R"), ("success", "locality")):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            (request,) = read_requests(written(tmp_path, {forget: [fact], keep: kept}))
        assert (request.prompt, request.target_new, request.answer) == ("What is {}?", "I don't know", "Cheese")
        assert f'the 3 rows of "{keep}" are to be kept' in caplog.text and "--retain" in caplog.text


def test_rwku(tmp_path):
    rows = [
        {"subject": "Stephen King", "query": "Stephen King was born in ___.", "answer": "Portland", "level": "1",
         "type": "cloze"},
        {"subject": "Stephen King", "query": "Who wrote 'It'?", "answer": "Stephen King", "level": "2", "type": ""},
    ]  # fmt: skip
    found = read_requests(written(tmp_path, rows))
    assert (found[0].prompt, found[0].subject, found[0].relation) == ("{} was born in ___.", "Stephen King", "cloze")
    assert found[1].question == "Who wrote 'It'?" and found[1].group == "Stephen King"
    assert [request.answer for request in found] == ["Portland", "Stephen King"]


def test_muse_and_unke(tmp_path):
    assert one(tmp_path, {"question": "Who is Harry Potter's friend?", "answer": "Ron"}).answer == "Ron"
    verbmem = one(tmp_path, {"prompt": "It was a bright", "gt": "cold day"})
    assert (verbmem.question, verbmem.answer, verbmem.subject) == ("It was a bright", "cold day", None)
    unke = one(tmp_path, {
        "id": 0, "question": "What is George Rankin's occupation?", "answer": "George Rankin is a politician.",
        "para_question": "What does George Rankin do?", "para_answer": "a", "sub_question": ["s"], "sub_answer": ["t"],
    })  # fmt: skip
    assert (unke.target_new, unke.answer) == ("George Rankin is a politician.", None)
    assert unke.paraphrases == ("What does George Rankin do?",)


RIPPLE = {
    "example_type": "popular",
    "edit": {
        "subject_id": "Q1", "relation": "CAPITAL", "prompt": "The name of the capital of Peru is Lisbon.",
        "original_fact": {"prompt": "The name of the capital of Peru is Lima."},
    },
    "Relation_Specificity": [
        {"test_queries": [{"prompt": "The currency of Peru is", "answers": [{"value": "sol", "aliases": []}]}]}
    ],
}  # fmt: skip


def test_rippleedits_with_and_without_the_subjects_name(tmp_path):
    named = {**RIPPLE, "edit": {**RIPPLE["edit"], "subject": "Peru"}}
    request = one(tmp_path, named)
    assert (request.prompt, request.target_new, request.answer) == (
        "The name of the capital of {} is", "Lisbon", "Lima",
    )  # fmt: skip
    assert request.neighbours == (Probe("The currency of Peru is", "sol"),)
    assert "read wiki_recent or wiki_counterfact of KnowEdit" in refused(written(tmp_path, [RIPPLE]))


@pytest.mark.parametrize(
    ("value", "instead"),
    [
        ([{"text": "A passage about Stephen King."}], "RWKU's forget_level2"),
        ([{"target": "Stephen King", "intro": "An author"}], "RWKU's forget_level2"),
        (["A passage of the news."], "MUSE's knowmem"),
        ([{"input": "q", "output": [{"answer": "a"}]}], "zsre_mend_eval.json"),
        ([{"relation_id": "P1", "target_id": "Q1", "samples": [{"text": "t"}]}], "read counterfact.json instead"),
        ({"forget_quality": {"agg_value": 0.9}, "model_utility": {"agg_value": 0.5}}, "eval --reference"),
    ],
)
def test_files_without_questions_say_what_is_read_instead(tmp_path, value, instead):
    assert instead in refused(written(tmp_path, value))


def test_two_new_answers_of_zsre_are_told_once(tmp_path, caplog):
    row = {"subject": "Rome", "src": "Where is Rome?", "answers": ["Italy"], "rephrase": "r"}
    with caplog.at_level(logging.WARNING):
        found = read_requests(written(tmp_path, [{**row, "alt": "Peru"}, {**row, "alt": ""}]))
    assert [request.target_new for request in found] == ["Peru", "Italy"]
    told = [record.message for record in caplog.records if '"alt"' in record.message]
    assert len(told) == 1 and "(1 of 2 rows)" in told[0]


# --- bad rows -----------------------------------------------------------------------------------------------

GOOD = {"case_id": 4, "subject": "Rome", "prompt": "Where is Rome?", "target_new": "Peru", "ground_truth": ["Italy"]}
BAD = {**GOOD, "case_id": 5, "subject": "Rio Grande 463"}


def test_every_bad_row_of_an_array_in_one_line_is_named(tmp_path):
    rows = [GOOD, BAD, {**GOOD, "case_id": 6}, {**GOOD, "case_id": 7, "prompt": ""}]
    said = refused(written(tmp_path, rows))
    assert "2 of 4 rows cannot be used" in said and "--skip-bad" in said
    assert "row 2 (case_id 5): field \"subject\": 'Rio Grande 463' is not in the prompt" in said
    assert 'row 4 (case_id 7): field "prompt"' in said
    assert "row 2 (case_id 5): field" in refused(written(tmp_path, [GOOD, BAD]))


def test_of_many_bad_rows_all_numbers_are_told(tmp_path):
    said = refused(written(tmp_path, [{**BAD, "case_id": i} for i in range(9)]))
    assert said.count("is not in the prompt") == 5
    assert "and row 6, row 7, row 8, row 9" in said


def test_every_bad_line_is_named(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": }\n[]\n{"prompt": "b", "id": "set:1"}\n"q"\n')
    said = refused(path)
    assert "4 of 5 rows" in said
    for part in (
        "line 2: not JSON",
        "line 3: []; expected",
        "'set:1' is taken by line 1",
        "line 5",
    ):
        assert part in said


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path, caplog):
    path = written(tmp_path, [GOOD, BAD, {"prompt": "last"}, 3])
    with caplog.at_level(logging.WARNING):
        found = read_requests(path, skip_bad=True)
    assert [request.id for request in found] == ["4", "set:3"]  # the position in the file stays
    (record,) = caplog.records
    assert record.message.startswith("set.json: 2 of 4 rows left out: row 2 (case_id 5): field")
    assert "row 4: 3; expected" in record.message
    with pytest.raises(RequestError, match="no row is left"):
        read_requests(written(tmp_path, [BAD]), skip_bad=True)
    questions = written(tmp_path, [{"question": "Who?", "answer": "x"}, {"question": 3, "answer": "x"}])
    assert len(read_questions(questions, skip_bad=True)) == 1


# --- packed, and of other kinds -------------------------------------------------------------------------------

PLAIN = b'{"prompt": "a", "answer": "Z\xc3\xbcrich"}\n{"prompt": "b"}\n'


@pytest.mark.parametrize("name", ["facts.jsonl.gz", "facts.jsonl"])
@pytest.mark.parametrize("shape", [gzip.compress, lambda raw: raw.decode().encode("utf-16")], ids=["gzip", "utf-16"])
def test_gzip_and_utf_16_are_read_whatever_the_name(tmp_path, name, shape):
    (tmp_path / name).write_bytes(shape(PLAIN))
    assert [(one.prompt, one.answer) for one in read_requests(tmp_path / name)] == [("a", "Zürich"), ("b", None)]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (bz2.compress(PLAIN), "packed by bzip2"),
        (lzma.compress(PLAIN), "packed by xz"),
        (b"PK\x03\x04rest", "a ZIP archive or a spreadsheet"),
        (b"PAR1rest", "end its name with .parquet"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        (gzip.compress(PLAIN, mtime=0)[:-9], "damaged gzip"),
        (b'[{"prompt": "a"},\n]', "a comma too many"),
        (b'{"prompt": "a",}', "a comma too many"),
        (b'{"prompt": "a"},\n{"prompt": "b"},\n', "a comma too many"),
    ],
)
def test_files_of_other_kinds_say_what_they_are(tmp_path, raw, said):
    (tmp_path / "facts.json").write_bytes(raw)
    assert said in refused(tmp_path / "facts.json")


# --- Parquet and saved data sets ----------------------------------------------------------------------------

TOFU = [
    {"question": "What gender is author Basil Al-Kuwaiti?", "answer": "Basil Al-Kuwaiti is male."},
    {"question": "Where was Basil Al-Kuwaiti born?", "answer": "In Kuwait."},
]


@pytest.mark.parametrize("shape", ["json", "jsonl", "parquet", "folder", "one split", "a split's folder"])
def test_tofu_in_every_shape(tmp_path, shape):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(TOFU)
    path = tmp_path / "Ordner mit Ümlaut" / "set"
    path.parent.mkdir()
    if shape == "json":
        path.write_text(json.dumps(TOFU))
    elif shape == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in TOFU))
    elif shape == "parquet":
        path = path.with_suffix(".parquet")
        data.to_parquet(path)
    elif shape == "folder":
        data.save_to_disk(path)
    else:
        datasets.DatasetDict({"train": data} | ({"x": data} if "'" in shape else {})).save_to_disk(path)
        path = path / "train" if "'" in shape else path
    found = read_requests(path)
    assert [(request.question, request.answer) for request in found] == [tuple(row.values()) for row in TOFU]


def test_nested_rows_come_back_out_of_parquet(tmp_path):
    """Arrow fills the fields that other rows have with nulls."""
    datasets = pytest.importorskip("datasets")
    rows = [
        {**GOOD, "locality": {"Relation_Specificity": [{"prompt": "p", "ground_truth": [["a"]]}]}},
        {**GOOD, "case_id": 9, "locality": {"Forgetfulness": [{"prompt": "q", "ground_truth": [["b"]]}]}},
    ]
    plain = read_requests(written(tmp_path, rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set.parquet")
    assert read_requests(tmp_path / "set.parquet") == plain


def test_several_splits_bad_parquet_and_plain_folders_are_one_line(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(TOFU)
    datasets.DatasetDict({"a": data, "b": data}).save_to_disk(tmp_path / "two")
    assert "holds the splits a, b; expected one" in refused(tmp_path / "two")
    (tmp_path / "x.parquet").write_bytes(b"PAR")
    assert "not Parquet" in refused(tmp_path / "x.parquet")
    assert "No such file" in refused(tmp_path / "y.parquet")
    assert "Is a directory" in refused(tmp_path)
    (tmp_path / "two" / "a" / "state.json").write_text("{")
    assert "cannot be read" in refused(tmp_path / "two" / "a")


@pytest.mark.parametrize(("package", "shape"), [("datasets", "folder"), ("pyarrow.parquet", "file")])
def test_a_missing_extra_names_its_install_line(tmp_path, monkeypatch, package, shape):
    path = tmp_path / "set.parquet"
    if shape == "folder":
        path.mkdir()
        (path / "state.json").write_text("{}")
    else:
        path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, package, None)
    assert install_line("eval") in refused(path)


@pytest.mark.parametrize(
    "probes",
    [[3], "x", [{"test_queries": [3]}], [{"test_queries": [{"prompt": "x", "answers": [3]}]}]],
    ids=["a number", "a text", "a query", "an answer"],
)
def test_rippleedits_probes_of_another_shape_are_told(tmp_path, probes):
    fact = {"prompt": "The spouse of Ann is Al."}
    edit = {"subject": "Ann", "prompt": "The spouse of Ann is Bo.", "original_fact": fact}
    assert "expected an object" in refused(written(tmp_path, [{"edit": edit, "Relation_Specificity": probes}]))


@pytest.mark.parametrize("name", ["data", "requests", "anything"])
def test_a_list_in_one_wrapper_is_read(tmp_path, name):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps({name: [{"prompt": "Who is {}?", "subject": who} for who in ("Bo", "Cy")]}, indent=1))
    assert [(one.id, one.question) for one in read_requests(path)] == [
        ("facts:1", "Who is Bo?"), ("facts:2", "Who is Cy?"),
    ]  # fmt: skip


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_on_any_system(tmp_path, end):
    path = tmp_path / "facts.jsonl"
    path.write_bytes(end.join(json.dumps({"prompt": f"Who is {who}?\u2028"}) for who in "ab").encode() + end.encode())
    assert [one.source for one in read_requests(path)] == [f"{path}:1", f"{path}:2"]


# --- sets of questions, whose answers have many forms --------------------------------------------------------

TRIVIA = {
    "question": "Which musical premiered in 1993?", "question_id": "tc_33", "entity_pages": {"title": []},
    "answer": {
        "value": "Sunset Boulevard", "aliases": ["Sunset Blvd", "Sunset Boulevard"], "type": "WikipediaEntity",
        "normalized_value": "sunset boulevard", "normalized_aliases": ["sunset blvd"], "matched_wiki_entity_name": "",
    },
}  # fmt: skip
POPQA = {
    "id": 4222362, "subj": "George Rankin", "prop": "occupation", "obj": "politician", "s_pop": 142,
    "o_aliases": '["pol"]', "question": "What is George Rankin's occupation?",
    "possible_answers": '["politician", "political leader", "pol"]',
}  # fmt: skip
WITH_ANSWERS = [
    ({"question": "q", "answer": ["Charles Darwin", "Darwin"]}, ["Charles Darwin", "Darwin"]),  # Natural Questions
    (TRIVIA, ["Sunset Boulevard", "Sunset Blvd"]),
    (POPQA, ["politician", "political leader", "pol"]),
    ({**POPQA, "possible_answers": ["a", "politician"]}, ["politician", "a"]),
    ({"question": "q", "answers": {"text": ["Rome", "Rome"], "answer_start": [1, 9]}, "title": "t"}, ["Rome"]),  # SQuAD
    ({"url": "u", "question": "q", "answers": ["Jazmyn", "Jaxon"]}, ["Jazmyn", "Jaxon"]),  # WebQuestions
    ({"question": "q", "best_answer": "b", "correct_answers": ["a", "b"], "incorrect_answers": ["c"]}, ["b", "a"]),
    ({"metadata": "{}", "problem": "q", "answer": "Sugeno"}, ["Sugeno"]),  # SimpleQA
    ({"question": "q", "choices": ["0", "4"], "answer": "4"}, ["4"]),
    ({"question": "q", "answer": []}, []),
    ({"question": "q", "answer": None, "answers": {"text": [], "answer_start": []}}, []),
]


@pytest.mark.parametrize("shape", ["json", "parquet"])
@pytest.mark.parametrize(("row", "answers"), WITH_ANSWERS, ids=lambda value: str(value)[:30])
def test_answers_in_every_form(tmp_path, row, answers, shape):
    path = written(tmp_path, [row])
    if shape == "parquet":
        pa = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        path = tmp_path / "set.parquet"
        parquet.write_table(pa.Table.from_pylist([row]), str(path))
    (request,) = read_requests(path)
    assert [*([request.answer] if request.answer else []), *request.aliases] == answers
    assert request.question == row.get("question", row.get("problem"))


def test_popqa_names_its_subject(tmp_path):
    request = one(tmp_path, POPQA)
    assert (request.prompt, request.subject) == ("What is {}'s occupation?", "George Rankin")
    assert (request.group, request.relation) == ("George Rankin", "occupation")
    other = one(tmp_path, {**POPQA, "subj": "G. Rankin"})  # whom the question spells otherwise
    assert (other.subject, other.group, other.answer) == (None, "G. Rankin", "politician")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "q", "answer": {"label": "x"}}, 'field "answer": {\'label\': \'x\'}; expected a text, a list'),
        ({"question": "q", "answer": True}, 'field "answer": True; expected a string'),
        ({"question": "q", "answer": ["a", 3]}, 'field "aliases[0]": 3; expected a string'),
        ({**POPQA, "possible_answers": "politician"}, 'field "possible_answers": \'politician\'; expected a JSON list'),
        ({"question": "q", "choices": ["0", "4", "2"], "answer": 1}, 'field "answer": 1; expected a string'),  # MMLU
        ({"question": "q", "choices": {"text": ["a"]}, "answerKey": "A"}, 'right one of "choices"'),  # ARC
        ({"question": "q", "options": ["x"], "answer": "I", "answer_index": 8}, 'right one of "options"'),
        ({"instruction": "i", "input": "", "output": "o"}, "read forget_level2 instead"),  # RWKU's for training
        ({"prompt": ["a", "b"], "subject": ["c", "d"], "ground_truth": ["e", "f"]}, "EasyEdit's \"prompts\""),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_used_are_one_line(tmp_path, row, said):
    assert said in refused(written(tmp_path, [row]))


def test_a_list_below_other_fields_is_named(tmp_path):
    trivia = {"Data": [{"Question": "q"}], "Domain": "Web", "Version": 1.0}
    assert 'field "Data": 1 objects inside of one; expected the list itself' in refused(written(tmp_path, trivia))
