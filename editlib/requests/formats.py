"""Recognise the format of an object by its fields, and split objects that hold several requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from editlib.errors import quote
from editlib.requests import readers
from editlib.requests.answers import answers_of
from editlib.requests.fields import FREE_FIELDS, SYNONYMS, FieldError, JsonRow

Reader = Callable[[JsonRow], JsonRow]

EASYEDIT_MARKS = frozenset(
    {"prompts", "ground_truth", "labels", "concept", "portability", "portability_inputs"}
    | {"rephrase", "rephrase_prompt", "rephrase_prompts"}
    | {"locality", "locality_prompt", "locality_inputs"}
)
UNNAMED = frozenset({readers.tofu, readers.unke, readers.rwku})
"""Formats that name no subject, or not always: `editlib.requests.subjects` finds it."""

NAMES: dict[Reader, dict[str, str]] = {
    readers.counterfact: {"answer": "target_true", "paraphrases": "paraphrase_prompts",
                          "neighbours": "neighborhood_prompts", "relation": "relation_id"},
    readers.zsre: {"prompt": "src", "target_new": "alt", "answer": "answers", "aliases": "answers",
                   "paraphrases": "rephrase", "neighbours": "loc"},
    readers.easyedit: {"answer": "ground_truth", "aliases": "ground_truth", "paraphrases": "rephrase_prompt",
                       "neighbours": "locality_prompt", "relation": "relation_id"},
    readers.fastedit: {"target_new": "target", "paraphrases": "queries"},
    readers.known: {"answer": "attribute", "relation": "relation_id"},
    readers.tofu: {"prompt": "question", "paraphrases": "paraphrased_question", "relation": "prop", "group": "subj"},
    readers.unke: {"prompt": "question", "target_new": "answer", "paraphrases": "para_question"},
    readers.rwku: {"prompt": "query", "relation": "type", "group": "subject"},
    readers.muse: {"answer": "gt"},
    readers.ripple: {"prompt": "edit.prompt", "subject": "edit.subject", "target_new": "edit.prompt",
                     "answer": "edit.original_fact.prompt", "relation": "edit.relation",
                     "neighbours": "Relation_Specificity"},
}  # fmt: skip
IDS = ("id", "case_id", "known_id")
"""Fields with an object's name, in order of preference; our own format has the first only."""

ANSWERS = SYNONYMS["answer"].split()
LISTS = {"K_F": "K_R", "success": "locality"}
"""KnowEdit's Sanitation is one object of lists: questions to forget, and questions to keep."""

PASSAGE = (
    "a text without a question; expected a prompt; read the questions of that set instead: RWKU's forget_level2, "
    "MUSE's knowmem"
)


def format_of(row: JsonRow) -> Reader:  # noqa: PLR0911
    """Finds the reader for an object by its fields.

    Raises:
        FieldError: a known format without questions, or one that another file of the same set replaces.
    """
    names = row.keys()
    if (
        "requested_rewrite" in row
        or isinstance(row.get("target_new"), dict)
        or ("target_true" in names and not names.isdisjoint({"target_false", "target_new"}))
    ):
        return readers.counterfact
    if "src" in row:
        return readers.zsre
    if "edit" in row:
        return readers.ripple
    if "known_id" in row or {"attribute", "template"} <= names:
        return readers.known
    if not EASYEDIT_MARKS.isdisjoint(names):
        return readers.easyedit
    # Without FastEdit's "queries", an id makes a row one of ours, whose "target" is misnamed.
    more = {"queries", *IDS, *FREE_FIELDS} if "queries" in row else set()
    if "target" in row and names <= {"prompt", "subject", "target"} | more:
        return readers.fastedit
    if {"query", "answer"} <= names:
        return readers.rwku
    if "gt" in row and "prompt" in row:
        return readers.muse
    if "para_question" in row:
        return readers.unke
    if ("question" in row or {"problem", "answer"} <= names) and "prompt" not in row:
        return readers.tofu
    _refuse_others(row)
    return readers.own


def name_in(reader: Reader, name: str) -> str:
    """Returns a format's name of our field: `paraphrases[0]` -> `queries[0]`."""
    ours, bracket, rest = name.partition("[")
    return NAMES.get(reader, {}).get(ours, ours) + bracket + rest


def id_of(row: JsonRow, reader: Reader) -> Any:
    """Returns an object's own name, or `None`."""
    names = IDS[:1] if reader is readers.own else IDS
    return next((row[name] for name in names if row.get(name) is not None), None)


