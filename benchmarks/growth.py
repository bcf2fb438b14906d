"""How costs grow: seconds a request of one edit, of a chain's batches, of statistics on two processes, of a start.

    python benchmarks/growth.py --out runs/growth.json                 # random weights of 30 million parameters
    python benchmarks/growth.py --model smollm2-135m --sizes 1 10 100 --parts requests

Seconds are those of the processor, one thread, so that other jobs on its cores count little. Two processes are measured
by the slower of them.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sides import drawn_stats, random_model, say
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from editlib import AlphaEditHyperParams, Chain, Workbench, apply_alphaedit_to_model, data, load
from editlib.distributed import processes
from editlib.files import write_json
from editlib.models.anatomy import anatomy
from editlib.models.packaged.fetch import fetch
from editlib.requests.request import EditRequest
from editlib.stats.corpus import load_corpus
from editlib.stats.file import StatsHeader
from editlib.stats.layer_stats import layer_stats

LAYERS = [3, 4]
RANDOM = "30m"
STATISTICS_TOKENS = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a packaged model; default: random weights")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 10, 100, 1000], help="requests of an edit")
    parser.add_argument("--batches", type=int, default=100, help="of the chain, one request each")
    parser.add_argument("--steps", type=int, default=5, help="of a value; all are taken")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.worker:
        say(str(statistics_seconds(args)))
        return
    found: dict[str, Any] = {}
    for name in args.parts:
        found[name] = PARTS[name](args)
        say(f"{name}: {found[name]}")
        if args.out:
            write_json(args.out, found)


def loaded(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that is measured, and a tokenizer."""
    if args.model:
        return load(args.model)
    tok = AutoTokenizer.from_pretrained(str(fetch("smollm2-135m")))
    return random_model(RANDOM, len(tok), torch.device("cpu"), torch.float32), tok


def hparams(args: argparse.Namespace) -> AlphaEditHyperParams:
    """AlphaEdit with values that take all of their steps."""
    return AlphaEditHyperParams.from_dict(
        {
            "layers": LAYERS,
            "context_templates": ["{}"],
            "v_num_grad_steps": args.steps,
            "early_stop_loss": 0.0,
            "nullspace_threshold": 0.75,
            "nullspace_rule": "dimensions",
        },
        "growth",
    )


def facts(count: int) -> list[EditRequest]:
    """Bundled facts from all over, each to be answered with that of the one before it."""
    found = [fact for fact in data.facts() if fact.subject and fact.answer]
    spread = found[:: max(1, len(found) // count)][:count]
    return [replace(fact, target_new=spread[i - 1].answer) for i, fact in enumerate(spread)]


def requests(args: argparse.Namespace) -> dict[str, float]:
    """Seconds a request of one edit, by the number of its requests."""
    model, tok = loaded(args)
    with tempfile.TemporaryDirectory() as folder:
        stats = drawn_stats(anatomy(model), LAYERS, Path(folder))
        apply_alphaedit_to_model(model, tok, facts(2), hparams(args), stats=stats).revert(model)  # warms up
        found = {}
        for size in args.sizes:
            asked = facts(size)
            begun = time.process_time()
            result = apply_alphaedit_to_model(model, tok, asked, hparams(args), stats=stats)
            found[str(size)] = (time.process_time() - begun) / size
            result.revert(model)
    return found


def chain(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a chain's batches of one request: medians of five, from the second one on, and the last ones."""
    model, tok = loaded(args)
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench.of(model, tok, Path(folder) / "stats", name="growth", progress=False)
        made = Chain.create(Path(folder) / "chain", bench, hparams(args), stats_tokens=20_000)
        seconds = []
        for request in facts(args.batches):
            begun = time.process_time()
            made.add([request])
            seconds.append(time.process_time() - begun)
    places = sorted({1, args.batches // 10, args.batches // 2, args.batches - 5})
    found = {f"from batch {at + 1}": statistics.median(seconds[at : at + 5]) for at in places}
    return {**found, "flatness": statistics.median(seconds[-5:]) / statistics.median(seconds[1:6])}


def statistics_seconds(args: argparse.Namespace) -> float:
    """Seconds of this process for its share of the statistics of two layers, loading left out."""
    with processes() as shard:
        model, tok = loaded(args)
        anat, text = anatomy(model), load_corpus("wiki-sample")
        header = StatsHeader("growth", "", anat.d_ff, 0, 0, text.name, text.sha256, 512, 0, 0, "")
        documents = list(text.documents)
        begun = time.process_time()
        layer_stats(anat, tok, LAYERS, documents, tokens=STATISTICS_TOKENS, header=header, progress=False, shard=shard)
        mine = time.process_time() - begun
        return max(shard.gather(mine))


def two_processes(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of statistics in one process, in the slower of two, and their ratio."""
    own = [__file__, "--worker", *(["--model", args.model] if args.model else [])]
    alone = [sys.executable, *own]
    both = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *own]
    seconds = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
               for command in (alone, both)]  # fmt: skip
    return {"one": seconds[0], "two": seconds[1], "ratio": seconds[0] / seconds[1]}


def start(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of `editlib --help`, and of `import editlib` beyond Python's own start: the fastest of five."""

    def seconds(*command: str) -> float:
        each = []
        for _ in range(5):
            begun = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *command], capture_output=True, check=True)
            ended = resource.getrusage(resource.RUSAGE_CHILDREN)
            each.append(ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime)
        return min(each)

    python = seconds("-c", "pass")
    return {"help": seconds("-m", "editlib", "--help"), "import": seconds("-c", "import editlib") - python}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "start": start,
    "requests": requests,
    "chain": chain,
    "processes": two_processes,
}

if __name__ == "__main__":
    main()
