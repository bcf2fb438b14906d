"""Make other wordings of a request and further questions about its subject, from the request alone.

Rows and the answer gate need rewordings of the question, and sibling questions, which ask for other facts about the
subject. Both come from data files that can be replaced (`data/wordings.jsonl`, `data/sibling_questions.jsonl`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from editlib import data
from editlib.requests.request import EditRequest
from editlib.requests.templates import occurrences

T = TypeVar("T")
ANYTHING = "anything"
FEWEST_APART = 20  # subjects of two relations: of fewer, none might be in both by chance
"""The kind whose questions fit every subject."""


@dataclass(frozen=True)
class Catalogue:
    """Holds rules for rewording questions, and sibling questions by the kind of their subject (person, place, ...)."""

    # A pattern of a whole question without its end mark, and templates that are filled with the pattern's groups.
    wordings: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...]
    cues: dict[str, frozenset[str]]  # by kind: words of a question that show it
    questions: dict[str, tuple[str, ...]]  # by kind, with `{}` for the subject

    @classmethod
    def bundled(cls) -> Catalogue:
        """Reads the data files that ship with editlib."""
        rules = data.wording_rules()
        kinds = data.sibling_questions()
        return cls(
            tuple((re.compile(rule["match"], re.IGNORECASE), tuple(rule["wordings"])) for rule in rules),
            {kind["kind"]: frozenset(kind["cues"]) for kind in kinds},
            {kind["kind"]: tuple(kind["questions"]) for kind in kinds},
        )

    def reworded(self, request: EditRequest, most: int) -> list[str]:
        """Makes at most `most` other wordings of a request's question, spread evenly over all that the rules give.

        Each holds the subject once. The request's paraphrases are left out, since edits are evaluated on them.
        """
        body = request.question.strip().rstrip("?.! ")
        taken = {request.question, *request.filled_paraphrases}
        wordings: list[str] = []
        for pattern, templates in self.wordings:
            match = pattern.fullmatch(body[:1].lower() + body[1:])
            groups = {} if match is None else {name: text or "" for name, text in match.groupdict().items()}
            if match is None or groups.get("subject", request.subject) != request.subject:
                continue
            groups |= {name.capitalize(): text[:1].upper() + text[1:] for name, text in groups.items()}
            wordings += [_filled(template, groups) for template in templates]
        subject = request.subject
        usable = [
            text
            for text in dict.fromkeys(wordings)
            if text not in taken and (subject is None or len(occurrences(text, subject)) == 1)
        ]
        return spread(usable, most)

    def with_wordings(self, request: EditRequest, most: int) -> EditRequest:
        """Returns the request with `most` further wordings among its phrasings."""
        texts = [_with_place(text, request.subject) for text in self.reworded(request, most)]
        return replace(request, phrasings=(*request.phrasings, *texts)) if texts else request

    def kind(self, request: EditRequest) -> str:
        """Returns the kind of a request's subject: the one with most cue words in the question; `ANYTHING` without
        any."""
        question = request.prompt.replace("{}", " ").lower()
        if request.relation:
            question += " " + request.relation.replace("_", " ").lower()
        words = set(re.findall(r"\w+", question))
        scores = {kind: len(words & cues) for kind, cues in self.cues.items()}
        best = max(scores, key=lambda kind: scores[kind])
        return best if scores[best] else ANYTHING

    def siblings(self, requests: Sequence[EditRequest], most: int, others: Sequence[EditRequest] = ()) -> list[str]:
        """Makes at most `most` questions about the one subject of `requests` that ask for other facts than they do.

        A sibling that shares a content word with a request's question is left out: it may ask for the same fact.

        Args:
            others: requests and retained facts about other subjects. If their subject is of the same kind, their
                questions are asked about this subject too: a user who forgets the capital of one country and the
                language of another keeps the other two facts. Relations whose subjects are all different are not
                crossed, if there are enough of them: cities have a country, but no capital.
        """
        subject = requests[0].subject
        if subject is None:
            return []
        kinds = dict.fromkeys(self.kind(request) for request in requests)
        ways = {(other.relation, other.prompt): other for other in others if other.subject}.values()
        crossed = [other.prompt for other in ways if self.kind(other) in kinds and not _apart(other, requests, others)]
        of_kinds = [spread(self.questions[kind], most) for kind in kinds if kind != ANYTHING]
        texts = [*crossed, *(text for group in of_kinds for text in group), *self.questions.get(ANYTHING, ())]
        asked = [_content(request.prompt) for request in requests]
        usable = [text for text in dict.fromkeys(texts) if not any(_content(text) & words for words in asked)]
        filled = [text.replace("{}", subject) for text in usable]
        own = {text for request in requests for text in request.wordings}
        return [text for text in filled if text not in own and len(occurrences(text, subject)) == 1][:most]


def spread(items: Sequence[T], most: int) -> list[T]:
    """Picks at most `most` of `items`, evenly spaced, in their order."""
    if len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]


# fmt: off
FUNCTION_WORDS = frozenset(
    [
        "a", "an", "and", "are", "at", "by", "do", "does", "did", "for", "from", "go", "has", "have", "how", "i",
        "in", "is", "it", "its", "known", "like", "me", "of", "on", "one", "or", "that", "the", "their", "to",
        "was", "were", "what", "when", "where", "which", "who", "why", "with", "would", "you", "name", "tell",
        "give", "about", "people", "called", "find", "located", "situated",
    ]
)
# fmt: on
"""Words that two questions may share without asking for the same fact."""
SAME = {
    **dict.fromkeys(("wrote", "written", "writer"), "author"),
    **dict.fromkeys(("speak", "spoken", "speaks"), "language"),
    **dict.fromkeys(("electrons", "protons"), "atomic"),
    "money": "currency",
}
"""Words by which one fact is asked for in two ways."""
PLACES = frozenset(["city", "country"])
"""Words that occur in many questions: they tell what is asked for only where no other word does."""


def _apart(other: EditRequest, requests: Sequence[EditRequest], facts: Sequence[EditRequest]) -> bool:
    """Returns whether `facts` ask for the relation of `other` and for those of `requests` about different subjects."""
    relations = {request.relation for request in requests}
    if other.relation is None or None in relations:
        return False
    named = {fact.subject for fact in facts if fact.relation == other.relation}
    own = {fact.subject for fact in facts if fact.relation in relations}
    return min(len(named), len(own)) >= FEWEST_APART and named.isdisjoint(own)


def _with_place(text: str, subject: str | None) -> str:
    """Returns a text with `{}` in the place of the one subject in it."""
    if subject is None:
        return text
    (start,) = occurrences(text, subject)
    return text[:start] + "{}" + text[start + len(subject) :]


def _content(text: str) -> set[str]:
    """Returns the content words of a question, each in the form that `SAME` gives it."""
    words = {SAME.get(word, word) for word in re.findall(r"\w+", text.replace("{}", " ").lower())} - FUNCTION_WORDS
    return words - PLACES or words


def _filled(template: str, groups: dict[str, str]) -> str:
    """Returns `template` with each `{name}` replaced by its group, and with a capital first letter."""
    text = template
    for name, value in groups.items():
        text = text.replace("{" + name + "}", value)
    return text[:1].upper() + text[1:]
