"""Ask a model about facts in batches and judge the answers; shared by all attacks."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from editlib import data
from editlib.attacks.outcome import AttackOutcome, Completion, Trial
from editlib.attacks.settings import AttackSettings
from editlib.evaluation.metrics import has_answer
from editlib.models.generation import greedy
from editlib.models.loaded import LoadedModel
from editlib.models.prompts import PromptFormat, TokenRow
from editlib.models.thinking import answer_after, warn_of_unfinished
from editlib.requests.request import EditRequest

ASKED_A_RELATION = 16  # candidates for few-shot examples that the model is asked


@dataclass(frozen=True)
class AttackContext:
    """Holds the attacker's resources: the forgotten facts, facts for few-shot examples or training, the model before
    the edit.

    `known` are facts for few-shot examples, `unrelated` ones for fine-tuning; none of them is forgotten. `answered`
    caches greedy answers that several attacks use, see `ask_greedily`.
    """

    base: LoadedModel
    requests: Sequence[EditRequest]
    known: Sequence[EditRequest] = ()
    unrelated: Sequence[EditRequest] = ()
    settings: AttackSettings = field(default_factory=AttackSettings)
    seed: int = 0
    answered: dict[Hashable, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def shots(self) -> Mapping[str, Sequence[EditRequest]]:
        """For each relation of the requests: facts that the base model answers correctly and that are not forgotten."""
        rng = random.Random(self.seed)
        by_relation: dict[str, list[EditRequest]] = {}
        wanted = {request.relation for request in self.requests}
        for fact in data.without_overlap(self.known, self.requests):
            if fact.relation in wanted and fact.relation is not None and fact.answer is not None:
                by_relation.setdefault(fact.relation, []).append(fact)
        for facts in by_relation.values():
            rng.shuffle(facts)
            del facts[ASKED_A_RELATION:]
        asked = [fact for facts in by_relation.values() for fact in facts]
        right = {fact.id for fact, known in zip(asked, knows(self.base, asked, self), strict=True) if known}
        return {relation: [fact for fact in facts if fact.id in right] for relation, facts in by_relation.items()}


Attack = Callable[[LoadedModel, Sequence[EditRequest], AttackContext], AttackOutcome]
"""Tries to recover every fact from a model; returns one trial per fact, in order."""


def right_answers(fact: EditRequest) -> tuple[str, ...]:
    """Lists the answer and its aliases."""
    return () if fact.answer is None else (fact.answer, *fact.aliases)


def not_asked(fact: EditRequest, reason: str) -> Trial:
    """Makes the trial of a fact to which an attack does not apply; it does not count."""
    return Trial(fact.id, fact.question, right_answers(fact), skipped=reason)


AttackPrompt = Sequence[TokenRow] | str
"""The prompts of one fact, or the reason why there are none. Appended tokens (`extra`) begin the model's answer."""
Answering = Callable[[Sequence[TokenRow]], Sequence[Sequence[Sequence[int]]]]
"""Maps prompts to the token ids of one or more generated texts each."""


def trials(
    target: LoadedModel,
    facts: Sequence[EditRequest],
    prompts: Sequence[AttackPrompt],
    answer: Answering,
    *,
    cut: str | None = None,
    endings: int = 0,
) -> tuple[Trial, ...]:
    """Asks all prompts in one batch and judges the texts without their think blocks; an answer ends at the first `cut`;
    `endings` as in `has_answer`."""
    rows = [row for asked in prompts if not isinstance(asked, str) for row in asked]
    said = iter(answer(rows) if rows else ())
    made, unfinished = [], []
    for fact, asked in zip(facts, prompts, strict=True):
        answers = right_answers(fact)
        if isinstance(asked, str):
            made.append(not_asked(fact, asked))
            continue
        outputs = []
        for row in asked:
            prompt, asks = target.prompt_text(row.ids), len(row) - row.extra
            for ids in next(said):
                text, inside = answer_after(target.tok, row.ids[:asks], (*row.ids[asks:], *ids))
                unfinished.append(inside)
                text = text if cut is None else text.partition(cut)[0].strip()
                outputs.append(Completion(prompt, text, has_answer(text, answers, endings=endings)))
        made.append(Trial(fact.id, fact.question, answers, tuple(outputs)))
    warn_of_unfinished(sum(unfinished), len(unfinished))
    return tuple(made)


def ask_greedily(
    target: LoadedModel,
    facts: Sequence[EditRequest],
    prompts: Sequence[AttackPrompt],
    context: AttackContext,
    *,
    banned: Collection[int] = (),
    cut: str | None = None,
    once: bool = False,
) -> AttackOutcome:
    """Runs `trials` with greedy answers of `settings.max_new_tokens` tokens at most, without the tokens `banned`.

    Args:
        once: the weights are unchanged since loading, so that cached answers of this context are valid. An attack that
            changes weights leaves it false.
    """

    def answer(rows: Sequence[TokenRow]) -> list[list[tuple[int, ...]]]:
        if once:
            return [[ids] for ids in answers_once(target, rows, context, banned)]
        return [[ids] for ids in greedy(target.anat, rows, max_new_tokens=limit, banned=banned)]

    limit = context.settings.max_new_tokens
    return AttackOutcome(trials(target, facts, prompts, answer, cut=cut, endings=context.settings.endings))


def answers_once(
    target: LoadedModel, rows: Sequence[TokenRow], context: AttackContext, banned: Collection[int] = ()
) -> list[tuple[int, ...]]:
    """Returns greedy answers to `rows`; answers of this model in the context's cache are not generated again."""
    keys = [(id(target.anat.model), tuple(sorted(banned)), row.ids) for row in rows]
    missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in context.answered}
    limit = context.settings.max_new_tokens
    said = greedy(target.anat, list(missing.values()), max_new_tokens=limit, banned=banned)
    context.answered.update(zip(missing, said, strict=True))
    return [context.answered[key] for key in keys]


def ask_each(
    target: LoadedModel,
    facts: Sequence[EditRequest],
    context: AttackContext,
    form: PromptFormat | None = None,
    *,
    once: bool = False,
) -> AttackOutcome:
    """Asks every fact's own question, greedily, through `form` (default: the model's own prompt format)."""
    form = form or target.form
    return ask_greedily(target, facts, [[form.encode(fact.question)] for fact in facts], context, once=once)


def direct(target: LoadedModel, facts: Sequence[EditRequest], context: AttackContext) -> AttackOutcome:
    """Asks every fact's own question; several attacks begin with its answer."""
    return ask_each(target, facts, context, once=True)


def knows(target: LoadedModel, facts: Sequence[EditRequest], context: AttackContext) -> list[bool]:
    """Returns for each of `facts` whether the greedy answer to its plain question is right."""
    return [trial.leaked for trial in direct(target, facts, context).trials]
