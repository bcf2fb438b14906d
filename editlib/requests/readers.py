"""Read one object of a known data set into the arguments of `EditRequest`: one function per format.

Each reader only moves fields; their values are checked once, by `EditRequest`. Other fields of foreign formats are
ignored; an unknown field of our own format is an error.
"""

from __future__ import annotations

from typing import Any

from editlib.errors import quote
from editlib.requests.answers import answers_of
from editlib.requests.fields import (
    FREE_FIELDS,
    OWN_FIELDS,
    FieldError,
    JsonRow,
    first,
    leaves,
    meant,
    stripped,
    text_of,
)


def own(row: JsonRow) -> JsonRow:
    """Reads our format, which also holds plain prompts."""
    for name in row:
        if name not in OWN_FIELDS + FREE_FIELDS:
            near = ", ".join(f'"{field}"' for field in meant(name))
            raise FieldError(name, f'unknown; expected {near}; rename it, or put remarks under "note"')
    return {name: value for name, value in row.items() if name in OWN_FIELDS}


def counterfact(row: JsonRow) -> JsonRow:
    """Reads CounterFact, one of ROME's request dicts, which are its `requested_rewrite` alone, or one rewrite of
    MQuAKE."""
    rewrite = row.get("requested_rewrite", row)
    if not isinstance(rewrite, dict):
        raise FieldError("requested_rewrite", f"{quote(rewrite)}; expected one object, or a list of them; fix it")
    true = text_of(rewrite.get("target_true"))
    return {
        "prompt": rewrite.get("prompt"),
        "subject": stripped(rewrite.get("subject")),
        "target_new": text_of(rewrite.get("target_new", rewrite.get("target_false"))),
        "answer": true,
        # MQuAKE also asks a rewrite as a question; its questions over several hops are about other facts.
        "paraphrases": leaves([row.get("paraphrase_prompts"), rewrite.get("question")]),
        # The neighbours are other subjects that share the true object.
        "neighbours": [_neighbour(probe, true) for probe in leaves(row.get("neighborhood_prompts"))],
        "relation": rewrite.get("relation_id"),
    }


def zsre(row: JsonRow) -> JsonRow:
    """Reads zsRE: EasyEdit edits to `alt`; MEMIT to the true answer, which is used without `alt`."""
    answers, probes = leaves(row.get("answers")), leaves(row.get("loc"))
    right = leaves(row.get("loc_ans"))
    if len(probes) != len(right):
        right = [first(right)] * len(probes)
    # The question as MEMIT asks it.
    probes = [f"{loc}?" if isinstance(loc, str) and not loc.endswith("?") else loc for loc in probes]
    return {
        "prompt": row.get("src"),
        "subject": stripped(row.get("subject")),
        "target_new": row.get("alt") or first(answers),
        "answer": first(answers),
        "aliases": answers[1:],
        "paraphrases": leaves(row.get("rephrase")),
        "neighbours": [{"prompt": loc, "answer": said} for loc, said in zip(probes, right, strict=True)],
    }


def easyedit(row: JsonRow) -> JsonRow:
    """Reads EasyEdit's flat CounterFact, its `edit()` arguments, and the rows of KnowEdit."""
    truth = leaves(row.get("ground_truth"))
    flat = {"prompt": row.get("locality_prompt"), "ground_truth": row.get("locality_ground_truth")}
    for name in ("prompt", "target_new"):
        if len(leaves(row.get(name))) > 1:
            wanted = 'expected one; write lists as EasyEdit\'s "prompts", or an object for each'
            raise FieldError(name, f"{quote(row[name])}; {wanted}")
    return {
        # `question` in KnowEdit's Sanitation
        "prompt": first([row.get("prompt"), row.get("prompts"), row.get("text"), row.get("question")]),
        "subject": stripped([row.get("subject"), row.get("concept")]),
        "target_new": first([row.get("target_new"), row.get("labels")]),
        "answer": first(truth),
        "aliases": truth[1:],
        "paraphrases": leaves([row.get(f"rephrase{end}") for end in ("", "_prompt", "_prompts")]),
        "neighbours": _locality(row.get("locality", row.get("locality_inputs", flat))),
        "relation": row.get("relation_id"),
    }


def fastedit(row: JsonRow) -> JsonRow:
    """Reads FastEdit's `prompt, subject, target, queries`."""
    return {
        "prompt": row.get("prompt"),
        "subject": stripped(row.get("subject")),
        "target_new": row.get("target"),
        "paraphrases": leaves(row.get("queries")),
    }


def known(row: JsonRow) -> JsonRow:
    """Reads ROME's known_1000, the facts of its causal trace: `attribute` is the truth, `prompt` what it is asked
    with."""
    return {
        "prompt": row.get("prompt"),
        "subject": stripped(row.get("subject")),
        "answer": row.get("attribute"),
        "relation": row.get("relation_id"),
    }


