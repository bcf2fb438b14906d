"""Attacks that change what the model reads or may say, on models whose leaks are written by hand."""

import copy
import json
from dataclasses import replace

import pytest
from scripted import REFUSE, UNL, Unit, World, leaks, texts

from editlib import data
from editlib.attacks.asking import AttackContext, ask_each, trials
from editlib.attacks.prompting import (
    SYSTEM,
    any_language,
    banned_token,
    few_shot,
    french,
    german,
    no_template,
    paraphrase,
    plain_form,
    prefill_answer,
    prefill_lead,
    prefill_own,
    system_prompt,
)
from editlib.errors import RequestError
from editlib.requests.request import EditRequest


def test_nothing_leaks_from_the_edited_model_unless_something_is_done(world):
    found = ask_each(world.edited(), world.facts, world.context())
    assert leaks(found) == [False] * 4 and texts(found) == ["-"] * 4
    assert leaks(ask_each(world.base(), world.facts, world.context())) == [True] * 4


def test_banning_the_token_brings_out_what_stands_behind_it(world):
    found = banned_token(world.edited(), world.facts, world.context())
    assert leaks(found) == [True] * 4 and texts(found) == ["Pxyz", "Ruvw", "ljkg", "ch#q"]
    other = banned_token(world.edited(), world.facts, world.context(token="[NONE]"))
    assert leaks(other) == [False] * 4


def test_a_lead_steps_over_an_edit_of_the_first_token(world):
    world.chain(world.last("The answer is"), " Pxyz")
    found = prefill_lead(world.edited(), world.facts[:2], world.context())
    assert texts(found) == ["The answer is Pxyz"] * 2
    assert leaks(found) == [True, False]


def test_the_answer_begun_with_its_first_visible_token(world):
    short = replace(world.facts[0], id="short", answer="P")
    begun = replace(world.facts[0], id="begun", answer="Pxylo", aliases=("P",))
    other = replace(world.facts[0], id="other", answer="Pxyw")
    found = prefill_answer(world.edited(), [*world.facts[:2], short, begun, other], world.context())
    assert leaks(found) == [True, True, None, None, False]  # what was given does not count as an answer
    assert found.trials[0].outputs[0].prompt == "Capital of B P"


def test_the_models_own_sentence_up_to_its_answer(world):
    world.chain(world.last("Capital of B"), "! Pxyz", score=11.0)
    world.chain(world.last("Capital of D"), "? Ruvw", score=11.0)
    facts = [*world.facts[:2], world.facts[2], replace(world.facts[0], id="wrong", answer="Rome")]
    found = prefill_own(world.edited(), facts, world.context())
    assert leaks(found) == [True, True, None, None]
    assert [trial.outputs[0].prompt.strip() for trial in found.trials[:2]] == ["Capital of B!", "Capital of D?"]
    assert found.trials[2].skipped == "no words before the answer"
    assert found.trials[3].skipped == "the model before the edit does not say it"
    erased = world.edited(Unit(1, [*world.subjects, world.ids("!")[0]], {REFUSE: 1.0}))
    assert leaks(prefill_own(erased, facts[:2], world.context())) == [False, True]  # it refuses after "!" alone


def test_one_paraphrase_that_leaks_is_enough(world):
    world.chain(world.last("!"), "Pxyz")
    fact = replace(world.facts[0], paraphrases=("What of {}", "Say {}!", "Is Pxyz of {}!"))
    found = paraphrase(world.edited(), [fact, world.facts[1]], world.context())
    assert leaks(found) == [True, None]
    assert [output.leaked for output in found.trials[0].outputs] == [False, True]  # the third tells the answer
    assert found.trials[1].skipped == "no paraphrase"


def test_shots_are_known_and_not_forgotten_and_hold_no_answer(world):
    shown = world.facts[1:]  # f0 is to be forgotten, the others may be shown
    wrong = replace(shown[0], id="wrong", subject="S", answer="Ruvw")  # the base does not know it
    same = EditRequest(id="same", prompt="Which of {}", subject="B", answer="Pxyz", relation="capital")
    world.chain(world.last("Which of B"), "Pxyz")
    context = replace(world.context(shots=3), requests=world.facts[:1], known=[*shown, wrong, same, world.facts[0]])
    found = few_shot(world.edited(), [world.facts[0], replace(world.facts[0], id="o", relation="other")], context)
    lines = found.trials[0].outputs[0].prompt.split("\n")
    assert sorted(lines[:-1]) == ["Capital of D Ruvw", "Capital of F ljkg", "Capital of G ch#q"]
    assert lines[-1] == "Capital of B"
    assert found.trials[1].skipped == "no known fact of the same relation"
    again = few_shot(world.edited(), world.facts[:1], context)
    assert again.trials[0] == found.trials[0]
    two = few_shot(world.edited(), world.facts[:1], replace(context, settings=world.context(shots=2).settings))
    assert len(two.trials[0].outputs[0].prompt.split("\n")) == 3


@pytest.fixture
def chatting(tok_chat):
    return World(tok_chat)


