"""Ask the questions of lm-eval's tasks with the `--prompt` settings: through the chat template, or between tags."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from editlib.export import read_receipt
from editlib.export.receipt import prompts_of
from editlib.models.prompt_settings import PromptSettings
from editlib.models.prompts import PromptFormat, settled


def given_prompts(models: Sequence[str], how: PromptSettings | None) -> PromptSettings | None:
    """Returns the settings `how`; if they have no date, with the date that the models were edited with. `None` for
    `None`.

    Raises:
        ModelError: the receipt of a model is damaged.
    """
    if how is None:
        return None
    recorded = [prompts_of(receipt, how) for name in models if (receipt := read_receipt(name)) is not None]
    days = [settings.date for settings in recorded if settings is not None and settings.date is not None]
    return replace(how, date=how.date or next(iter(days), None))


def form_of(tok: PreTrainedTokenizerBase, how: PromptSettings | None) -> PromptFormat | None:
    """Returns the format of a model's prompts; `None`: lm-eval's default, without template and tags.

    Raises:
        RequestError: settings that this tokenizer's template cannot use.
    """
    return None if how is None else PromptFormat.of(tok, settled(tok, how))


def asked_through(lm: Any, form: PromptFormat | None) -> Any:
    """Makes the form the chat template of `lm`, if the form is a chat."""
    if form is not None and form.uses_chat:
        lm.apply_chat_template = partial(rendered, form)
    return lm


def rendered(form: PromptFormat, history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
    """Returns the text of lm-eval's history: the system's turn if there is one, the question with its shots, and the
    beginning of the answer if the task has one (then without `add_generation_prompt`).

    If the template omits the system's turn, its text comes before the question.
    """
    turns = [dict(turn) for turn in history]
    begun = turns.pop()["content"] if not add_generation_prompt and turns[-1]["role"] == "assistant" else ""
    question = turns[-1]["content"]
    system = turns[0]["content"] if turns[0]["role"] == "system" else None
    with_system = replace(form, system=system)
    if system is not None and not with_system.tells_system:
        return replace(form, system=None).render(f"{system}\n\n{question}") + begun
    return with_system.render(question) + begun


@contextlib.contextmanager
def tagged(task: Any, form: PromptFormat | None) -> Iterator[dict[str, Any]]:
    """Puts the form's tags around each question of a task of lm-eval; gives the options of `evaluate` for the form."""
    if form is None or (not form.uses_chat and form.tags is None):
        yield {}
        return
    if form.uses_chat:
        yield {"apply_chat_template": True, "system_instruction": form.system}
        return
    plain = task.fewshot_context

    def context(*given: Any, **options: Any) -> str | list[str]:
        made = plain(*given, **options)
        return [form.render(text) for text in made] if isinstance(made, list) else form.render(made)

    task.fewshot_context = context
    try:
        yield {}
    finally:
        del task.fewshot_context
