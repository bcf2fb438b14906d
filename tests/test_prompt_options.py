"""`--prompt` from the command to the receipt and back: what an edit asked with is what later commands ask with."""

import json
import shutil

import pytest
from test_cli import refused
from test_cli_edit import corpus, facts, settings  # noqa: F401

from editlib.models.prompts import PromptFormat

DATED = (
    "{{ 'Today is ' + strftime_now('%d %B %Y') + '. ' }}{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'So: ' }}{% endif %}"
)


@pytest.fixture
def edited(call, folder, facts, tmp_path):  # noqa: F811
    """`edited(*options)` -> the receipt of an edit with these options, which is in `tmp_path/out`."""
    (folder / "chat_template.jinja").write_text(DATED, encoding="utf-8")
    path = settings(tmp_path, "FT", layers=[2], lr=0.02, norm_constraint=0.2, num_steps=2)

    def run(*options):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        code, _, err = call("edit", folder, "--requests", facts, "--hparams", path, "--out", tmp_path / "out", *options)
        assert code == 0, err
        return json.loads((tmp_path / "out" / "editlib.json").read_text(encoding="utf-8"))

    return run


@pytest.mark.parametrize(
    ("options", "recorded", "first"),
    [
        ([], {"chat": False}, "The capital of France is"),
        (["--prompt", "tags=Q: {}\\nA:"], {"tags": "Q: {}\nA:"}, "Q: The capital of France is\nA:"),
        (
            ["--chat", "--prompt", "date=2026-01-31"],
            {"chat": True, "date": "2026-01-31"},
            "Today is 31 January 2026. The capital of France is So: ",
        ),
        (
            ["--prompt", "system=Be brief.", "--prompt", "date=2026-01-31"],
            {"system": "Be brief.", "date": "2026-01-31"},
            "Today is 31 January 2026. Be brief. The capital of France is So: ",
        ),
    ],
)
def test_the_receipt_holds_how_was_asked(edited, options, recorded, first):
    receipt = edited(*options)
    assert {name: receipt["prompts"][name] for name in recorded} == recorded
    assert receipt["first_prompt"] == first


def test_later_commands_ask_as_the_receipt_says(call, folder, edited, tmp_path, monkeypatch, caplog):
    seen, encode = [], PromptFormat.encode

    def noted(form, question, *args, **options):
        seen.append(form.render(question))
        return encode(form, question, *args, **options)

    monkeypatch.setattr(PromptFormat, "encode", noted)
    edited("--chat", "--prompt", "date=2026-01-31")
    seen.clear()
    out = tmp_path / "out"
    assert call("ask", out, "Who?", "--vs", folder)[0] == 0
    assert seen == ["Today is 31 January 2026. Who? So: "] * 2
    seen.clear()
    requests = tmp_path / "facts.json"
    code, _, err = call("eval", folder, out, "--requests", requests, "--text", "none", "--out", tmp_path / "report")
    assert code == 0, err
    assert seen and all(text.startswith("Today is 31 January 2026. ") for text in seen)
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["first_prompt"] == "Today is 31 January 2026. The capital of France is So: "
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "Today is 31 January 2026. The capital of France is" in page
    seen.clear()
    code, _, err = call("ask", out, "Who?", "--prompt", "tags=Q: {}\\nA:")
    assert seen == ["Q: Who?\nA:"]
    assert "the model was edited with other prompts" in err + caplog.text


def test_prompts_that_do_not_fit_are_refused_at_once(call, folder, facts, tmp_path):  # noqa: F811
    path = settings(tmp_path, "FT", layers=[2], lr=0.02, norm_constraint=0.2, num_steps=2)
    args = ["--requests", facts, "--hparams", path, "--out", tmp_path / "out"]
    refused(call("edit", "nowhere-at-all", *args, "--prompt", "date=monday"), "2026-01-31")
    refused(call("edit", folder, *args, "--prompt", "enable_thinking=false"), "enable_thinking")
    refused(call("ask", folder, "Who?", "--prompt", "system"), "NAME=VALUE")
