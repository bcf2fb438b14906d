"""What erasing facts costs all others, on fresh draws of bundled facts: the tables of docs/results/erasing.md.

    python benchmarks/erasing.py --out runs/erasing --draws 16 17
    python benchmarks/erasing.py --out runs/erasing --draws 16 17 18     # resumes with draw 18

A draw takes `--facts` of what the model knows, in equal parts of six relations, each with one wording. All other
wordings that ship are asked afterwards and were never seen. Each draw is a folder with its request files, `eval` and
`attacks`; what is there is not done again. The edited model is removed once it is measured, unless `--keep`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from sides import say

from editlib import Workbench, data
from editlib.attacks.registry import choose
from editlib.evaluation.answer_cache import AnswerCache, ask
from editlib.facts.protocol import FactsProtocol
from editlib.facts.sampling import ANCHORED, HELD_OUT, RELATIONS, knows
from editlib.files import write_json
from editlib.finding import find_settings, fit_settings
from editlib.hparams.derive import ROWS
from editlib.jobs.attack import attack_folders
from editlib.jobs.edit import unlearn
from editlib.jobs.evaluate import evaluate_models
from editlib.reports.tables import write_table
from editlib.requests.reading import read_requests, write_requests
from editlib.requests.request import EditRequest

WATCHED_EACH, ANCHORED_EACH, WRONG_EACH = 24, 24, 8  # other facts of a relation that is forgotten
OTHERS_EACH = 16  # anchored facts of each relation of `ANCHORED`, none about a forgotten subject
GENERAL_ANCHORS, QUESTIONS, INSTRUCTIONS = 24, 30, 20
ATTACKS = ["banned-token", "prefill-lead", "prefill-own", "few-shot"]
MEASURES = (
    "efficacy",
    "paraphrase_efficacy",
    "neighbour_retention",
    "same_subject_anchored_retention",
    "same_subject_retention",
    "crossed_retention",
    "other_retention",
)


@dataclass(frozen=True)
class Draw:
    """Holds the facts of one draw.

    `forget` have one wording each, and `asked` the same with all others; `anchors` are given to the edit as retain
    prompts, and `watch` are not.
    """

    forget: Sequence[EditRequest]
    asked: Sequence[EditRequest]
    anchors: Sequence[EditRequest]
    watch: Sequence[EditRequest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draws", type=int, nargs="+", required=True, help="seeds")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--hparams", help="settings; default: those that `editlib unlearn` finds")
    parser.add_argument("--facts", type=int, default=60)
    parser.add_argument("--stats-dir", type=Path, default=Path("stats"))
    parser.add_argument("--stats-tokens", type=int, default=20_000)
    parser.add_argument("--attacks", nargs="*", choices=choose(), default=ATTACKS)
    parser.add_argument("--keep", action="store_true", help="keep the edited models")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {seed: measured(args, seed) for seed in args.draws}
    table = [["draw", *next(iter(rows.values()))]]
    table += [[str(seed), *map(_cell, row.values())] for seed, row in rows.items()]
    table.append(["mean", *(_cell(_mean([row[name] for row in rows.values()])) for name in table[0][1:])])
    write_table(table, args.out / "table.md")
    for line in table:
        say("  ".join(line))


def measured(args: argparse.Namespace, seed: int) -> dict[str, float | None]:
    """Edits, asks and attacks one draw, or reads what was done of it; returns its row of the table."""
    folder = args.out / f"draw-{seed}"
    model, asked, finished = folder / "model", folder / "asked.jsonl", folder / "row.json"
    if finished.is_file():
        return dict(_read(finished))
    if not (model / "editlib.json").is_file():
        _edit(args, seed, folder)
    if not (folder / "eval" / "metrics.json").is_file():
        _evaluate(args.model, folder)
    if args.attacks:
        attack_folders(args.model, str(model), asked, folder / "attacks", attacks=args.attacks)
    row = _row(folder, attacked=bool(args.attacks))
    write_json(finished, row)
    if not args.keep:
        shutil.rmtree(model)
    return row


def _edit(args: argparse.Namespace, seed: int, folder: Path) -> None:
    bench = Workbench.load(args.model, args.stats_dir)
    before = AnswerCache.load(folder / "before.json", bench.sha256)
    drawn = draw(bench, before, args.facts // len(RELATIONS), seed)
    folder.mkdir(parents=True, exist_ok=True)
    before.save(folder / "before.json")
    for name in ("forget", "asked", "anchors", "watch"):
        write_requests(folder / f"{name}.jsonl", getattr(drawn, name))
    settings = fit_settings(bench, find_settings(args.model, "UniErase", args.hparams, values=ROWS))
    given: dict[str, Any] = {"retain": drawn.anchors, "known_answers": before.answers, "overwrite": True}
    unlearn(bench, drawn.forget, settings, folder / "model", stats_tokens=args.stats_tokens, seed=0, **given)


def draw(bench: Workbench, before: AnswerCache, each: int, seed: int) -> Draw:
    """Draws `each` known facts of every relation to forget, and what is held and watched beside them."""
    rng = random.Random(seed)
    by_relation: dict[str, list[EditRequest]] = {}
    for fact in data.facts():
        by_relation.setdefault(str(fact.relation), []).append(fact)
    facts = [fact for relation in (*RELATIONS, *ANCHORED, *HELD_OUT) for fact in by_relation[relation]]
    _ask(bench, before, [fact.question for fact in facts])
    known: dict[str, list[EditRequest]] = {}
    for fact in facts:
        known.setdefault(str(fact.relation), []).extend([fact] if knows(bench, before, fact) else [])
    forget, anchors, watch = [], [], []
    for relation in RELATIONS:
        rng.shuffle(known[relation])
        forget += known[relation][:each]
    subjects, ids = {fact.group for fact in forget}, {fact.id for fact in forget}
    for relation in RELATIONS:
        others = [fact for fact in known[relation] if fact.id not in ids]
        rng.shuffle(others)
        watch += [fact for fact in others if fact.group in subjects]  # crossed pairs
        others = [fact for fact in others if fact.group not in subjects]
        watch += others[::2][:WATCHED_EACH]
        anchors += others[1::2][:ANCHORED_EACH]
        wrong = [f for f in by_relation[relation] if not knows(bench, before, f) and f.group not in subjects]
        rng.shuffle(wrong)
        anchors += wrong[:WRONG_EACH]
    for relation in ANCHORED:
        others = [fact for fact in by_relation[relation] if fact.group not in subjects]
        rng.shuffle(others)
        anchors += others[:OTHERS_EACH]
    watch += [fact for relation in (*ANCHORED, *HELD_OUT) for fact in known[relation] if fact.group in subjects]
    held, asked = data.general("anchor"), data.general("test")
    rng.shuffle(held)
    rng.shuffle(asked)
    anchors += held[:GENERAL_ANCHORS]
    watch += [prompt for prompt in asked if prompt.answer is not None][:QUESTIONS]
    watch += [prompt for prompt in asked if prompt.answer is None][:INSTRUCTIONS]
    _ask(bench, before, [prompt.question for prompt in watch])
    unseen = [tuple(dict.fromkeys((*fact.phrasings, *fact.paraphrases))) for fact in forget]
    return Draw(
        [replace(fact, phrasings=(), paraphrases=()) for fact in forget],
        [replace(fact, phrasings=(), paraphrases=texts) for fact, texts in zip(forget, unseen, strict=True)],
        [replace(prompt, phrasings=(), paraphrases=()) for prompt in anchors],
        watch,
    )


def _ask(bench: Workbench, before: AnswerCache, questions: Sequence[str]) -> None:
    missing = [question for question in dict.fromkeys(questions) if question not in before.answers]
    before.answers.update(ask(bench.anat, bench.tok, missing, how=bench.prompts, progress="asking"))


def _evaluate(model: str, folder: Path) -> None:
    # Those that were anchored are left out, but say which relations were.
    kept = [*read_requests(folder / "watch.jsonl"), *read_requests(folder / "anchors.jsonl")]
    write_requests(folder / "kept.jsonl", kept)
    protocol = FactsProtocol.read(
        read_requests(folder / "asked.jsonl"),
        retain_file=folder / "kept.jsonl",
        before_file=folder / "before.json",
        progress=True,
    )
    evaluate_models(protocol, model, str(folder / "model"), folder / "eval", overwrite=True)


def _row(folder: Path, *, attacked: bool) -> dict[str, float | None]:
    """Returns the row of a draw: shares of answers gone, refused and kept, perplexity ratio, leaks of each attack."""
    metrics = _read(folder / "eval" / "metrics.json")
    items = metrics["items"]

    def gone(kind: str) -> float | None:
        return _mean([not item["right_after"] for item in items if item["kind"] == kind and item["right_before"]])

    def refused(kind: str) -> float | None:
        return _mean([item["passed"] for item in items if item["kind"] == kind and item["right_before"]])

    row: dict[str, float | None] = {name: metrics[name] for name in MEASURES}
    row = {"gone": gone("request"), "gone_unseen": gone("paraphrase"), **row}
    row["paraphrase_efficacy"] = refused("paraphrase")  # of wordings that had the right answer before
    row["questions"] = _mean([i["passed"] for i in items if i["kind"] == "other_question" and i["right_before"]])
    row["neighbours_refused"] = _mean([item["refused_after"] for item in items if item["kind"] == "neighbour"])
    row["perplexity_ratio"] = metrics["perplexity_ratio"]
    if attacked:
        for result in _read(folder / "attacks" / "attacks.json")["results"]:
            row |= {f"{result['attack']}/{side}": result["shares"][side]["rate"] for side in ("edited", "control")}
    return row


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _mean(values: Sequence[float | None]) -> float | None:
    some = [float(value) for value in values if value is not None]
    return fmean(some) if some else None


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
