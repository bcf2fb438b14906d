"""Settings of prompts: dates that stay, template arguments, tags; and what is refused."""

import datetime
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editlib.errors import RequestError
from editlib.models.prompt_settings import PromptSettings, dated
from editlib.models.prompts import PromptFormat, settled

LLAMA32 = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "{{- 'Today Date: ' + date_string + '\\n' }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
GRANITE = LLAMA32.replace("%d %b %Y", "%B %d, %Y")
SMOLLM3 = "{%- set today = strftime_now('%d %B %Y') -%}{{ today }}{{ messages[-1]['content'] }}"
THINKING = (
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}"
    "{% endif %}{% endif %}"
)
DIRECTIVES = "%d %b %B %Y %y %m %A %a %j %e %F %% , - x".split()  # noqa: SIM905
DIRECTIVES += "%H %M %S %f %-H %-I %-M %-S %k %l %T %X %R %D %x %c %-j %-y %G %V %u %w %U %W".split()  # noqa: SIM905


@pytest.fixture
def dates(tok):
    tok.chat_template = LLAMA32
    return tok


@pytest.mark.parametrize(
    ("template", "shown"),
    [(LLAMA32, "Today Date: 05 Mar 2026\n"), (GRANITE, "Today Date: March 05, 2026\n"), (SMOLLM3, "05 March 2026")],
)
def test_a_template_prints_the_recorded_day(tok, template, shown):
    tok.chat_template = template
    before = tok.chat_template
    form = PromptFormat.of(tok, PromptSettings(date="2026-03-05"))
    assert form.render("Who?").startswith(shown)
    assert PromptFormat(tok).render("Who?") != form.render("Who?")
    assert PromptFormat(tok).prints_date and form.prints_date
    assert tok.chat_template == before


@given(
    st.dates(min_value=datetime.date(1000, 1, 1)),
    st.lists(st.sampled_from(DIRECTIVES), max_size=6).map(" ".join),
)
def test_days_are_written_as_strftime_does(day, directives):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = dated("{{ strftime_now('" + directives + "') }}", day)
    shown = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template).render()
    assert shown == datetime.datetime(day.year, day.month, day.day).strftime(directives)


def test_a_template_may_begin_with_a_line_end(tok):
    tok.chat_template = "\n\n" + LLAMA32.replace("{%- if not", "{% if not", 1)
    day = datetime.datetime.now().date().isoformat()
    assert PromptFormat.of(tok, PromptSettings(date=day)).render("Who?") == PromptFormat(tok).render("Who?")


def test_only_templates_with_a_date_are_given_one(dates, tok_chat):
    assert settled(tok_chat) == PromptSettings()
    assert settled(dates).date == datetime.datetime.now().date().isoformat()
    week = PromptSettings(date="2020-01-01")
    assert settled(dates, week) == week


def test_arguments_reach_the_template(tok):
    tok.chat_template = THINKING
    how = PromptSettings.of_options(["enable_thinking=false"])
    assert how.arguments == {"enable_thinking": False}
    assert PromptFormat.of(tok, how).render("Who?") == "Who?<think></think>"
    assert PromptFormat(tok).render("Who?") == "Who?"
    with pytest.raises(RequestError, match="does not use 'enable_thinkin'"):
        PromptFormat.of(tok, PromptSettings.of_options(["enable_thinkin=false"]))


def test_tags_surround_the_question(tok_chat):
    how = PromptSettings.of_options(["tags=Question: {}\\nAnswer:"])
    form = PromptFormat.of(tok_chat, how)
    assert form.render("Is {} a set?") == "Question: Is {} a set?\nAnswer:"
    row = form.encode("Where is Peru?", "Peru")
    assert tok_chat.decode(row.ids[: row.lookup + 1]) == "Question: Where is Peru"
    assert tok_chat.decode(form.answer_ids("In Bonn", "Where?")) == " In Bonn"
    shown = replace(form, shots=(("Who?", "Ann"),)).render("Where?")
    assert shown == "Question: Who?\nAnswer: Ann\nQuestion: Where?\nAnswer:"


@pytest.mark.parametrize(
    "options",
    [[], ["system=Be brief."], ["tags=Q: {}\\nA:"], ["date=2026-01-31", "enable_thinking=true"], ["chat=false"]],
)
def test_settings_are_read_as_they_were_written(options):
    how = PromptSettings.of_options(options)
    assert (how is None) is (not options)
    how = how or PromptSettings()
    assert PromptSettings.from_dict(how.to_dict()) == how
    assert how.key("of") == ("of" if not options else how.key("of"))
    assert (how.key("of") == "of") is (not options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["system"], "has no value; expected NAME=VALUE"),
        (["date=2026-01-01", "date=2026-01-02"], "is given twice"),
        (["date=yesterday"], "expected a day such as 2026-01-31"),
        (["date=20260131"], "expected a day such as 2026-01-31"),
        (["date=2026-W05-6"], "expected a day such as 2026-01-31"),
        (["tags=Question:"], "for the question"),
        (["tags={}", "system=Be brief."], "exclude"),
        (["chat=perhaps"], "expected true or false"),
    ],
)
def test_bad_options_are_one_line(options, told):
    with pytest.raises(RequestError, match=told):
        PromptSettings.of_options(options)


def test_a_tokenizer_without_a_template_takes_no_system(tok):
    with pytest.raises(RequestError, match="this tokenizer has none"):
        PromptFormat.of(tok, PromptSettings(system="Be brief."))
    with pytest.raises(RequestError, match="unknown; expected chat, system"):
        PromptSettings.from_dict({"sytem": "x"})
