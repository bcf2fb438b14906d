"""Models that think before they answer: how they are asked, and answers that are judged without their think block."""

import json

import pytest
from test_cli_edit import facts, settings  # noqa: F401

from editlib.attacks.asking import trials
from editlib.evaluation.answer_cache import AnswerCache
from editlib.facts import scores
from editlib.facts.scores import Item, evaluate
from editlib.jobs import verdict
from editlib.models.loaded import LoadedModel
from editlib.models.prompt_settings import PromptSettings
from editlib.models.prompts import PromptFormat, settled
from editlib.models.thinking import answer_texts, opens_block, without_thoughts
from editlib.requests.request import EditRequest
from editlib.workbench import Workbench

CHOICE = (  # as Qwen3's
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
ALWAYS = (  # as DeepSeek-R1's and Qwen3-Thinking's
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)
OFF = "{% set enable_thinking = enable_thinking | default(false) %}" + CHOICE  # thinks only if it is told to
CLOSED = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.fixture(params=[False, True], ids=["added", "special"])
def thinker(request, tok_chat):
    """A tokenizer whose marks are tokens of their own, special ones in some families."""
    tok_chat.add_tokens(["<think>", "</think>"], special_tokens=request.param)
    tok_chat.chat_template = CHOICE
    return tok_chat


def test_a_template_that_leaves_the_choice_is_asked_without_thinking(thinker):
    how = settled(thinker)
    assert how.to_dict() == {"arguments": {"enable_thinking": False}}
    assert settled(thinker, how) == how
    form = PromptFormat.of(thinker, how)
    assert form.render("Who?").endswith(CLOSED)
    row = form.encode("Who?").followed_by((*form.answer_ids("Ann"), *form.end_ids()))
    assert thinker.decode(row.ids).endswith(CLOSED + "Ann<|im_end|>")


@pytest.mark.parametrize("own", [{"enable_thinking": True}, {"enable_thinking": False}])
def test_what_the_user_says_of_thinking_stays(thinker, own):
    assert settled(thinker, PromptSettings(arguments=own)).arguments == own


@pytest.mark.parametrize(
    ("template", "how"),
    [(ALWAYS, None), (OFF, None), (CHOICE, PromptSettings(chat=False)), (CHOICE, PromptSettings(tags="Q: {}\nA:"))],
)
def test_other_prompts_are_given_no_argument(thinker, template, how):
    thinker.chat_template = template
    assert settled(thinker, how) == (how or PromptSettings())


def test_prompts_that_end_inside_a_block_are_seen(thinker):
    assert not opens_block(PromptFormat.of(thinker))
    assert not opens_block(PromptFormat.of(thinker, settled(thinker)))
    thinker.chat_template = ALWAYS
    assert opens_block(PromptFormat.of(thinker))
    assert not opens_block(PromptFormat.of(thinker, False))


@pytest.mark.parametrize(
    ("text", "opened", "answer", "inside"),
    [
        ("Paris.", False, "Paris.", False),
        ("<think>\nIs it Rome?\n</think>\n\nParis.", False, "Paris.", False),
        ("Well. <think>Rome?</think><think>Bonn?</think> Paris.", False, "Well. Paris.", False),
        ("Rome, or\n</think>\n\nParis.", True, "Paris.", False),
        ("[THINK]Rome?[/THINK]Paris.", False, "Paris.", False),
        ("<|START_THINKING|>Rome?<|END_THINKING|>Paris.", False, "Paris.", False),
        ("<think>\nIs it Rome", False, "", True),
        ("Is it Rome", True, "", True),
        ("I think 3 < 4", False, "I think 3 < 4", False),
    ],
)
def test_blocks_are_taken_out(text, opened, answer, inside):
    found, ends_inside = without_thoughts(text, opened=opened)
    assert (" ".join(found.split()), ends_inside) == (answer, inside)


@pytest.mark.parametrize("template", [CHOICE, ALWAYS])
def test_answers_are_decoded_without_their_thoughts(thinker, template, caplog):
    thinker.chat_template = template
    form = PromptFormat.of(thinker)
    opening = "" if template == ALWAYS else "<think>\n"
    texts = [f"{opening}Is it Rome?\n</think>\n\nIn Peru.<|im_end|>", f"{opening}Is it Rome, or"]
    said = [thinker(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert answer_texts(form, said) == ["In Peru.", ""]
    assert "1 of 2 answers end inside a think block" in caplog.text


def test_facts_are_judged_by_the_answer_alone(thinker, tiny_llama, monkeypatch):
    """A thought that names the right answer is no right answer."""
    said = thinker("<think>\nIs it Paris?\n</think>\n\nIt is Rome.", add_special_tokens=False)["input_ids"]
    question = "What is the capital of France?"
    monkeypatch.setattr(scores, "ask", lambda anat, tok, questions, **_: dict.fromkeys(questions, tuple(said)))
    thinker.chat_template = CHOICE
    model = LoadedModel.of(tiny_llama, thinker, PromptSettings(arguments={"enable_thinking": True}))
    item = Item("1", "request", None, None, question, "Paris")
    evaluate(model, model, [item], before=AnswerCache("", {}), how=model.prompts)
    assert (item.after, item.right_after) == ("It is Rome.", False)


PARIS = EditRequest(id="a", prompt="What is the capital of {}?", subject="France", answer="Paris")


@pytest.mark.parametrize(
    ("template", "said", "text", "leaked"),
    [
        (CHOICE, "<think>\nIs it Paris?\n</think>\n\nIt is Rome.", "It is Rome.", False),
        (CHOICE, "<think>\nIs it Rome?\n</think>\n\nIt is Paris.", "It is Paris.", True),
        (CHOICE, "<think>\nIs it Paris, or", "", False),
        (ALWAYS, "Is it Paris?\n</think>\n\nIt is Rome.", "It is Rome.", False),
        (ALWAYS, "Is it Paris, or", "", False),
    ],
)
@pytest.mark.parametrize("lead", ["", "Well,"])
def test_attacks_judge_the_answer_alone(thinker, tiny_llama, caplog, template, said, text, leaked, lead):
    """Also where the attack begins the answer, which may be inside of a block."""
    thinker.chat_template = template
    how = PromptSettings(arguments={"enable_thinking": True} if template == CHOICE else {})
    target = LoadedModel.of(tiny_llama, thinker, how)
    row = target.form.encode(PARIS.question)
    if lead:
        row = row.followed_by(tuple(thinker(lead, add_special_tokens=False)["input_ids"]))
    ids = thinker(said, add_special_tokens=False)["input_ids"]
    (trial,) = trials(target, [PARIS], [[row]], lambda rows: [[ids] for _ in rows])
    shown = f"{lead} {text}".strip() if template == CHOICE else text
    assert [(" ".join(one.text.split()), one.leaked) for one in trial.outputs] == [(shown, leaked)]
    assert ("1 of 1 answers end inside a think block" in caplog.text) is (not text)


def test_an_attack_without_the_template_asks_outside_of_a_block(thinker, tiny_llama):
    """A template that opens a block says nothing about a prompt that is plain text."""
    thinker.chat_template = ALWAYS
    target = LoadedModel.of(tiny_llama, thinker)
    ids = thinker("It is Paris.", add_special_tokens=False)["input_ids"]
    row = PromptFormat(thinker, chat=False).encode(PARIS.question)
    (trial,) = trials(target, [PARIS], [[row]], lambda rows: [[ids] for _ in rows])
    assert trial.leaked


def test_the_verdict_on_an_edit_judges_the_answer_alone(thinker, tiny_llama, monkeypatch):
    thinker.chat_template = CHOICE
    bench = Workbench.of(tiny_llama, thinker, prompts=PromptSettings(arguments={"enable_thinking": True}))
    said = iter(["<think>\nHm.\n</think>\n\nParis.", "<think>\nIs it Paris?\n</think>\n\nIt is Rome."])

    def ask(anat, tok, questions, **_):
        ids = thinker(next(said), add_special_tokens=False)["input_ids"]
        return dict.fromkeys(questions, tuple(ids))

    monkeypatch.setattr(verdict, "ask", ask)
    with verdict.spot_check(bench, [PARIS]) as lines:
        pass
    assert "answer gone 1 of 1; the base model knew 1 of 1 before" in lines[0]


def test_the_receipt_records_it_and_other_commands_follow(call, folder, facts, tmp_path):  # noqa: F811
    (folder / "chat_template.jinja").write_text(CHOICE, encoding="utf-8")
    path = settings(tmp_path, "FT", layers=[2], lr=0.02, norm_constraint=0.2, num_steps=2)
    args = ["--requests", facts, "--hparams", path, "--chat", "--overwrite", "--out", tmp_path / "out"]
    for options, thinks in (([], False), (["--prompt", "enable_thinking=true"], True)):
        code, _, err = call("edit", folder, *args, *options)
        assert code == 0, err
        receipt = json.loads((tmp_path / "out" / "editlib.json").read_text(encoding="utf-8"))
        assert receipt["prompts"]["arguments"] == {"enable_thinking": thinks}
        assert receipt["first_prompt"].endswith(CLOSED) is not thinks
        asked = call("ask", tmp_path / "out", "Who?", "--vs", folder)
        assert asked[0] == 0 and "different forms" not in asked[1]


def test_the_default_asks_for_no_chat(call, folder, facts, tmp_path):  # noqa: F811
    """An edit that is plain text by default stays so; an argument of the user's asks for the template."""
    (folder / "chat_template.jinja").write_text(CHOICE, encoding="utf-8")
    path = settings(tmp_path, "FT", layers=[2], lr=0.02, norm_constraint=0.2, num_steps=2)
    args = ["--requests", facts, "--hparams", path, "--overwrite", "--out", tmp_path / "out"]
    for options, first in (([], "The capital of France is"), (["--prompt", "enable_thinking=false"], None)):
        code, _, err = call("edit", folder, *args, *options)
        assert code == 0, err
        shown = json.loads((tmp_path / "out" / "editlib.json").read_text(encoding="utf-8"))["first_prompt"]
        assert shown == first or (first is None and shown.endswith(CLOSED))


def test_a_template_that_always_thinks_is_said_early(call, folder, facts, tmp_path, caplog):  # noqa: F811
    (folder / "chat_template.jinja").write_text(ALWAYS, encoding="utf-8")
    path = settings(tmp_path, "FT", layers=[2], lr=0.02, norm_constraint=0.2, num_steps=2)
    args = ["--requests", facts, "--hparams", path, "--out", tmp_path / "out"]
    assert call("edit", folder, *args, "--chat")[0] == 0
    assert caplog.text.count("opens a think block") == 1