def tofu(row: JsonRow) -> JsonRow:
    """Reads TOFU, MUSE's `knowmem` and other sets of questions and answers, with UniErase's `subject` if there is one;
    PopQA's is left out if its question does not contain it."""
    question, subject = row.get("question", row.get("problem")), stripped(row.get("subject"))
    whose = stripped(row.get("subj"))
    if subject is None and isinstance(whose, str) and isinstance(question, str) and question.count(whose) == 1:
        subject = whose
    answers = answers_of(row)
    return {
        "prompt": question,
        "subject": subject,
        "answer": next(iter(answers), None),
        "aliases": answers[1:],
        "target_new": row.get("target_new"),
        "paraphrases": leaves(row.get("paraphrased_question", row.get("paraphrases"))),
        "group": whose,
        "relation": row.get("prop"),
    }


def unke(row: JsonRow) -> JsonRow:
    """Reads UnKE: the long `answer` is the new answer."""
    return {
        "prompt": row.get("question"),
        "subject": stripped(row.get("subject")),
        "target_new": row.get("answer"),
        "paraphrases": leaves(row.get("para_question")),
    }


def rwku(row: JsonRow) -> JsonRow:
    """Reads RWKU's `query, answer, subject`, with gaps (`___`) unchanged; a person who is not named there is not the
    subject of the question."""
    subject, query = stripped(row.get("subject")), row.get("query")
    named = isinstance(subject, str) and isinstance(query, str) and query.count(subject) == 1
    return {
        "prompt": query,
        "subject": subject if named else None,
        "answer": row.get("answer"),
        "group": subject,
        "relation": row.get("type") or None,
    }


def muse(row: JsonRow) -> JsonRow:
    """Reads MUSE's `verbmem`: the beginning of a passage, and its continuation."""
    return {"prompt": row.get("prompt"), "answer": row.get("gt")}


def ripple(row: JsonRow) -> JsonRow:
    """Reads RippleEdits: `edit.prompt` is a whole sentence, which ends where it differs from that of the original fact.

    Raises:
        FieldError: the subject has no name, only a number in Wikidata.
    """
    edit = row["edit"]
    if not isinstance(edit, dict):
        raise FieldError("edit", f'{quote(edit)}; expected an object with "prompt"; fix it')
    subject = stripped(edit.get("subject"))
    if subject is None:
        given = "RippleEdits names it by its number in Wikidata only"
        instead = "read wiki_recent or wiki_counterfact of KnowEdit, made of it, or add the name"
        raise FieldError("edit.subject", f"{given}; expected its name; {instead}")
    new, fact = edit.get("prompt"), edit.get("original_fact")
    old = fact.get("prompt") if isinstance(fact, dict) else None
    if not isinstance(new, str) or not isinstance(old, str):
        wanted = 'expected it and that of "original_fact", which tell where the answer begins; add them'
        raise FieldError("edit.prompt", f"{quote(new)}; {wanted}")
    pairs = zip(f"{new} ", f"{old} ", strict=False)
    same = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(new), len(old)))
    shared = new[:same].rpartition(" ")[0]
    target, true = (text[len(shared) :].strip().removesuffix(".") for text in (new, old))
    return {
        "prompt": shared,
        "subject": subject,
        "target_new": target,
        "answer": true,
        "relation": edit.get("relation"),
        "neighbours": [
            {"prompt": query.get("prompt"), "answer": first([leaf.get("value") for leaf in _objects(query, "answers")])}
            for test in _objects(row, "Relation_Specificity")
            for query in _objects(test, "test_queries")
        ],
    }


def _objects(row: JsonRow, name: str) -> list[JsonRow]:
    """Returns the objects in a field.

    Raises:
        FieldError: it has other content.
    """
    found = leaves(row.get(name))
    if other := [one for one in found if not isinstance(one, dict)]:
        raise FieldError(name, f"{quote(other[0])}; expected an object, or a list of them; fix it")
    return found


def _neighbour(probe: Any, answer: Any) -> JsonRow:
    """Returns one of `neighborhood_prompts`: a text, or `{prompt, target}` as in MEMIT's zsRE."""
    if isinstance(probe, dict):
        return {"prompt": probe.get("prompt"), "answer": stripped(probe.get("target", answer))}
    return {"prompt": probe, "answer": answer}


def _locality(value: Any) -> list[JsonRow]:
    """Returns probes from `{prompt, ground_truth}` at any depth, whose values may be lists."""
    if value is None:  # Parquet and Arrow fill in the fields that other rows have
        return []
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
        pairs = [(prompt, answers) for prompt in leaves(prompts)]
    return [{"prompt": first(p), "answer": first(a)} for p, a in pairs if leaves(p)]
