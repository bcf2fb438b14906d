"""One JSON object of any known data set -> the arguments of `EditRequest`.

Each reader only moves fields; what they may hold is checked once, by `EditRequest`. Fields of foreign
formats that have no place here are passed over; an unknown field of the own format is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from editlib.errors import RequestError, closest, quote

Row = dict[str, Any]

OWN_FIELDS = ("id", "prompt", "subject", "target_new", "answer", "aliases", "phrasings", "paraphrases", "neighbours")
OWN_FIELDS += ("group", "relation")
FREE_FIELDS = ("kind", "split", "source", "note", "meta")
"""Fields of the own format that the reader passes over: room for the user's own remarks."""


class FieldError(RequestError):
    """A complaint about one field, under our name for it; `read_requests` puts in the file's name."""

    def __init__(self, name: str, text: str, where: str = "request") -> None:
        super().__init__(f"{where}: field {json.dumps(name)}: {text}")  # dumps: the message stays one line
        self.name, self.text = name, text


def unzip(row: Row) -> list[Row]:
    """EasyEdit's one object of parallel lists (`prompts: [...], subject: [...]`) as one row a prompt."""
    if not isinstance(row.get("prompts"), list):
        return [row]
    count = len(row["prompts"])

    def pick(name: str, value: Any, i: int) -> Any:
        if isinstance(value, dict):
            return {key: pick(name, inner, i) for key, inner in value.items()}
        if not isinstance(value, list):
            return value
        if len(value) != count:
            given = f"{len(value)} values for {count} prompts"
            raise FieldError(name, f"{given}; expected one for each prompt; mend the list")
        return value[i]

    names = row.keys() & {"id", "case_id", "prompts", *_NAMES[easyedit].values(), *_EASYEDIT_MARKS}
    return [{name: pick(name, row[name], i) for name in sorted(names)} for i in range(count)]


def format_of(row: Row) -> Callable[[Row], Row]:
    """The reader for an object, found out by its fields."""
    if "requested_rewrite" in row or isinstance(row.get("target_new"), dict):
        return counterfact
    if "src" in row:
        return zsre
    if not _EASYEDIT_MARKS.isdisjoint(row):
        return easyedit
    if "target" in row and row.keys() <= {"prompt", "subject", "target", "queries"}:
        return fastedit
    return tofu if "question" in row and "prompt" not in row else own


def name_in(reader: Callable[[Row], Row], name: str) -> str:
    """What a format calls our field: `paraphrases[0]` -> `queries[0]`."""
    ours, bracket, rest = name.partition("[")
    return _NAMES.get(reader, {}).get(ours, ours) + bracket + rest


def own(row: Row) -> Row:
    """Our format, which also holds plain prompts."""
    for name in row:
        if name not in OWN_FIELDS + FREE_FIELDS:
            near = closest(name, OWN_FIELDS, cutoff=0.5) or OWN_FIELDS
            meant = ", ".join(f'"{field}"' for field in near)
            raise FieldError(name, f'unknown; expected {meant}; rename it, or put remarks under "note"')
    return {name: value for name, value in row.items() if name in OWN_FIELDS}


def counterfact(row: Row) -> Row:
    """CounterFact, or one of ROME's request dicts, which are its `requested_rewrite` alone."""
    rewrite = row.get("requested_rewrite", row)
    if not isinstance(rewrite, dict):
        text = f"{quote(rewrite)}; expected one object; give each rewrite an object of its own"
        raise FieldError("requested_rewrite", text)
    targets = (rewrite.get("target_new"), rewrite.get("target_true"))
    new, true = (target.get("str") if isinstance(target, dict) else target for target in targets)
    return {
        "prompt": rewrite.get("prompt"),
        "subject": _subject(rewrite.get("subject")),
        "target_new": new,
        "answer": true,
        "paraphrases": _leaves(row.get("paraphrase_prompts")),
        # The neighbours are other subjects that share the true object.
        "neighbours": [{"prompt": p, "answer": true} for p in _leaves(row.get("neighborhood_prompts"))],
        "relation": rewrite.get("relation_id"),
    }


