"""Whether a text says an answer."""

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
