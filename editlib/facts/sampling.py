"""Split the bundled facts: some that the model knows are forgotten, the others are anchors or held-out retain facts."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from editlib import data
from editlib.errors import RequestError
from editlib.evaluation.answer_cache import AnswerCache, ask
from editlib.evaluation.metrics import has_answer
from editlib.models.prompts import PromptFormat
from editlib.models.thinking import answer_texts
from editlib.requests.request import EditRequest
from editlib.workbench import Workbench

# Default relations of the facts to forget; other relations that are anchored; relations that never are.
RELATIONS = ("capital", "symbol", "city_country", "language", "author", "landmark_country")
ANCHORED = ("currency", "opposite", "state_capital")
HELD_OUT = ("continent", "atomic_number")


@dataclass(frozen=True)
class SplitSpec:
    """Sets the sizes of the parts into which bundled facts and prompts are split.

    `forget` facts per relation; the model is first asked about `candidates` per relation (default: all).
    `anchor_relations` are other relations that are anchored, for the forgotten subjects and `extra_anchors` others;
    `held_out_relations` never are.
    """

    forget: Mapping[str, int]
    candidates: Mapping[str, int] = field(default_factory=dict)
    anchor_relations: Sequence[str] = ()
    extra_anchors: int = 50
    held_out_relations: Sequence[str] = ()
    general_anchors: int = 40
    general_questions: int = 30
    general_instructions: int = 20


@dataclass(frozen=True)
class FactSplit:
    """Holds bundled facts and prompts, split by their part."""

    forget: list[EditRequest]
    anchors: list[EditRequest]
    held_out: list[EditRequest]

    def by_file(self) -> dict[str, list[EditRequest]]:
        """Returns the parts by the names of their files, without the ending."""
        return {"forget": self.forget, "anchors": self.anchors, "watch": self.held_out}


def split_facts(bench: Workbench, before: AnswerCache, spec: SplitSpec, seed: int) -> FactSplit:
    """Asks the model all facts and splits them; the answers are added to `before`.

    Of each relation in `spec.forget` the given number of known facts is forgotten. The other known ones are held-out
    neighbours and anchors in turn. Facts that the model gets wrong are anchors too: their answers must not change
    either.
    """
    rng = random.Random(seed)
    by_relation: dict[str, list[EditRequest]] = {}
    for fact in data.facts():
        by_relation.setdefault(fact.relation or "", []).append(fact)
    for relation in spec.forget:
        rng.shuffle(by_relation[relation])
        del by_relation[relation][spec.candidates.get(relation, len(by_relation[relation])) :]
    _ask(bench, before, [fact for relation in spec.forget for fact in by_relation[relation]])
    forget, anchors, held_out = [], [], []
    for relation, number in spec.forget.items():
        known = [fact for fact in by_relation[relation] if knows(bench, before, fact)]
        rng.shuffle(known)
        forget += known[:number]
        held_out += known[number::2]
        anchors += known[number + 1 :: 2]
        anchors += [fact for fact in by_relation[relation] if not knows(bench, before, fact)]
    subjects = {fact.group for fact in forget}
    for relation in spec.anchor_relations:
        facts = [fact for fact in by_relation[relation] if fact.group not in subjects]
        rng.shuffle(facts)
        anchors += [fact for fact in by_relation[relation] if fact.group in subjects] + facts[: spec.extra_anchors]
    held_out += [
        fact for relation in spec.held_out_relations for fact in by_relation[relation] if fact.group in subjects
    ]
    tests, prompts = data.general("test"), data.general("anchor")
    rng.shuffle(tests)
    rng.shuffle(prompts)
    anchors += prompts[: spec.general_anchors]
    held_out += [prompt for prompt in tests if prompt.answer is not None][: spec.general_questions]
    held_out += [prompt for prompt in tests if prompt.answer is None][: spec.general_instructions]
    _ask(bench, before, held_out)
    return FactSplit(forget, anchors, held_out)


def split_in_proportion(
    bench: Workbench, before: AnswerCache, total: int, seed: int, relations: Sequence[str] = RELATIONS
) -> FactSplit:
    """Picks `total` facts to forget out of `relations`, each in proportion to its number of facts that the model knows.

    Raises:
        RequestError: the model knows less than twice as many, so that too few remain as a held-out retain set.
    """
    facts = [fact for fact in data.facts() if fact.relation in relations]
    _ask(bench, before, facts)
    known = {r: sum(fact.relation == r and knows(bench, before, fact) for fact in facts) for r in relations}
    if sum(known.values()) < 2 * total:
        raise RequestError(
            f"{bench.name} knows {sum(known.values())} of the {len(facts)} facts of these relations; expected twice as "
            f"many as are to be forgotten ({total}), so that others remain to be held out; forget fewer"
        )
    spec = SplitSpec(forget=allot(total, known), anchor_relations=ANCHORED, held_out_relations=HELD_OUT)
    return split_facts(bench, before, spec, seed)


def allot(total: int, known: Mapping[str, int]) -> dict[str, int]:
    """Distributes `total` in proportion to `known`, each at most its own number, by largest remainders."""
    every = sum(known.values())
    exact = {name: total * count / every for name, count in known.items()}
    shares = {name: int(share) for name, share in exact.items()}
    by_rest = sorted(known, key=lambda name: (shares[name] - exact[name], name))
    for name in by_rest[: total - sum(shares.values())]:
        shares[name] += 1
    return {name: count for name, count in shares.items() if count}


def knows(bench: Workbench, before: AnswerCache, fact: EditRequest) -> bool:
    """Returns whether the model's answer in `before` contains the right one."""
    form = PromptFormat.of(bench.tok, bench.prompts)
    text = answer_texts(form, [before.answers[fact.question]], warn=False)[0]
    return has_answer(text, (fact.answer or "", *fact.aliases))


def _ask(bench: Workbench, before: AnswerCache, facts: Sequence[EditRequest]) -> None:
    questions = [fact.question for fact in facts if fact.question not in before.answers]
    before.answers.update(
        ask(bench.anat, bench.tok, questions, how=bench.prompts, progress="asking" if bench.progress else None)
    )
