"""The whole job on a real model: known facts are found, some are forgotten, the rest is watched."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editlib import bundled
from editlib.errors import EditlibError
from editlib.evaluation.facts import Before, ask, peak_rss_mb
from editlib.evaluation.metrics import has_answer
from editlib.evaluation.run import write_outputs
from editlib.hparams import load_hparams
from editlib.jobs import unlearn
from editlib.models.files import check_output
from editlib.models.loading import load
from editlib.models.packaged import fetch
from editlib.request import EditRequest, read_requests, write_requests
from editlib.workbench import Workbench

MODEL = "smollm2-135m"
FORGET = {"capital": 18, "symbol": 14}
ANCHOR_RELATIONS = ("language",)  # other relations of the same subjects that are anchored
WATCHED_RELATIONS = ("continent", "currency", "atomic_number")  # and those that never are
GENERAL_TESTS = {"question": 30, "instruction": 20}
GENERAL_ANCHORS = 40
CANDIDATES = {"capital": 110, "symbol": 80}  # asked first; what the model does not know of them is an anchor
LANGUAGES = 50


@dataclass(frozen=True)
class Plan:
    """Which facts play which part."""

    forget: list[EditRequest]
    anchors: list[EditRequest]
    watch: list[EditRequest]


def run_demo(out: Path, *, seed: int = 0, overwrite: bool = False) -> dict[str, Any]:
    """Forgets `FORGET` facts and writes `model/`, `metrics.json`, `report.html` and the request files to `out`.

    The clock starts when the model lies in the cache. The saved folder is measured by a new process.
    """
    out = Path(out)
    check_output(out, overwrite=overwrite)
    fetch(MODEL)
    begun = time.perf_counter()
    if overwrite:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    model, tok = load(MODEL)
    bench = Workbench.of(model, tok, out / "stats", name=MODEL)
    before = Before(bench.sha256, {})
    plan = make_plan(bench, before, seed)
    files = {name: out / f"{name}.jsonl" for name in ("forget", "anchors", "watch")}
    for name, path in files.items():
        write_requests(path, getattr(plan, name))
    before.save(out / "before.json")
    unlearn(
        bench,
        read_requests(files["forget"]),
        load_hparams(MODEL, "UniErase"),
        out / "model",
        retain=read_requests(files["anchors"]),
        known_answers=before.answers,
        seed=seed,
    )
    del model, bench
    measured = out / "measured"
    command = [
        sys.executable,
        "-m",
        "editlib",
        "eval",
        MODEL,
        str(out / "model"),
        "--requests",
        str(files["forget"]),
    ]
    command += ["--retain", str(files["watch"]), "--before", str(out / "before.json"), "--out", str(measured)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise EditlibError(f"measuring the saved folder failed with exit code {done.returncode}; see the lines above")
    metrics = json.loads((measured / "metrics.json").read_text(encoding="utf-8"))
    shutil.rmtree(measured)
    metrics["seconds"] = time.perf_counter() - begun
    metrics["peak_rss_mb"] = peak_rss_mb()
    write_outputs(metrics, out)
    return metrics


def make_plan(bench: Workbench, before: Before, seed: int) -> Plan:
    """Asks the model what it knows and deals the facts out.

    Of each relation in `FORGET` some known facts are forgotten; the other known ones are anchors and watched
    neighbours by turns, and those that the model gets wrong are anchors too: their answers must not move either.
    """
    rng = random.Random(seed)
    by_relation: dict[str, list[EditRequest]] = {}
    for fact in bundled.facts():
        by_relation.setdefault(fact.relation or "", []).append(fact)
    for relation, most in CANDIDATES.items():
        rng.shuffle(by_relation[relation])
        del by_relation[relation][most:]
    _ask(bench, before, [fact for relation in FORGET for fact in by_relation[relation]])
    forget, anchors, watch = [], [], []
    for relation, number in FORGET.items():
        known = [fact for fact in by_relation[relation] if _right(bench, before, fact)]
        rng.shuffle(known)
        forget += known[:number]
        watch += known[number::2]
        anchors += known[number + 1 :: 2]
        anchors += [fact for fact in by_relation[relation] if not _right(bench, before, fact)]
    subjects = {fact.group for fact in forget}
    for relation in ANCHOR_RELATIONS:
        facts = [fact for fact in by_relation[relation] if fact.group not in subjects]
        rng.shuffle(facts)
        anchors += [fact for fact in by_relation[relation] if fact.group in subjects] + facts[:LANGUAGES]
    watch += [fact for relation in WATCHED_RELATIONS for fact in by_relation[relation] if fact.group in subjects]
    for split, part, limits in (("test", watch, GENERAL_TESTS), ("anchor", anchors, None)):
        prompts = bundled.general(split)
        rng.shuffle(prompts)
        if limits is None:
            part += prompts[:GENERAL_ANCHORS]
            continue
        part += [prompt for prompt in prompts if prompt.answer is not None][: limits["question"]]
        part += [prompt for prompt in prompts if prompt.answer is None][: limits["instruction"]]
    _ask(bench, before, watch)
    return Plan(forget, anchors, watch)


def _ask(bench: Workbench, before: Before, facts: Sequence[EditRequest]) -> None:
    questions = [fact.question for fact in facts if fact.question not in before.answers]
    before.answers.update(ask(bench.anat, bench.tok, questions, progress="asking" if bench.progress else None))


def _right(bench: Workbench, before: Before, fact: EditRequest) -> bool:
    text = bench.tok.decode(before.answers[fact.question], skip_special_tokens=True)
    return has_answer(text, (fact.answer or "", *fact.aliases))
