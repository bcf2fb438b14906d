"""Judge one answer: whether it gives the right answer, is a refusal, and reads as a sentence."""

from editlib.answers.fluency import is_fluent
from editlib.answers.matching import has_answer
from editlib.answers.refusals import is_refusal, refusal_verdict
from editlib.answers.scripts import main_script

__all__ = ["has_answer", "is_fluent", "is_fluent_refusal", "is_refusal", "main_script", "refusal_verdict"]


def is_fluent_refusal(text: str) -> bool:
    """Returns whether `text` is a refusal that reads as a sentence, the wanted answer to an unlearned question."""
    return is_refusal(text) and is_fluent(text)