def zsre(row: Row) -> Row:
    """zsRE: EasyEdit edits to `alt`; MEMIT to the true answer, which is what is left without `alt`."""
    answers, loc = _leaves(row.get("answers")), row.get("loc")
    if isinstance(loc, str) and loc and not loc.endswith("?"):
        loc += "?"  # as MEMIT asks it
    return {
        "prompt": row.get("src"),
        "subject": _subject(row.get("subject")),
        "target_new": row.get("alt") or _first(answers),
        "answer": _first(answers),
        "aliases": answers[1:],
        "paraphrases": _leaves(row.get("rephrase")),
        "neighbours": [{"prompt": loc, "answer": _first(row.get("loc_ans"))}] if loc else [],
    }


def easyedit(row: Row) -> Row:
    """EasyEdit's flat CounterFact, its `edit()` arguments, and the rows of KnowEdit."""
    truth = _leaves(row.get("ground_truth"))
    flat = {"prompt": row.get("locality_prompt"), "ground_truth": row.get("locality_ground_truth")}
    return {
        "prompt": _first([row.get("prompt"), row.get("prompts"), row.get("text")]),
        "subject": _subject([row.get("subject"), row.get("concept")]),
        "target_new": _first([row.get("target_new"), row.get("labels")]),
        "answer": _first(truth),
        "aliases": truth[1:],
        "paraphrases": _leaves([row.get(f"rephrase{end}") for end in ("", "_prompt", "_prompts")]),
        "neighbours": _locality(row.get("locality", row.get("locality_inputs", flat))),
        "relation": row.get("relation_id"),
    }


def fastedit(row: Row) -> Row:
    """FastEdit's `prompt, subject, target, queries`."""
    return {
        "prompt": row.get("prompt"),
        "subject": _subject(row.get("subject")),
        "target_new": row.get("target"),
        "paraphrases": _leaves(row.get("queries")),
    }


def tofu(row: Row) -> Row:
    """TOFU and other question-and-answer sets, with UniErase's `subject` where there is one."""
    return {
        "prompt": row.get("question"),
        "subject": _subject(row.get("subject")),
        "answer": row.get("answer"),
        "paraphrases": _leaves(row.get("paraphrased_question")),
    }


_EASYEDIT_MARKS = frozenset(
    {"prompts", "ground_truth", "labels", "concept", "portability", "portability_inputs"}
    | {"rephrase", "rephrase_prompt", "rephrase_prompts"}
    | {"locality", "locality_prompt", "locality_inputs"}
)
_NAMES = {
    counterfact: {"answer": "target_true", "paraphrases": "paraphrase_prompts",
                  "neighbours": "neighborhood_prompts", "relation": "relation_id"},
    zsre: {"prompt": "src", "target_new": "alt", "answer": "answers", "aliases": "answers",
           "paraphrases": "rephrase", "neighbours": "loc"},
    easyedit: {"prompt": "prompt", "subject": "subject", "target_new": "target_new", "answer": "ground_truth",
               "aliases": "ground_truth", "paraphrases": "rephrase_prompt", "neighbours": "locality_prompt",
               "relation": "relation_id"},
    fastedit: {"target_new": "target", "paraphrases": "queries"},
    tofu: {"prompt": "question", "paraphrases": "paraphrased_question"},
}  # fmt: skip


def _leaves(value: Any) -> list[Any]:
    """The non-empty values of a scalar or a nested list, as data sets write one answer or several."""
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [] if value is None or value == "" else [value]


def _first(value: Any) -> Any:
    return next(iter(_leaves(value)), None)


def _subject(value: Any) -> Any:
    subject = _first(value)
    return subject.strip() if isinstance(subject, str) else subject


def _locality(value: Any) -> list[Row]:
    """Probes from `{prompt, ground_truth}`, whose values may be lists, however deep it is nested."""
    if isinstance(value, list):
        return [probe for item in value for probe in _locality(item)]
    if not isinstance(value, dict):
        raise FieldError("locality", f'{quote(value)}; expected "prompt" and "ground_truth"; write an object')
    if "prompt" not in value:
        return [probe for item in value.values() for probe in _locality(item)]
    prompts, answers = value["prompt"], value.get("ground_truth")
    if isinstance(prompts, list) and isinstance(answers, list) and len(prompts) == len(answers):
        pairs = list(zip(prompts, answers, strict=True))
    else:
        pairs = [(prompt, answers) for prompt in _leaves(prompts)]
    return [{"prompt": _first(p), "answer": _first(a)} for p, a in pairs if _leaves(p)]
