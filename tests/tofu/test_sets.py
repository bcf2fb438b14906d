"""Which questions are asked: out of TOFU's files, less what a model never learned, and drawn by lot."""

from __future__ import annotations

import json

import pytest
from tofu_files import FORGOTTEN, KEPT, rows, write_tofu_files

from editlib.errors import RequestError
from editlib.requests.reading import read_requests, write_requests
from editlib.tofu.sets import Asked, draw, questions_in, read_tofu


@pytest.fixture
def folder(tmp_path):
    return write_tofu_files(tmp_path / "tofu")


def questions(found):
    return [one.question for one in found]


def asked_of(*names):
    return [row["question"] for name in names for row in rows(name)]


def test_a_folder_without_retain99_has_it_all_the_same(folder):
    sets = read_tofu(folder)
    assert questions(sets.forget) == asked_of(*FORGOTTEN[:2])
    assert questions(sets.retain) == asked_of(*FORGOTTEN[2:], *KEPT)
    assert [request.subject for request in sets.forget[:3]] == ["Ada Moor"] * 3
    assert {subject.rule for subject in sets.subjects} == {"name"}
    assert questions(sets.probes["forget"]) == asked_of(*FORGOTTEN[:2])
    assert sets.probes["forget_paraphrased"][0].question == "Tell me Ada Moor's genre?"
    assert questions(sets.probes["retain"]) == asked_of(KEPT[0])  # those that have wrong answers, too
    assert sets.probes["retain"][0].wrong == ("It is no genre.", "It is a genre.")
    assert sets.probes["retain"][0].paraphrase == "Ed has that genre."
    assert sets.probes["real_authors"][0] == Asked(
        "real_authors:1", "Who wrote 'Emma'?", "Jane Austen", None, ("Bonn", "Rome")
    )
    assert sets.missing == ()


def test_a_retain_set_of_its_own_goes_first(folder):
    (folder / "retain99.json").write_text((folder / "retain90.jsonl").read_text())
    assert questions(read_tofu(folder).retain) == asked_of(*KEPT)


def test_what_was_not_learned_is_neither_forgotten_nor_kept(folder, tmp_path):
    learned = tmp_path / "learned.jsonl"
    lines = (folder / "forget01.jsonl").read_text().splitlines()[:2] + (folder / "retain90.jsonl").read_text(
    ).splitlines()[3:]  # fmt: skip
    learned.write_text("\n".join(lines))
    sets = read_tofu(folder, learned=questions_in(learned))
    assert questions(sets.forget) == asked_of(FORGOTTEN[0])[:2]
    assert questions(sets.retain) == asked_of(KEPT[1])
    assert questions(sets.probes["retain"]) == asked_of(KEPT[1])  # no wrong answers to be had
    assert sets.unlearned == {"forget": 4, "retain": 9}
    with pytest.raises(RequestError, match="none of 6 questions of forget01"):
        read_tofu(folder, learned={"Who?"})


def test_what_finetune_leaves_says_what_was_learned(folder, tmp_path):
    learned = tmp_path / "learned.jsonl"
    write_requests(learned, read_requests(folder / "forget01.jsonl")[:2])
    assert questions_in(learned) == set(asked_of(FORGOTTEN[0])[:2])


def test_the_user_names_subjects_of_either_set(folder):
    own = {"forget01:1": "genre", "Which city is Fay Berg's?": "city"}
    sets = read_tofu(folder, subjects=own)
    assert sets.forget[0].subject == "genre" and sets.subjects[0].rule == "given"
    assert [one.subject for one in sets.retain if one.question == "Which city is Fay Berg's?"] == ["city"]
    with pytest.raises(RequestError, match="'nobody' is not a question"):
        read_tofu(folder, subjects={"nobody": "x"})


def test_one_question_at_a_time(folder):
    sets = read_tofu(folder)
    one, others = sets.forget[1], [*sets.forget[:1], *sets.forget[2:]]
    narrow = sets.forgetting([one], others)
    assert questions(narrow.forget) == [one.question]
    assert questions(narrow.probes["forget"]) == [one.question]
    assert [probe.id for probe in narrow.probes["forget_paraphrased"]] == [one.id]
    assert questions(narrow.probes["retain"]) == [*questions(others), *asked_of(KEPT[0])]
    assert questions(narrow.retain) == [*questions(others), *questions(sets.retain)]
    assert questions(sets.forgetting([one]).probes["retain"]) == asked_of(KEPT[0])  # the others are not asked


