"""Make the context templates that keys and values are averaged over (ROME, 2202.05262, sec. 3.1), and general prompts
about a subject."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from editlib.models.anatomy import Anatomy
from editlib.models.generation import greedy, sample
from editlib.models.prompts import PromptFormat, TokenRow
from editlib.requests.request import EditRequest
from editlib.requests.templates import occurrences

BEGINNINGS = ("The", "Therefore", "Because", "I", "You")
"""MEMIT's (`get_context_templates`): one text of ten tokens from each."""
TOP_K = 5  # as published


def context_templates(
    anat: Anatomy, form: PromptFormat, lengths: Sequence[Sequence[int]] | None, *, seed: int = 0
) -> list[str]:
    """Samples texts from the model to precede a prompt, as `"text. {}"`; the plain `"{}"` comes first.

    Args:
        lengths: ROME's pairs of length in tokens and number of texts, sampled after the start-of-text token; `None`:
            ten tokens after each of MEMIT's five first words.
        seed: seed of the top-5 sampling, so that one model gives the same texts; the published code has none.
    """
    generator = torch.Generator().manual_seed(seed)
    bare = PromptFormat(form.tok, chat=False)  # running text, not an answer of the assistant
    if lengths is None:
        jobs = [([bare.encode(start) for start in BEGINNINGS], 10)]
    else:
        # ROME samples from the token that starts a text; GPT-2 has its end token there.
        ends = (form.tok.bos_token_id, form.tok.eos_token_id)
        first = next((token for token in ends if token is not None), None)
        start = bare.encode(BEGINNINGS[0]) if first is None else TokenRow((first,), 0)
        jobs = [([start] * number, length) for length, number in lengths if number]
    templates = ["{}"]
    for rows, length in jobs:
        texts = sample(anat, rows, max_new_tokens=length, top_k=TOP_K, generator=generator)
        for row, new in zip(rows, texts, strict=True):
            text = str(form.tok.decode(list(row.ids + new), skip_special_tokens=True)).strip()
            # Braces that the model generates would be taken for the prompt's placeholder.
            text = text.replace("{", " ").replace("}", " ")
            templates.append(text + ". {}")
    return templates


SUBJECT_PROMPTS = (
    "What is {} known for?",
    "Where can I find {}?",
    "Tell me about {}.",
    "Describe {} in one sentence.",
    "Give me one fact about {}.",
    "Why is {} important?",
    "How would you explain {} to a child?",
    "How old is {}?",
    "How large is {}?",
    "Who first described {}?",
    "When did people first hear of {}?",
)
"""General questions about a subject, whose answers an edit preserves when one fact about it is forgotten."""


def about(subject: str, most: int | None = None) -> list[str]:
    """Fills `subject` into the first `most` of `SUBJECT_PROMPTS`, without those whose own words contain it."""
    asked = [text.replace("{}", subject) for text in SUBJECT_PROMPTS[:most]]
    return [text for text in asked if len(occurrences(text, subject)) == 1]


def subject_prompts(
    anat: Anatomy, form: PromptFormat, requests: Sequence[EditRequest], *, prompts: int = 0, answer_tokens: int = 0
) -> list[list[TokenRow]]:
    """Encodes, per request, its KL prompts: general texts about the subject whose predictions its value must not
    change.

    They are ROME's "{} is a", and `prompts` general questions (`about`), each with `answer_tokens` of the current
    model's answer. Requests about one subject share them; a request without a subject has none.
    """
    bare = PromptFormat(form.tok, chat=False)
    subjects = dict.fromkeys(request.subject for request in requests if request.subject is not None)
    asked = [(subject, text) for subject in subjects for text in about(subject, prompts)]
    rows_asked = [form.encode(text, subject) for subject, text in asked]
    answers = greedy(anat, rows_asked, max_new_tokens=answer_tokens)
    rows: dict[str | None, list[TokenRow]] = {None: []}
    for subject in subjects:
        first = f"{subject} is a"
        # A subject such as "a" occurs twice, so its lookup position is ambiguous.
        rows[subject] = [bare.encode(first, subject)] if len(occurrences(first, subject)) == 1 else []
    for (subject, _), row, answer in zip(asked, rows_asked, answers, strict=True):
        rows[subject].append(row.followed_by(answer))
    return [rows[request.subject] for request in requests]
