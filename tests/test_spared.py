"""What a command reads is never deleted by its own --overwrite, and texts are printed as they are."""

import json

import pytest
from tiny_models import make_gpt2, train_tokenizer

from editlib.models.weights import save_model

FACT = {"id": "a", "prompt": "The capital of {} is", "subject": "France", "target_new": "Bonn", "answer": "Paris"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and the files of a user beside it."""
    path = tmp_path_factory.mktemp("spared") / "work [x]"
    (path / "model").mkdir(parents=True)
    save_model(make_gpt2(), train_tokenizer(), path / "model")
    (path / "facts.jsonl").write_text(json.dumps(FACT))
    (path / "sub").mkdir()
    (path / "sub" / "facts.jsonl").write_text(json.dumps(FACT))
    return path


def files(path):
    return sorted((str(one.relative_to(path)), one.stat().st_size) for one in path.rglob("*") if one.is_file())


@pytest.mark.parametrize(
    ("command", "out", "said"),
    [
        ("edit {m} --requests {r} --algorithm ROME", "model", "is {m}"),
        ("edit {m} --requests {r} --algorithm ROME", "model/../model/.", "is {m}"),
        ("edit {m} --requests {p}/sub/facts.jsonl --algorithm ROME", "sub", "holds {p}/sub/facts.jsonl"),
        ("unlearn {m} --requests {r}", "model", "is {m}"),
        ("unlearn {m} --requests {r} --retain {p}/sub/facts.jsonl", "sub", "holds {p}/sub/facts.jsonl"),
        ("eval {m} {m} --requests {r}", "model", "is {m}"),
        ("attack {m} {m} --requests {r}", "model", "is {m}"),
        ("baseline {m} --method GA --requests {r}", "model", "is {m}"),
        ("receipt {m}", "model", "is {m}"),
        ("apply {m} {r}", "model", "is {m}"),
        ("lora {r} --base {m}", "model", "is {m}"),
    ],
)
def test_overwrite_spares_what_is_read(place, call, command, out, said):
    before = files(place)
    names = {"m": place / "model", "r": place / "facts.jsonl", "p": place}
    args = [part.format(**names) for part in command.split(" ")]
    code, _, err = call(*args, "--out", f"{place}/{out}", "--overwrite")
    assert code == 2 and len(err.splitlines()) == 1
    assert f"{said.format(**names)}, which is read here" in err
    assert files(place) == before


def test_brackets_are_printed_as_they_are(place, call, monkeypatch):
    """Rich takes `[x]` for markup: such paths lost a part, and an answer with `[/INST]` was a traceback."""
    monkeypatch.setattr("editlib.models.loaded.plain_text", lambda tok, ids: "[/INST] :dog: [b]no[/b]")
    code, shown, err = call("ask", place / "model", "Is it [b]?", "--max-new-tokens", 1)
    assert code == 0, err
    assert "[/INST] :dog: [b]no[/b]" in shown and "Is it [b]?" in shown
    code, shown, err = call("hparams", "new", place / "model", "--algorithm", "ROME", "--out", place / "rome.json")
    assert code == 0 and f"{place}/rome.json" in shown.replace("\n", ""), err
    (place / "rome.json").unlink()