def test_a_draw_is_part_of_a_larger_one_and_of_a_larger_sets():
    all_of_them = [Asked(f"q:{i}", f"{i}?", "a") for i in range(40)]
    five, nine = draw(all_of_them, 5, 0), draw(all_of_them, 9, 0)
    assert len(five) == 5 and set(five) < set(nine)
    assert list(nine) == [one for one in all_of_them if one in nine]
    grown = set(draw(all_of_them[:30], 5, 0))
    assert set(five) & set(all_of_them[:30]) <= grown
    assert draw(all_of_them, 5, 1) != five
    assert draw(all_of_them, 99, 0) == tuple(all_of_them)


def test_sets_that_are_not_there_are_named(tmp_path, caplog):
    folder = write_tofu_files(tmp_path / "tofu", without=["world_facts_perturbed", "forget01_perturbed"])
    sets = read_tofu(folder)
    assert sets.missing == ("forget_paraphrased", "world_facts")
    assert sets.probes["forget"][0].wrong == ()
    assert "world_facts" in caplog.text


@pytest.mark.parametrize(
    ("source", "forget", "words"),
    [
        (None, "forget02", "forget01, forget05, forget10"),
        ("nowhere", "forget01", "no such folder"),
        ("not/there", "forget01", "not/there cannot be read from the Hub"),
        ("./no/where", "forget05", "no such folder"),
    ],
)
def test_what_there_is_not(source, forget, words, monkeypatch):
    offline(monkeypatch, FileNotFoundError("gone"))
    with pytest.raises(RequestError, match=words):
        read_tofu(source, forget)


def offline(monkeypatch, error):
    """The Hub's package, whose every download ends in `error`."""
    import huggingface_hub

    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


def test_without_a_network_there_is_one_line(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    offline(monkeypatch, LocalEntryNotFoundError("a long story\nof tries"))
    with pytest.raises(RequestError) as told:
        read_tofu()
    assert "locuslab/TOFU" in str(told.value) and "--tofu" in str(told.value) and "\n" not in str(told.value)


def test_the_hub_is_asked_for_tofus_own_names(folder, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    asked = []

    def download(repo, name, *, repo_type, **_):
        asked.append((repo, name, repo_type))
        path = folder / name.replace(".json", ".jsonl")
        if not path.is_file():
            raise EntryNotFoundError("404")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert read_tofu().probes == read_tofu(folder).probes
    assert ("locuslab/TOFU", "forget01.json", "dataset") in asked
    assert ("locuslab/TOFU", "world_facts_perturbed.json", "dataset") in asked


BAD_ROWS = {
    "forget01": ['{"question": "Which food is Ada Moor\'s?"}', '{"question": 7, "answer": "x"}', "[1]", "{"],
    "forget10": ['{"question": "", "answer": "x"}'],
    "world_facts_perturbed": [
        '{"question": "Where?"}',
        '{"question": "Where?", "answer": "x", "perturbed_answer": {"a": 1}}',
        '{"question": "Where?", "answer": "x", "paraphrased_answer": 3}',
        '"text"',
        "{]",
    ],
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_all_bad_rows_are_named_or_left_out(folder, name, caplog):
    whole = read_tofu(folder)
    path = folder / f"{name}.jsonl"
    good = path.read_text()
    path.write_text(good + "\n".join(BAD_ROWS[name]))
    numbers = [len(good.splitlines()) + i + 1 for i in range(len(BAD_ROWS[name]))]
    with pytest.raises(RequestError) as told:
        read_tofu(folder)
    said = str(told.value)
    assert path.name in said and "--skip-bad" in said and "\n" not in said
    # A row without an answer reads well as a question: it is named when the others are mended.
    assert all(str(number) in said for number in numbers[1:] or numbers)
    sets = read_tofu(folder, skip_bad=True)
    assert sets.left_out.keys() == {path.name}
    assert sorted(sets.left_out[path.name]) == sorted(f"line {number}" for number in numbers)
    assert (sets.forget, sets.retain, sets.probes) == (whole.forget, whole.retain, whole.probes)
    assert path.name in caplog.text
    path.write_text("\n".join(BAD_ROWS[name]))
    with pytest.raises(RequestError, match="no row is left"):
        read_tofu(folder, skip_bad=True)


@pytest.mark.parametrize("kind", ["json", "parquet", "saved"])
def test_the_files_may_be_of_any_form(folder, kind):
    """As JSON arrays, Parquet files, or folders by `datasets`."""
    whole = read_tofu(folder)
    for path in list(folder.iterdir()):
        found = [json.loads(line) for line in path.read_text().splitlines()]
        path.unlink()
        if kind == "json":
            path.with_suffix(".json").write_text(json.dumps(found, indent=1))
            continue
        table = pytest.importorskip("datasets").Dataset.from_list(found)
        if kind == "saved":
            table.save_to_disk(str(path.with_suffix("")))
        else:
            table.to_parquet(str(path.with_suffix(".parquet")))
    sets = read_tofu(folder)
    assert (sets.forget, sets.retain, sets.probes) == (whole.forget, whole.retain, whole.probes)