def ambiguous(row: JsonRow, reader: Reader) -> str | None:
    """Says which of two fields is used if a format has two for one purpose; `None` if there is only one."""
    if reader is readers.zsre and row.get("alt") and row.get("answers"):
        return (
            'edits go to "alt", as in MEND and EasyEdit, and "answers" is the truth; MEMIT edits to "answers": take '
            '"alt" out for that'
        )
    if reader is readers.known and row.get("template") is not None:
        asked = str(row["template"]).replace("{}", str(row.get("subject")))
        if asked != row.get("prompt"):
            return '"template" and "prompt" differ; "prompt" is asked, as in ROME\'s causal trace'
    if reader is readers.tofu and not answers_of(row):
        others = [quote(name) for name, value in row.items() if name in ANSWERS and type(value) in (str, int)]
        passed = f' ({", ".join(others)} is not read: call it "answer")' if others else ""
        return f"no answer{passed}; a request without one is hidden, not erased"
    return None


def unfold(row: JsonRow) -> list[JsonRow]:
    """Returns the rows in one object: parallel lists (EasyEdit), several rewrites (MQuAKE) or Sanitation's list.

    Raises:
        FieldError: parallel lists of different lengths.
    """
    for forget in LISTS:
        if isinstance(row.get(forget), list):
            return [one if isinstance(one, dict) else _no_row(forget, one) for one in row[forget]]
    if isinstance(row.get("requested_rewrite"), list):
        rewrites = row["requested_rewrite"]
        if not rewrites or not all(isinstance(rewrite, dict) for rewrite in rewrites):
            _no_row("requested_rewrite", rewrites)
        own_id = row.get("case_id", row.get("id"))
        names = [own_id if own_id is None or len(rewrites) == 1 else f"{own_id}.{i}" for i in range(len(rewrites))]
        return [{"id": name, "requested_rewrite": one} for name, one in zip(names, rewrites, strict=True)]
    return _unzip(row)


def left_out(row: JsonRow) -> str | None:
    """Names the parts of an object that are not read as requests, and their use; `None` if there are none."""
    for forget, keep in LISTS.items():
        if isinstance(row.get(forget), list) and isinstance(row.get(keep), list):
            given = f'"{forget}" is read, what is to be forgotten'
            return f'{given}; the {len(row[keep])} rows of "{keep}" are to be kept: give them as a file to --retain'
    return None


def _unzip(row: JsonRow) -> list[JsonRow]:
    """Unzips EasyEdit's one object of parallel lists (`prompts: [...], subject: [...]`) to one row per prompt."""
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
            raise FieldError(name, f"{given}; expected one for each prompt; fix the list")
        return value[i]

    fields = {"prompt", "subject", "target_new", "relation_id", "ground_truth", "rephrase_prompt", "locality_prompt"}
    names = row.keys() & {"id", "case_id", *fields, *EASYEDIT_MARKS}
    return [{name: pick(name, row[name], i) for name in sorted(names)} for i in range(count)]


def _no_row(name: str, value: Any) -> JsonRow:
    raise FieldError(name, f"{quote(value)}; expected one object, or a list of them; fix it")


def _refuse_others(row: JsonRow) -> None:
    """Refuses files of known sets without requests; the message names the file to read instead."""
    if "prompt" in row:
        return
    if row and all(isinstance(value, dict) and "agg_value" in value for value in row.values()):
        wanted = "expected questions; read the file that was measured on, and give this one to eval --reference"
        raise FieldError(next(iter(row)), f"results of open-unlearning; {wanted}")
    if "text" in row:
        raise FieldError("text", PASSAGE)
    if {"target", "intro"} <= row.keys():
        raise FieldError("intro", PASSAGE)
    if {"instruction", "output"} <= row.keys():
        wanted = 'expected questions with their answers ("question", "answer"); in RWKU read forget_level2 instead'
        raise FieldError("instruction", f"texts to train on; {wanted}")
    if {"input", "output"} <= row.keys():
        wanted = "expected MEND's form of zsRE (src, subject, alt, answers); read zsre_mend_eval.json instead"
        raise FieldError("input", f"zsRE in KILT's form, which names no subject; {wanted}")
    if {"relation_id", "samples"} <= row.keys():
        wanted = "expected rewrites; read counterfact.json instead, of which this file only serves to score texts"
        raise FieldError("samples", f"CounterFact's attribute snippets; {wanted}")
    lists = [name for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if "conversations" in lists or "messages" in lists:
        wanted = 'expected a question with its answer; write "question" and "answer"'
        raise FieldError(lists[0], f"a conversation; {wanted}")
    if len(lists) > 1 and "prompt" not in row:
        wanted = "expected one list; write what is under the name that is meant into a file"
        raise FieldError(lists[0], f"one of {len(lists)} lists ({', '.join(lists)}) inside of one object; {wanted}")
    if len(lists) == 1 and lists[0] != "neighbours":
        given = f"{len(row[lists[0]])} objects inside of one"
        raise FieldError(lists[0], f"{given}; expected the list itself; write what is under this name into a file")