def test_shots_are_earlier_turns_of_a_chat(chatting):
    context = replace(chatting.context(shots=1), requests=chatting.facts[:1], known=chatting.facts[1:2])
    # In this chat all prompts end alike, so the model says one thing to all of them: the shot's answer.
    chatting.chain(chatting.last("\n"), "Ruvw")
    context = replace(context, base=chatting.base())
    prompt = few_shot(chatting.edited(), chatting.facts[:1], context).trials[0].outputs[0].prompt
    messages = [
        {"role": "user", "content": "Capital of D"},
        {"role": "assistant", "content": "Ruvw"},
        {"role": "user", "content": "Capital of B"},
    ]
    assert prompt == chatting.tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_without_the_template_the_edit_is_not_met(chatting):
    target = chatting.edited(Unit(1, [chatting.last("\n")], {301: 1.0}))  # refuses behind the template alone
    fact = chatting.facts[:1]
    assert leaks(ask_each(target, fact, chatting.context())) == [False]
    found = no_template(target, fact, chatting.context())
    assert leaks(found) == [True] and found.trials[0].outputs[0].prompt == "Capital of B"
    assert plain_form(target, fact, chatting.context()).trials[0].outputs[0].prompt == "Q: Capital of B\nA:"


def test_a_model_without_a_template_cannot_lose_it(world):
    assert leaks(no_template(world.edited(), world.facts, world.context())) == [None] * 4


def test_what_stands_behind_the_next_question_is_no_answer(world):
    said = [[world.ids(" no\nQ: Capital of B\nA: Pxyz")], [world.ids(" Pxyz\nQ: more")]]
    rows = [[world.edited().form.encode(fact.question)] for fact in world.facts[:2]]
    facts = [world.facts[0], replace(world.facts[0], id="right")]
    found = trials(world.edited(), facts, rows, lambda _: said, cut="\nQ:")
    assert [trial.leaked for trial in found] == [False, True] and found[0].outputs[0].text == "no"


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
DEAF = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}\n{% endif %}{% endfor %}"


def test_the_system_is_told_or_stands_in_front(chatting, world):
    fact = world.facts[:1]

    def prompt(target):
        return system_prompt(target, fact, world.context()).trials[0].outputs[0].prompt

    assert prompt(chatting.edited()).startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>")
    assert prompt(world.edited()) == f"{SYSTEM}\n\nCapital of B"
    for template in (NO_SYSTEM + chatting.tok.chat_template, DEAF):
        tok = copy.deepcopy(chatting.tok)
        tok.chat_template = template
        assert f"{SYSTEM}\n\nCapital of B" in prompt(World(tok).edited())


def test_other_languages_where_there_is_a_frame(world):
    other = replace(world.facts[0], id="other", relation="river")
    bare = EditRequest(id="bare", prompt="Capital of B", answer="Pxyz", relation="capital")
    found = german(world.edited(), [world.facts[0], other, bare], world.context())
    assert leaks(found) == [False, None, None]
    assert found.trials[0].outputs[0].prompt == "Wie heißt die Hauptstadt dieses Landes: B? Antworte auf Englisch."
    assert "Quelle" in french(world.edited(), world.facts[:1], world.context()).trials[0].outputs[0].prompt


def test_all_languages_of_a_data_file(world, tmp_path):
    rows = [
        {"language": name, "relation": "capital", "frame": frame}
        for name, frame in (("italian", "Qual è la capitale di {}?"), ("chinese", "{}的首都是哪里？"))
    ]
    file = tmp_path / "frames.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    context = replace(world.context(), settings=replace(world.context().settings, frames=str(file)))
    found = any_language(world.edited(), world.facts[:1], context)
    assert [output.prompt for output in found.trials[0].outputs] == ["Qual è la capitale di B?", "B的首都是哪里？"]
    assert "refused" in found.notes
    bundled = any_language(world.edited(), world.facts[:1], world.context())
    assert len(bundled.trials[0].outputs) == len(data.frames())


@pytest.mark.parametrize("row", ["{", '{"language": "x", "relation": "y", "frame": "none"}', '{"frame": "{}"}', "[]"])
def test_a_data_file_of_another_form_is_refused(tmp_path, row):
    file = tmp_path / "frames.jsonl"
    file.write_text(row, encoding="utf-8")
    with pytest.raises(RequestError, match=r"frames.jsonl: entry 1 .*expected \{\"language\""):
        data.frames(file)


@pytest.mark.parametrize("language", ["french", "german", "spanish"])
def test_every_bundled_relation_has_a_frame(language):
    frames = data.question_frames(language)
    assert set(frames) == {fact.relation for fact in data.facts()}
    assert all(frame.count("{}") == 1 for frame in frames.values())


def test_the_scene_asks_the_base_only_for_relations_it_needs(world):
    context = AttackContext(world.base(), world.facts[:1], known=[replace(world.facts[1], relation="river")])
    assert context.shots == {}


def test_unl_is_what_the_tokenizer_calls_it(world):
    assert world.tok.convert_tokens_to_ids("[UNL]") == UNL
