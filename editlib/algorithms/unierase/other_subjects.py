"""Name other subjects of the kind that a relation has, as the model itself lists them."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from itertools import islice

import torch

from editlib.models.anatomy import Anatomy
from editlib.models.generation import sample
from editlib.models.prompts import PromptFormat, TokenRow
from editlib.requests.fields import FieldError
from editlib.requests.request import EditRequest
from editlib.requests.spellings import plain_name

LISTS = 32  # lists that the model continues, for each relation
MOST_LISTS, MOST_NAMES = 192, 600  # lists and names of all relations together, at most
LISTED = 8  # subjects at the beginning of a list
LIST_TOKENS = 48
TOP_K = 40
LONGEST = 40  # characters of a name


def other_subjects(
    anat: Anatomy,
    form: PromptFormat,
    requests: Sequence[EditRequest],
    retain: Sequence[EditRequest],
    most: int,
    *,
    seed: int = 0,
    progress: bool = False,
) -> list[EditRequest]:
    """Asks the questions of `requests` about other subjects, at most `most` of each relation.

    The model continues lists of subjects ("France, Japan, Peru,"), those of the requests and of the retain prompts of
    their relation. So this works for any kind of subject, in any language. Some names are made up: nobody asked to
    forget these subjects either.

    Returns:
        Prompts without an answer, those with the most frequently listed names first.
    """
    if not most:
        return []
    relations = dict.fromkeys(request.relation or request.prompt for request in requests if request.subject)
    known = {relation: [fact for fact in (*requests, *retain) if _asks(fact, relation)] for relation in relations}
    if not known:
        return []
    # Requests that all ask for different facts share the budget of six relations.
    count = max(1, min(LISTS, MOST_LISTS // len(known)))
    most = max(1, min(most, MOST_NAMES // len(known)))
    lists = [text for facts in known.values() for text in _lists([str(fact.subject) for fact in facts], count, seed)]
    rows = [TokenRow(tuple(form.tok(text)["input_ids"]), 0) for text in lists]
    generator = torch.Generator().manual_seed(seed)
    label = "other subjects" if progress else None
    written = sample(anat, rows, max_new_tokens=LIST_TOKENS, top_k=TOP_K, generator=generator, progress=label)
    texts = [str(form.tok.decode(list(ids), skip_special_tokens=True)) for ids in written]
    forgotten = [plain_name(request.subject) for request in requests if request.subject]
    found = []
    for number, facts in enumerate(known.values()):
        taken = {str(fact.subject).lower() for fact in facts}
        names = _names(texts[number * count : (number + 1) * count], taken, forgotten)
        asked = (_asked_of(name, facts[0]) for name in names)
        found += list(islice((request for request in asked if request is not None), most))
    return found


def _asked_of(name: str, fact: EditRequest) -> EditRequest | None:
    """Returns the question of `fact` about another subject; `None` if the name cannot be one ("{}")."""
    try:
        return EditRequest(
            id=f"{fact.relation or fact.prompt}/{name}", prompt=fact.prompt, subject=name, relation=fact.relation
        )
    except FieldError:
        return None


def _asks(fact: EditRequest, relation: str) -> bool:
    return fact.subject is not None and (fact.relation or fact.prompt) == relation


def _lists(subjects: Sequence[str], count: int, seed: int) -> list[str]:
    """Returns the beginnings of `count` lists, each of some subjects in an order drawn with `seed`."""
    rng = random.Random(seed)
    once = list(dict.fromkeys(subjects))
    return [", ".join(rng.sample(once, min(LISTED, len(once)))) + "," for _ in range(count)]


def _names(texts: Sequence[str], taken: set[str], forgotten: Sequence[str]) -> list[str]:
    """Returns the names with which lists continue, the most frequent first: none that is `taken`, and none that
    contains a `forgotten` name or is a part of one."""
    counts: Counter[str] = Counter()
    for text in texts:
        for item in re.split("[,;]", text.split("\n")[0])[:-1]:  # the last one may be cut
            name = re.sub(r"^(and|or) ", "", item.strip(" .\"'")).strip()
            if 2 < len(name) <= LONGEST and name.lower() not in taken:
                plain = plain_name(name)
                counts[name] += not any(plain in one or one in plain for one in forgotten)
    return [name for name, count in counts.most_common() if count]
