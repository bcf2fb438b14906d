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


TAGS = ["--prompt", "tags=Q: {}\\nA:"]
PAIRS = [
    {"id": f"{i}", "prompt": "What flows through {}?", "subject": f"Town {i}", "answer": f"The river {i}."}
    for i in range(8)
]


@pytest.fixture
def rendered(monkeypatch):
    """What models are asked, as text."""
    seen, encode = [], PromptFormat.encode

    def noted(form, question, *args, **options):
        seen.append(form.render(options.get("template", "{}").replace("{}", question)))
        return encode(form, question, *args, **options)

    monkeypatch.setattr(PromptFormat, "encode", noted)
    return seen


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS), encoding="utf-8")
    return path


def commands(folder, pairs, facts, settings, out):  # noqa: F811
    """By name, commands that ask a model, each without `--prompt`."""
    stats = ["--stats-dir", out.parent / "stats"]
    return {
        "baseline": [
            "baseline", folder, "--method", "NPO+GD", "--requests", pairs, "--retain", pairs, "--out", out,
            "--steps", 1, "--learning-rate", 1e-5,
        ],
        "finetune": [
            "finetune", "--data", pairs, "--model", folder, "--out", out, "--epochs", 1, "--keep", 0, "--text", "none",
        ],
        "bench": [
            "bench", "counterfact", "--requests", facts, "--model", folder, "--out", out, "--algorithms", "FT",
            "--hparams", settings, "--edits", "1", *stats,
        ],
        "stats": ["stats", folder, "--layers", "1", "--corpus", "self", "--tokens", 200, *stats],
        "compare": ["compare", "--config", out.parent / "compare.json", "--out", out],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["baseline", "finetune", "bench", "stats", "compare"])
def test_every_command_that_asks_takes_prompts(call, folder, facts, pairs, tmp_path, rendered, name):  # noqa: F811
    path = settings(tmp_path, "FT", layers=[2], lr=0.02, norm_constraint=0.2, num_steps=2)
    config = {
        "model": str(folder),
        "sets": [{"protocol": "facts", "requests": str(pairs), "retain": str(pairs)}],
        "methods": [{"method": "NPO+GD", "settings": {"steps": 1, "learning_rate": 1e-5}}],
        "perplexity": None,
        "stats_dir": str(tmp_path / "stats"),
        "prompts": {"tags": "Q: {}\nA:"},
    }
    (tmp_path / "compare.json").write_text(json.dumps(config), encoding="utf-8")
    given = commands(folder, pairs, facts, path, tmp_path / "out")[name]
    code, _, err = call(*given, *([] if name == "compare" else TAGS))
    assert code == 0, err
    assert rendered and not [text for text in rendered if not text.startswith("Q: ")]
    recorded = {"baseline": "editlib.json", "finetune": "finetune.json", "compare": "results.json"}
    if name in recorded:
        told = (tmp_path / "out" / recorded[name]).read_text(encoding="utf-8")
        assert json.dumps("Q: {}\nA:") in told


def test_a_model_that_a_baseline_changed_is_asked_as_it_was_trained(call, folder, facts, pairs, tmp_path, rendered):  # noqa: F811
    given = commands(folder, pairs, facts, "", tmp_path / "out")["baseline"]
    assert call(*given, *TAGS)[0] == 0
    rendered.clear()
    assert call("ask", tmp_path / "out", "Who?")[0] == 0
    assert rendered == ["Q: Who?\nA:"]


def test_prompts_for_what_does_not_ask_with_them_are_refused(call, folder, pairs, tmp_path):
    given = ["stats", folder, "--layers", "1", "--corpus", "wiki-sample", "--tokens", 200]
    refused(call(*given, *TAGS), "--corpus self")
    given = ["baseline", folder, "--method", "in-context", "--requests", pairs, "--out", tmp_path / "out"]
    refused(call(*given, *TAGS), "in-context", "chat template")


@pytest.mark.parametrize("name", ["baseline", "finetune", "bench", "compare"])
def test_a_prompt_beyond_the_positions_is_told_before_any_work(call, folder, tmp_path, name):
    long = {**PAIRS[0], "id": "long", "prompt": "So it is. " * 500 + "What flows through {}?", "target_new": "Rome"}
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(pair) + "\n" for pair in [long, *PAIRS]), encoding="utf-8")
    path = settings(tmp_path, "FT", layers=[2], lr=0.02, norm_constraint=0.2, num_steps=2)
    config = {
        "model": str(folder),
        "sets": [{"protocol": "facts", "requests": str(pairs)}],
        "methods": ["GA"],
        "perplexity": None,
    }
    (tmp_path / "compare.json").write_text(json.dumps(config), encoding="utf-8")
    refused(call(*commands(folder, pairs, pairs, path, tmp_path / "out")[name]), "'long'", "positions")
    assert not (tmp_path / "out" / "editlib.json").exists() and not (tmp_path / "out" / "finetune.json").exists()
