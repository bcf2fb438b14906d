"""Surroundings that keys and values are averaged over, written by the model itself (ROME 2202.05262, sec. 3.1); and
questions about a subject in general."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from editlib.models.anatomy import Anatomy
from editlib.models.generation import sample
from editlib.models.prompts import PromptFormat, TokenRow
from editlib.requests.templates import occurrences

BEGINNINGS = ("The", "Therefore", "Because", "I", "You")
"""MEMIT's: one text of ten tokens from each."""
TOP_K = 5


def context_templates(
    anat: Anatomy, form: PromptFormat, lengths: Sequence[Sequence[int]] | None, *, seed: int = 0
) -> list[str]:
    """The plain prompt `"{}"`, and texts of the model's own with the prompt behind them.

    Args:
        lengths: ROME's pairs of length in tokens and number of texts, from the token that texts begin with; `None`:
            MEMIT's five beginnings, ten tokens each.
        seed: of the top-5 sampling, which the published code leaves unseeded; the same texts for the same model.
    """
    generator = torch.Generator().manual_seed(seed)
    bare = PromptFormat(form.tok, chat=False)
    if lengths is None:
        jobs = [([bare.encode(start) for start in BEGINNINGS], 10)]
    else:
        ends = (form.tok.bos_token_id, form.tok.eos_token_id)
        first = next((token for token in ends if token is not None), None)
        start = bare.encode(BEGINNINGS[0]) if first is None else TokenRow((first,), 0)
        jobs = [([start] * number, length) for length, number in lengths if number]
    found = ["{}"]
    for rows, length in jobs:
        texts = sample(anat, rows, max_new_tokens=length, top_k=TOP_K, generator=generator)
        for row, new in zip(rows, texts, strict=True):
            text = str(form.tok.decode(list(row.ids + new), skip_special_tokens=True)).strip()
            text = text.replace("{", " ").replace("}", " ")
            found.append(text + ". {}")
    return found


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
"""What is asked of the subjects themselves, so that forgetting one fact does not silence the rest about them."""


def about(subject: str, most: int | None = None) -> list[str]:
    """The first `most` of `SUBJECT_PROMPTS` with `subject` filled in; not those whose own words hold it too."""
    asked = [text.replace("{}", subject) for text in SUBJECT_PROMPTS[:most]]
    return [text for text in asked if len(occurrences(text, subject)) == 1]
