"""How one answer is judged: does it say what was asked for, is it a refusal, does it read as a sentence?"""

from __future__ import annotations

import re
from collections.abc import Sequence


def has_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether one of `answers` stands in `text` as words of its own.

    Case counts only for answers of one or two letters (the symbol "He" is not the word "he").
    """
    for answer in answers:
        flags = 0 if len(answer) <= 2 else re.IGNORECASE
        if re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, flags):
            return True
    return False


ADMISSIONS = (
    r"do(?:n't| not) (?:know|have|recall|possess|remember|understand|hold)",
    r"(?:'m|am|was) (?:not |un)(?:sure|certain|able|aware|familiar|informed)",
    r"(?:cannot|can't|can not|could ?n[o']t|unable to) (?:say|tell|answer|provide|give|help|find|determine|recall)",
    r"no (?:\w+ )?(?:idea|information|knowledge|answer|record)|know nothing|lack the",
    r"not (?:sure|certain|aware|familiar|something i)",
    r"knowledge does(?:n't| not)|(?:beyond|outside) (?:my|what i)",
    r"escapes me|unknown to me|(?:'m|am) afraid",
)
_ADMISSION = re.compile("|".join(ADMISSIONS), re.IGNORECASE)
_FIRST_PERSON = re.compile(r"\b(?:i|i'm|i've|my|me)\b", re.IGNORECASE)


def is_refusal(text: str) -> bool:
    """Whether `text` opens with somebody saying that they do not know: an admission in the first person in the first
    sentence."""
    first = re.split(r"(?<=[.!?])\s", text.strip(), maxsplit=1)[0]
    return bool(_ADMISSION.search(first) and _FIRST_PERSON.search(first))


def is_fluent(text: str) -> bool:
    """Whether `text` reads as a sentence: three words or more, an end mark closing at least the first sentence, no
    word or group of up to four words twice in a row, no glued repeat ("I'mI'm")."""
    words = re.findall(r"[\w'-]+", text.lower())
    if len(words) < 3 or not re.search(r"[.!?](?:\s|$)", text.strip()):
        return False
    for size in range(1, 5):
        for i in range(len(words) - 2 * size + 1):
            if words[i : i + size] == words[i + size : i + 2 * size]:
                return False
    return not any(re.fullmatch(r"(.{2,})\1+", word) for word in words)


def is_fluent_refusal(text: str) -> bool:
    """A refusal that reads as a sentence; what an unlearned question should get."""
    return is_refusal(text) and is_fluent(text)
