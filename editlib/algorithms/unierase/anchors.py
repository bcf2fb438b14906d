"""Choose and encode anchors: prompts whose answers must stay, so that an update must map their keys to zero."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from editlib import data
from editlib.algorithms.contexts import about
from editlib.algorithms.unierase.proportion import FEWEST_ANCHORS, share_of
from editlib.answers import has_answer
from editlib.models.anatomy import Anatomy
from editlib.models.forward import shared_length
from editlib.models.generation import greedy
from editlib.models.prompts import PromptFormat, TokenRow
from editlib.models.thinking import answer_texts
from editlib.requests.request import EditRequest

ANSWER_TOKENS = 24  # most tokens of an answer whose keys are constraints


@dataclass(frozen=True)
class Anchors:
    """Holds encoded prompts with the model's answers, and from which position on their keys are constraints."""

    rows: tuple[TokenRow, ...]
    starts: tuple[int, ...] | None  # first position of each row that counts; `None`: its lookup position only
    ids: tuple[str, ...]  # of the retain prompts; general questions about the subjects, the last rows, have none
    relations: tuple[str | None, ...]  # what each row asks for
    known: tuple[bool, ...]  # whether the model's answer in the row is right


def choose_anchors(
    retain: Sequence[EditRequest], requests: Sequence[EditRequest], *, most: int | None, seed: int
) -> list[EditRequest]:
    """Chooses at most `most` retain prompts to anchor, none of which asks for a fact to be forgotten.

    When there are more, prompts of the requests' own relations, other relations of their subjects, and all the rest
    take turns, each kind in an order drawn with `seed`.
    """
    relations = {request.relation for request in requests} - {None}
    groups = {request.topic for request in requests} - {None}
    usable = data.without_overlap(retain, requests)
    if most is None or len(usable) <= most:
        return usable
    kinds: dict[int, list[EditRequest]] = {0: [], 1: [], 2: []}
    for prompt in usable:
        same_subject = prompt.topic in groups
        kinds[0 if prompt.relation in relations else 1 if same_subject else 2].append(prompt)
    rng = random.Random(seed)
    for kind in kinds.values():
        rng.shuffle(kind)
    turns = sorted(
        ((turn, kind, prompt) for kind, prompts in kinds.items() for turn, prompt in enumerate(prompts)),
        key=lambda entry: entry[:2],  # by turn, then by kind
    )
    return [prompt for _, _, prompt in turns[:most]]


def with_relations(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """Returns `requests` with relations filled in: those of bundled facts that ask in the same words."""
    relations = {fact.prompt: fact.relation for fact in data.facts()}
    return [replace(request, relation=request.relation or relations.get(request.prompt)) for request in requests]


def bundled_anchors(requests: Sequence[EditRequest], *, seed: int) -> list[EditRequest]:
    """Chooses bundled prompts to anchor where the user gives none, as many as the requests need.

    At most a third are general prompts; the others are the nearest facts.
    """
    usual = data.retain_prompts(requests)
    most = share_of(len(usual), len(requests), fewest=FEWEST_ANCHORS)
    if most >= len(usual):
        return usual
    general = [prompt for prompt in usual if prompt.subject is None]
    some = choose_anchors(general, requests, most=most // 3, seed=seed)
    facts = [prompt for prompt in usual if prompt.subject is not None]
    return choose_anchors(facts, requests, most=most - len(some), seed=seed) + some


def encode_anchors(
    anat: Anatomy,
    form: PromptFormat,
    prompts: Sequence[EditRequest],
    *,
    subjects: Sequence[str] = (),
    everywhere: bool = True,
    answer_tokens: int = ANSWER_TOKENS,
    known: Mapping[str, Sequence[int]] | None = None,
    progress: bool = False,
) -> Anchors:
    """Encodes `prompts`, each followed by the unedited model's answer.

    The first tokens that all rows share (a chat template's system message) are constraints once, not once per row.

    Args:
        subjects: asked `SUBJECT_PROMPTS` about, without an answer.
        everywhere: use the keys at every position of question and answer instead of the lookup position only.
        known: answers that the model is known to give, as token ids by question; the others are generated.
    """
    rows = [form.encode(prompt.question, prompt.subject, start=prompt.subject_start) for prompt in prompts]
    right = [False] * len(rows)
    if everywhere and rows:
        answers = answers_to(anat, form, prompts, most=answer_tokens, known=known, progress=progress)
        rows = [row.followed_by(answers[prompt.question]) for row, prompt in zip(rows, prompts, strict=True)]
        right = [_is_right(form, prompt, answers[prompt.question]) for prompt in prompts]
    rows += [form.encode(text, subject) for subject in subjects for text in about(subject)]
    ids = tuple(prompt.id for prompt in prompts)
    more = len(rows) - len(prompts)
    relations, known_rows = (*(prompt.relation for prompt in prompts), *[None] * more), (*right, *[False] * more)
    if not everywhere or not rows:
        return Anchors(tuple(rows), None, ids, relations, known_rows)
    # Only the first row starts at 0: every row has the same keys in the shared prefix, and would count them again.
    shared = shared_length(rows)
    return Anchors(tuple(rows), (0, *[shared] * (len(rows) - 1)), ids, relations, known_rows)


def _is_right(form: PromptFormat, prompt: EditRequest, answer: Sequence[int]) -> bool:
    """Returns whether the token ids `answer` hold the prompt's answer or one of its aliases."""
    said = answer_texts(form, [answer], warn=False)[0]
    return prompt.answer is not None and has_answer(said, (prompt.answer, *prompt.aliases))


def answers_to(
    anat: Anatomy,
    form: PromptFormat,
    prompts: Sequence[EditRequest],
    *,
    most: int = ANSWER_TOKENS,
    known: Mapping[str, Sequence[int]] | None = None,
    progress: bool = False,
) -> dict[str, Sequence[int]]:
    """Generates the model's answers to `prompts`, at most `most` token ids by question; `known` ones are reused."""
    known = known or {}
    found = {prompt.question: known[prompt.question] for prompt in prompts if prompt.question in known}
    asked = [prompt for prompt in prompts if prompt.question not in found]
    rows = [form.encode(prompt.question, prompt.subject, start=prompt.subject_start) for prompt in asked]
    new = greedy(anat, rows, max_new_tokens=most, progress="anchors" if progress and asked else None)
    found.update({prompt.question: answer for prompt, answer in zip(asked, new, strict=True)})
    return found
