"""Questions behind examples: other facts, asked and answered in front of a request's question.

Behind examples a model answers with the bare name, and with other states at the subject. What is erased where a
question stands alone may come back there, so rows and keys read both.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from editlib.models.prompts import PromptFormat
from editlib.requests.request import EditRequest

EXAMPLES = 3  # in front of a question
FEWEST = 2
LONGEST = 25  # characters of an example's answer, so that it is a name and no sentence


def behind_examples(
    form: PromptFormat, request: EditRequest, retain: Sequence[EditRequest], seed: int = 0
) -> PromptFormat | None:
    """Returns the format in which examples stand in front of the question of `request`; `None`: there are too few.

    The examples are drawn from the facts of `retain` that ask for something else, so that how a list of the request's
    own relation is answered is not learned. They name neither its subject nor its answer.
    """
    named = [text.lower() for text in (request.subject, request.answer) if text]
    usable = [
        (fact.question, fact.answer)
        for fact in retain
        if fact.answer is not None
        and fact.subject is not None
        and len(fact.answer) <= LONGEST
        and (fact.relation is None or fact.relation != request.relation)
        and not any(name in f"{fact.question} {fact.answer}".lower() for name in named)
    ]
    if len(usable) < FEWEST:
        return None
    shots = random.Random(f"{seed} {request.id}").sample(usable, min(EXAMPLES, len(usable)))
    return replace(form, shots=tuple(shots))
