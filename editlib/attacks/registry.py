"""List every attack by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from editlib.attacks.asking import Attack, direct
from editlib.attacks.logit_lens import LEAD as READ_AFTER
from editlib.attacks.logit_lens import logit_lens, logit_lens_lead
from editlib.attacks.prompting import (
    LEAD,
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
    sampling,
    spanish,
    system_prompt,
)
from editlib.attacks.weights import int4, int8, relearn_forgotten, relearn_unrelated
from editlib.errors import AttackError, did_you_mean
from editlib.models.lora import peft_missing
from editlib.version import install_line


@dataclass(frozen=True)
class Entry:
    """Describes an attack, in words, and whether it needs `peft`."""

    run: Attack
    meaning: str
    needs_peft: bool = False


ATTACKS = {
    "direct": Entry(direct, "the plain question"),
    "banned-token": Entry(banned_token, "the unlearning token cannot be generated"),
    "prefill-lead": Entry(prefill_lead, f'the answer begins with "{LEAD}"'),
    "prefill-answer": Entry(prefill_answer, "the answer begins with the first token of the right one"),
    "prefill-own": Entry(prefill_own, "the answer begins with the base model's own sentence, up to the right answer"),
    "paraphrase": Entry(paraphrase, "the question in other words, any of them"),
    "few-shot": Entry(few_shot, "known facts of the same relation before the question"),
    "no-template": Entry(no_template, "the bare question without the chat template"),
    "plain-form": Entry(plain_form, '"Q: ... A:" in place of the chat template'),
    "system-prompt": Entry(system_prompt, "the system prompt asks the model not to refuse"),
    "french": Entry(french, "the question in French"),
    "german": Entry(german, "the question in German"),
    "spanish": Entry(spanish, "the question in Spanish"),
    "language": Entry(any_language, "the question in every language of the data file, any of them"),
    "sampling": Entry(sampling, "several answers sampled at temperature 1, any of them"),
    "int8": Entry(int8, "weights rounded to 8 bits"),
    "int4": Entry(int4, "weights rounded to 4 bits"),
    "relearn-forgotten": Entry(relearn_forgotten, "trained on some forgotten facts, asked for the others", True),
    "relearn-unrelated": Entry(relearn_unrelated, "trained on unrelated facts", True),
    "logit-lens": Entry(logit_lens, "the answer's first token among the likeliest in any layer's reading"),
    "logit-lens-lead": Entry(logit_lens_lead, f'the same, read after "{READ_AFTER}"'),
}


def choose(names: Sequence[str] | None = None) -> list[str]:
    """Lists the attacks of these names, or all, in the order of the registry.

    Raises:
        AttackError: an unknown name, no name, or `peft` missing for one that needs it.
    """
    wanted = list(ATTACKS) if names is None else [name.strip() for name in names if name.strip()]
    for name in wanted:
        if name not in ATTACKS:
            hint = did_you_mean(name, ATTACKS)
            raise AttackError(f"attack {name!r} does not exist{hint}; expected some of {', '.join(ATTACKS)}")
    if not wanted:
        raise AttackError(
            f"no attack was named; expected some of {', '.join(ATTACKS)}, or leave the option out for all"
        )
    lacking = [name for name in wanted if ATTACKS[name].needs_peft]
    if lacking and peft_missing():
        raise AttackError(f"{lacking[0]} needs the package peft: {install_line('lora')}, or name other attacks")
    return [name for name in ATTACKS if name in wanted]
