"""Requests: what may be asked, every file format, and a message for every way to get it wrong."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editlib.errors import OutputError, RequestError
from editlib.requests.reading import read_requests, requests_hash, write_requests
from editlib.requests.request import EditRequest, Probe

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def written(tmp_path: Path, *rows: object, name: str = "facts.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def complaint(path: Path) -> str:
    with pytest.raises(RequestError) as caught:
        read_requests(path)
    message = str(caught.value)
    assert message.splitlines() == [message]
    return message


# --- the request itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "subject", "template", "question"),
    [
        ("The capital of {} is", "France", "The capital of {} is", "The capital of France is"),
        ("The capital of France is", "France", "The capital of {} is", "The capital of France is"),
        (
            "What is {x} {0} in {}? {{ }}",
            "C++",
            "What is {x} {0} in {}? {{ }}",
            "What is {x} {0} in C++? {{ }}",
        ),
        ("Which part of art is best?", "art", "Which part of {} is best?", "Which part of art is best?"),
        ("北京在哪里", "北京", "{}在哪里", "北京在哪里"),
        ("Who wrote Émile?", "Émile", "Who wrote {}?", "Who wrote Émile?"),
        ("What does {x} mean?", None, "What does {x} mean?", "What does {x} mean?"),
    ],
)
def test_subject_is_put_into_the_prompt(prompt, subject, template, question):
    request = EditRequest("a", prompt, subject, paraphrases=[prompt, "Plain text"])
    assert request.prompt == template
    assert request.question == question
    assert request.filled_paraphrases == (question, "Plain text")


def test_lists_and_dicts_become_tuples_and_probes():
    request = EditRequest("a", "p", aliases=["x"], neighbours=[{"prompt": "q", "answer": "r"}, "s", Probe("t")])
    assert request.aliases == ("x",)
    assert request.neighbours == (Probe("q", "r"), Probe("s"), Probe("t"))
    assert request in {request}


def test_dict_has_no_empty_fields_and_no_source():
    request = EditRequest("a", "{} is", "B", neighbours=(Probe("q"),), source="x:1")
    assert request.to_dict() == {
        "id": "a",
        "prompt": "{} is",
        "subject": "B",
        "neighbours": [{"prompt": "q"}],
    }
    assert request == EditRequest("a", "{} is", "B", neighbours=(Probe("q"),), source="y:2")


def test_a_request_made_in_python_is_checked_and_named():
    with pytest.raises(RequestError, match="request 'a': field \"subject\": 'B' is not in the prompt 'q'"):
        EditRequest("a", "q", "B")


# --- bad lines and files ------------------------------------------------------------------------------------

GOOD = {"id": "a", "prompt": "The capital of {} is", "subject": "France"}

BAD_ROWS = [
    ({"prompt": None}, "prompt", "missing; expected a string"),
    ({"prompt": ""}, "prompt", "'' is empty"),
    ({"prompt": " \n"}, "prompt", "' \\n' is empty"),
    ({"prompt": 3}, "prompt", "3; expected a string"),
    ({"prompt": ["p"]}, "prompt", "['p']; expected a string"),
    ({"prompt": "{} and {}"}, "prompt", '2 "{}"'),
    ({"prompt": "The capital is"}, "subject", "'France' is not in the prompt 'The capital is'"),
    ({"prompt": "France or France?"}, "subject", "write, say, '{} or France?'"),
    ({"prompt": "{subject} or {subject}?"}, "prompt", '2 "{subject}"'),
    ({"question": "Where is France?"}, "question", "unknown; expected"),
    ({"subject": None}, "subject", 'missing, but prompt has "{}"'),
    ({"subject": ""}, "subject", "'' is empty"),
    ({"subject": " France"}, "subject", "blanks at its ends"),
    ({"subject": "a{}b"}, "subject", 'without "{}"'),
    ({"subject": ["France"]}, "subject", "['France']; expected a string"),
    ({"answer": ""}, "answer", "'' is empty"),
    ({"answer": 1969}, "answer", "1969; expected a string; write the text in quotes"),
    ({"answer": True}, "answer", "True; expected a string"),
    ({"target_new": " "}, "target_new", "' ' is empty"),
    ({"target_new": ["Rome"]}, "target_new", "expected a string"),
    ({"answer": "\ud800"}, "answer", "half a surrogate pair"),
    ({"aliases": "Paname"}, "aliases", "'Paname'; expected a list"),
    ({"aliases": ["Paname", 75]}, "aliases[1]", "75; expected a string"),
    ({"aliases": [None]}, "aliases[0]", "expected a string"),
    ({"paraphrases": {"a": "b"}}, "paraphrases", "expected a list"),
    ({"paraphrases": ["ok", ""]}, "paraphrases[1]", "'' is empty"),
    ({"paraphrases": ["{}, {}"]}, "paraphrases[0]", '2 "{}"'),
    ({"prompt": "plain", "subject": None, "paraphrases": ["of {}"]}, "subject", 'paraphrases[0] has "{}"'),
    ({"neighbours": "x"}, "neighbours", "expected a list"),
    ({"neighbours": [3]}, "neighbours[0]", '3; expected {"prompt": ..., "answer": ...}'),
    ({"neighbours": [{"answer": "x"}]}, "neighbours[0].prompt", "missing"),
    ({"neighbours": ["p", {"prompt": "p", "answer": ""}]}, "neighbours[1].answer", "'' is empty"),
    ({"neighbours": [{"promt": "p"}]}, "neighbours[0].promt", "unknown"),
    ({"group": True}, "group", "expected a string"),
    ({"relation": []}, "relation", "expected a string"),
    ({"id": ""}, "id", "'' is empty"),
    ({"id": True}, "id", "True; expected a string"),
    ({"id": "first"}, "id", "'first' is taken by line 1"),
    ({"subjct": "France"}, "subjct", 'unknown; expected "subject"'),
    ({"neighbors": []}, "neighbors", 'unknown; expected "neighbours"'),
    ({"target": "Rome"}, "target", 'unknown; expected "target_new"'),
    ({"zzz": 1}, "zzz", 'unknown; expected "id", "prompt"'),
    ({"a\nb": 1}, "a\\nb", "unknown"),
]


@pytest.mark.parametrize(("change", "field", "said"), BAD_ROWS)
def test_bad_field_is_named_with_file_and_line(tmp_path, change, field, said):
    path = written(tmp_path, {"id": "first", "prompt": "fine"}, {**GOOD, **change})
    message = complaint(path)
    assert message.startswith(f'{path}:2: field "{field}": ')
    assert said in message
    assert "; expected " in message


SPELLINGS = [  # subject, prompt, the subject in the prompt
    ("Zu\u0308rich", "Where is Zürich?", "Zürich"),
    ("Zürich", "Where is Zu\u0308rich?", "Zu\u0308rich"),
    ("Côte d\u2019Ivoire", "What is the capital of Côte d'Ivoire?", "Côte d'Ivoire"),
    ("Co\u0302te d'Ivoire", "Côte d\u2019Ivoire lies where?", "Côte d\u2019Ivoire"),
    ("Hawai'i", "Who ruled Hawai\u02bbi?", "Hawai\u02bbi"),
    ("서울", "\u1109\u1165\u110b\u116e\u11af은 어디에 있습니까?", "\u1109\u1165\u110b\u116e\u11af"),
    ("Zu\u0308rich", "Where is {}?", "Zu\u0308rich"),  # a place says all
]


@pytest.mark.parametrize(("subject", "prompt", "wanted"), SPELLINGS)
def test_accents_and_apostrophes_of_a_subject_are_those_of_its_prompt(subject, prompt, wanted):
    made = EditRequest("a", prompt, subject)
    assert made.subject == wanted and made.question == prompt.replace("{}", wanted)
    assert made.question[made.subject_start :].startswith(wanted)


@pytest.mark.parametrize(("subject", "prompt"), [("Zurich", "Where is Zürich?"), ("FRANCE", "Where is France?")])
def test_another_letter_is_another_subject(subject, prompt):
    with pytest.raises(RequestError, match="is not in the prompt"):
        EditRequest("a", prompt, subject)


BAD_FOREIGN = [
    ({"src": "Who?", "subject": "X", "answers": ["a"], "alt": "b"}, "subject", "'X' is not in the prompt"),
    ({"src": 3, "answers": ["a"]}, "src", "3; expected a string"),
    ({"src": "q", "answers": [3]}, "answers", "3; expected a string"),
    ({"src": "q", "answers": ["a"], "rephrase": 3}, "rephrase[0]", "3; expected a string"),
    ({"src": "q", "answers": ["a"], "loc": 3}, "loc[0].prompt", "3; expected a string"),
    ({"requested_rewrite": [1]}, "requested_rewrite", "[1]; expected one object"),
    ({"requested_rewrite": {"prompt": "{}"}}, "subject", 'prompt has "{}"'),
    (
        {"requested_rewrite": {"prompt": "p", "target_true": {"str": 1}}},
        "target_true",
        "1; expected a string",
    ),
    ({"prompt": "p", "ground_truth": 3}, "ground_truth", "3; expected a string"),
    ({"prompt": "p", "ground_truth": "x", "locality": "y"}, "locality", "'y'; expected"),
    ({"prompts": ["p", "q"], "target_new": ["x"]}, "target_new", "1 values for 2 prompts"),
    ({"question": ["q"], "answer": "a"}, "question", "['q']; expected a string"),
    ({"question": "q", "answer": 2, "choices": ["a", "b"]}, "answer", "2; expected a string"),
    ({"prompt": "p", "target": 3}, "target", "3; expected a string"),
]


@pytest.mark.parametrize(("row", "field", "said"), BAD_FOREIGN)
def test_bad_field_of_a_data_set_goes_by_its_name_there(tmp_path, row, field, said):
    path = written(tmp_path, {"prompt": "fine"}, row)
    message = complaint(path)
    assert message.startswith(f'{path}:2: field "{field}": ')
    assert said in message


BAD_FILES = [
    (b"", "", "holds no request"),
    (b" \n\n", "", "holds no request"),
    (b"[]", "", "holds no request"),
    (b'{"prompt": "a"}\n\n{"prompt": }\n', ":3", "not JSON at column 12"),
    (b'{"prompt": "a"\n', ":1", "not JSON at column"),
    (b'{"prompt": "a"} {"prompt": "b"}', ":1", "not JSON at column 17 (Extra data)"),
    (b'[{"prompt": "a"},\n {"prompt": "b"}\n {"prompt": "c"}]', ":3", "not JSON at column 2"),
    (b'[{"prompt": "a"},\n {"prompt": "b"}', ":2", "not JSON at column"),
    (b'{"prompt": "a"}\n["b"]', ":2", "['b']; expected a JSON object"),
    (b'{"prompt": "a"}\n"What?"', ":2", "'What?'; expected a JSON object"),
    (b'[\n{"prompt": "a"},\n\n3]', ": row 2", "3; expected a JSON object"),
    (b"7", ":1", "7; expected a JSON object"),
    (b"prompt,answer\n", ":1", "not JSON at column 1"),
    (b'{"prompt": "a"}\n{"prompt": "\xe9"}', ":2", "not UTF-8"),
    ('{"prompt": "a"}'.encode("utf-16")[:-1], ":1", "not UTF-8"),
    ('{"prompt": "a"}'.encode("utf-16-le"), ":1", "not JSON"),
    (b'{"prompt": ' + b"1" * 5000 + b"}", ":1", "not usable as JSON"),
    (b'{"prompt": "a"}\n' + b"[" * 100_000, ":2", "JSON"),
    (b"[" * 100_000, ":1", "JSON"),
    (b"prompt,answer\nWho?,me\n", ":1", "and nor is any other of its 2 lines; expected JSON Lines"),
    (b"- prompt: Who?\n  answer: me\n", ":1", "convert the file"),
    (b'{\n "prompt": "a"\n}\n{\n "prompt": "b"\n}\n', ":1", "one object per line"),
    (b'{"data": [{"prompt": "a"}, {"prompt": 7}]}', ": row 2", "7; expected a string"),
]


@pytest.mark.parametrize(("content", "line", "said"), BAD_FILES)
def test_unusable_file_is_named_with_its_line(tmp_path, content, line, said):
    path = tmp_path / "facts.jsonl"
    path.write_bytes(content)
    message = complaint(path)
    assert message.startswith(f"{path}{line}: ")
    assert said in message
    assert "; expected " in message


def test_missing_file_and_directory(tmp_path):
    assert complaint(tmp_path).startswith(f"{tmp_path}: Is a directory; expected a JSONL, JSON, CSV or TSV file")
    assert "No such file" in complaint(tmp_path / "none.jsonl")
    assert "null byte" in complaint(tmp_path / "a\0b")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(tmp_path):
    path = written(tmp_path, GOOD)
    path.chmod(0)
    assert "Permission denied" in complaint(path)


# --- formats ------------------------------------------------------------------------------------------------

FORMATS = {
    "own": (
        {
            "id": 7,
            "prompt": "{} is in",
            "subject": "Rome",
            "answer": "Italy",
            "group": "rome",
            "note": ["free"],
        },
        [EditRequest("7", "{} is in", "Rome", answer="Italy", group="rome")],
    ),
    "plain prompt": ({"prompt": "Why is the sky blue?"}, [EditRequest("facts:1", "Why is the sky blue?")]),
    "nulls": ({"prompt": "Why?", "answer": None, "paraphrases": None}, [EditRequest("facts:1", "Why?")]),
    "counterfact": (
        {
            "case_id": 0,
            "requested_rewrite": {
                "prompt": "The mother tongue of {} is",
                "relation_id": "P103",
                "target_new": {"str": "English", "id": "Q1860"},
                "target_true": {"str": "French", "id": "Q150"},
                "subject": "Danielle Darrieux",
            },
            "paraphrase_prompts": ["Shayna does this and Yossel that. Danielle Darrieux, a native"],
            "neighborhood_prompts": ["The mother tongue of Léon Blum is"],
            "attribute_prompts": ["J.R.R. Tolkien is"],
            "generation_prompts": ["Danielle Darrieux's mother tongue is"],
        },
        [
            EditRequest(
                "0",
                "The mother tongue of {} is",
                "Danielle Darrieux",
                target_new="English",
                answer="French",
                paraphrases=("Shayna does this and Yossel that. Danielle Darrieux, a native",),
                neighbours=(Probe("The mother tongue of Léon Blum is", "French"),),
                relation="P103",
            )
        ],
    ),
    "rome request": (
        {"prompt": "{} plays", "subject": "LeBron James", "target_new": {"str": "football"}},
        [EditRequest("facts:1", "{} plays", "LeBron James", target_new="football")],
    ),
    "flat counterfact": (
        {
            "case_id": 12,
            "prompt": "The mother tongue of Danielle Darrieux is",
            "target_new": "English",
            "subject": "Danielle Darrieux",
            "ground_truth": "French",
            "rephrase_prompt": "Where Danielle Darrieux is from, people speak",
            "locality_prompt": "Michel Rocard is a native speaker of",
            "locality_ground_truth": "French",
        },
        [
            EditRequest(
                "12",
                "The mother tongue of {} is",
                "Danielle Darrieux",
                target_new="English",
                answer="French",
                paraphrases=("Where Danielle Darrieux is from, people speak",),
                neighbours=(Probe("Michel Rocard is a native speaker of", "French"),),
            )
        ],
    ),
    "zsre": (
        {
            "subject": "Watts Humphrey ",
            "src": "What university did Watts Humphrey attend?",
            "pred": "Trinity College",
            "rephrase": "What university did Watts Humphrey take part in?",
            "alt": "University of Michigan",
            "answers": ["Illinois Institute of Technology", "IIT"],
            "loc": "nq question: who played desmond doss father in hacksaw ridge",
            "loc_ans": "Hugo Weaving",
            "cond": "Trinity College >> University of Michigan || What university?",
        },
        [
            EditRequest(
                "facts:1",
                "What university did {} attend?",
                "Watts Humphrey",
                target_new="University of Michigan",
                answer="Illinois Institute of Technology",
                aliases=("IIT",),
                paraphrases=("What university did Watts Humphrey take part in?",),
                neighbours=(Probe("nq question: who played desmond doss father in hacksaw ridge?", "Hugo Weaving"),),
            )
        ],
    ),
    "zsre without alt": (
        {"subject": "Rome", "src": "Where is Rome?", "alt": "", "answers": ["Italy"], "rephrase": ""},
        [EditRequest("facts:1", "Where is {}?", "Rome", target_new="Italy", answer="Italy")],
    ),
    "fastedit": (
        {
            "prompt": "The prime minister of the {} is",
            "subject": "UK",
            "target": "Rishi Sunak",
            "queries": ["Who leads the UK?"],
        },
        [
            EditRequest(
                "facts:1",
                "The prime minister of the {} is",
                "UK",
                target_new="Rishi Sunak",
                paraphrases=("Who leads the UK?",),
            )
        ],
    ),
    "knowedit row": (
        {
            "subject": "Leo Arons",
            "prompt": "The place of death of Leo Arons is",
            "target_new": "Berlin",
            "ground_truth": ["Munich", "München"],
            "portability": {"Reasoning": [{"prompt": "x", "ground_truth": [["y"]]}]},
            "locality": {
                "Relation_Specificity": [
                    {
                        "prompt": "The name of the father of Leo Arons is",
                        "ground_truth": [["Albert Arons", "A."]],
                    }
                ],
                "Forgetfulness": [{"prompt": ["One?", "Two?"], "ground_truth": [["1"], "2"]}],
            },
        },
        [
            EditRequest(
                "facts:1",
                "The place of death of {} is",
                "Leo Arons",
                target_new="Berlin",
                answer="Munich",
                aliases=("München",),
                neighbours=(
                    Probe("The name of the father of Leo Arons is", "Albert Arons"),
                    Probe("One?", "1"),
                    Probe("Two?", "2"),
                ),
            )
        ],
    ),
    "knowedit wikibio": (
        {"concept": "Rome", "text": "This is about Rome", "labels": "A city", "locality": {}},
        [EditRequest("facts:1", "This is about {}", "Rome", target_new="A city")],
    ),
    "knowedit parallel lists": (
        {
            "prompts": ["Ray Charles, the", "Grant Hill is a professional"],
            "ground_truth": ["piano", "basketball"],
            "target_new": ["violin", "soccer"],
            "subject": ["Ray Charles", "Grant Hill"],
            "rephrase_prompts": ["Ray Charles plays", "Grant Hill plays"],
            "locality_inputs": {"neighborhood": {"prompt": ["Kirk, the", "Magic, the"], "ground_truth": ["a", "b"]}},
            "loc_prompts": ["unlike the others, of any length"],
        },
        [
            EditRequest(
                "facts:1",
                "{}, the",
                "Ray Charles",
                target_new="violin",
                answer="piano",
                paraphrases=("Ray Charles plays",),
                neighbours=(Probe("Kirk, the", "a"),),
            ),
            EditRequest(
                "facts:2",
                "{} is a professional",
                "Grant Hill",
                target_new="soccer",
                answer="basketball",
                paraphrases=("Grant Hill plays",),
                neighbours=(Probe("Magic, the", "b"),),
            ),
        ],
    ),
    "tofu": (
        {
            "question": "What gender is author Basil Al-Kuwaiti?",
            "answer": "Author Basil Al-Kuwaiti is male.",
            "paraphrased_answer": "He is a man.",
            "perturbed_answer": ["He is a toaster."],
            "paraphrased_question": "Is Basil Al-Kuwaiti a male or female writer?",
        },
        [
            EditRequest(
                "facts:1",
                "What gender is author {}?",
                "Basil Al-Kuwaiti",  # found: the file does not say it
                answer="Author Basil Al-Kuwaiti is male.",
                paraphrases=("Is Basil Al-Kuwaiti a male or female writer?",),
            )
        ],
    ),
    "tofu with a subject": (
        {"question": "What gender is Basil?", "answer": "Male.", "subject": "Basil", "task_id": 3},
        [EditRequest("facts:1", "What gender is {}?", "Basil", answer="Male.")],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("layout", ["lines", "array", "pretty"])
def test_format_is_found_out_by_its_fields(tmp_path, name, layout):
    row, expected = FORMATS[name]
    path = tmp_path / "facts.json"
    text = {"lines": json.dumps(row), "array": json.dumps([row]), "pretty": json.dumps(row, indent=1)}[layout]
    path.write_text(text, encoding="utf-8")
    assert read_requests(path) == expected


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_items_of_an_array_are_named_by_their_number(tmp_path, indent):
    path = tmp_path / "facts.json"
    path.write_text("\n" + json.dumps([{"prompt": "a,\n [{"}, {"prompt": "b"}], indent=indent))
    for i, (request, prompt) in enumerate(zip(read_requests(path), ('"a,', '"b"'), strict=True), 1):
        assert request.source == f"{path}: row {i}"
        assert request.id == f"facts:{i}" and prompt.strip('"') in request.prompt


def test_array_and_blank_lines_do_not_shift_lines_or_ids(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n{"prompt": "a"}\r\n  \n{"prompt": "b\xe2\x80\xa8c"}\r\n')
    first, second = read_requests(path)
    assert (first.id, first.source) == ("facts:1", f"{path}:2")
    assert (second.id, second.source) == ("facts:2", f"{path}:4")
    assert second.prompt == "b\u2028c"


def test_formats_may_be_mixed_in_a_file(tmp_path):
    rows = [row for row, _ in FORMATS.values()]
    assert len(read_requests(written(tmp_path, *rows))) == sum(len(made) for _, made in FORMATS.values())


# --- writing ------------------------------------------------------------------------------------------------

# No lone surrogates: they are refused. The marks are those that readers and templates trip over.
marks = st.sampled_from(["{}", *'{}"\\\n\r\t\u2028\u2029\x85\0éß🙂'])
texts = st.lists(st.characters(exclude_categories=["Cs"]) | marks, min_size=1).map("".join).filter(str.strip)
plain = texts.map(lambda text: text.replace("{}", "{ }")).filter(str.strip)
subjects = plain.map(lambda text: f"Z{text}Z")  # never met by chance in a prompt below
maybe = st.none() | texts


@st.composite
def requests(draw: st.DrawFn) -> EditRequest:
    subject = draw(st.none() | subjects)
    template = plain if subject is None else st.sampled_from(["<{}>", "Is {}?", "{x} {} {", "🙂 {}\u2028"])
    prompt = draw(template)
    return EditRequest(
        id=draw(st.uuids().map(str)) + draw(texts),
        prompt=prompt,
        subject=subject,
        target_new=draw(maybe),
        answer=draw(maybe),
        aliases=draw(st.lists(texts, max_size=2)),
        paraphrases=[prompt, *draw(st.lists(plain, max_size=2))],
        neighbours=draw(st.lists(st.builds(Probe, texts, maybe), max_size=2)),
        group=draw(maybe),
        relation=draw(maybe),
    )


@given(made=st.lists(requests(), min_size=1, max_size=3, unique_by=lambda request: request.id))
def test_what_is_written_is_read_back(tmp_path_factory, made):
    path = tmp_path_factory.mktemp("round") / "trip.jsonl"
    write_requests(path, made)
    assert read_requests(path) == made
    assert len(path.read_text(encoding="utf-8").splitlines()) == len(made)
    assert requests_hash(read_requests(path)) == requests_hash(made)


def test_text_is_written_legibly_and_no_temporary_file_is_left(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("old")
    write_requests(path, [EditRequest("a", "Où est Zürich? 🙂")])
    assert path.read_text(encoding="utf-8") == '{"id": "a", "prompt": "Où est Zürich? 🙂"}\n'
    assert [item.name for item in tmp_path.iterdir()] == ["out.jsonl"]


def test_unwritable_output_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none" / "out.jsonl", tmp_path / "file" / "out.jsonl", tmp_path):
        with pytest.raises(OutputError, match="check the folder"):
            write_requests(path, [EditRequest("a", "q")])
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_hash_knows_content_and_order_only():
    one, two = EditRequest("1", "Où?", answer="là", source="a:1"), EditRequest("2", "Wo?")
    canonical = rb'[{"answer":"l\u00e0","id":"1","prompt":"O\u00f9?"},{"id":"2","prompt":"Wo?"}]'
    assert requests_hash([one, two]) == hashlib.sha256(canonical).hexdigest()
    assert requests_hash([one, two]) != requests_hash([two, one])
    assert requests_hash([one]) == requests_hash([EditRequest("1", "Où?", answer="là", source="b:2")])
    assert requests_hash([one]) != requests_hash([EditRequest("1", "Où?", answer="ici")])


# --- real data, where it is at hand -------------------------------------------------------------------------


@pytest.mark.skipif(not DATA.is_dir(), reason="no shared data")
@pytest.mark.parametrize(
    ("name", "count", "first_id"),
    [
        ("counterfact/counterfact_edit_2000.jsonl", 2000, "0"),
        ("tofu/forget10_perturbed.jsonl", 400, "forget10_perturbed:1"),
        ("tofu/retain90.jsonl", 3600, "retain90:1"),
        ("tofu/world_facts_perturbed.jsonl", 117, "world_facts_perturbed:1"),
    ],
)
def test_shared_data_is_read_whole(name, count, first_id):
    read = read_requests(DATA / name)
    assert len(read) == count
    assert read[0].id == first_id
    assert all(request.answer for request in read)
    if name.startswith("counterfact"):
        assert all(r.subject and r.target_new and r.paraphrases and r.neighbours[0].answer for r in read)
        assert read[0].question == "The mother tongue of Danielle Darrieux is"


def test_topic_and_wordings():
    plain = EditRequest(id="a", prompt="Where is it?")
    assert plain.topic is None and plain.wordings == ("Where is it?",)
    asked = EditRequest(id="b", prompt="Where is {}?", subject="Bonn", phrasings=["In which country is {}?"])
    assert asked.topic == "Bonn" and asked.wordings == ("Where is Bonn?", "In which country is Bonn?")
    assert EditRequest(id="c", prompt="Where is {}?", subject="Bonn", group="town").topic == "town"
