"""What a batch of a chain costs as the chain grows: seconds of `add` and bytes on disk, batch by batch.

    python benchmarks/chain_cost.py smollm2-135m --hparams UniErase/smollm2-135m --batches 50 --out runs/chain_cost

The requests are bundled facts, one a batch unless `--size` says otherwise. The first batch also asks the base model for
the anchors' answers; what counts is batch 50 against batch 2.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from editlib import Chain, Workbench, data, load_hparams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--hparams", default="UniErase/smollm2-135m")
    parser.add_argument("--algorithm")
    parser.add_argument("--batches", type=int, default=50)
    parser.add_argument("--size", type=int, default=1, help="requests a batch")
    parser.add_argument("--stats-dir", default="stats")
    parser.add_argument("--token", type=Path)
    parser.add_argument("--corpus", default="wiki-sample")
    parser.add_argument("--out", type=Path, required=True, help="the chain's folder")
    args = parser.parse_args()
    bench = Workbench.load(args.model, args.stats_dir, progress=False)
    settings = load_hparams(args.hparams, args.algorithm)
    facts = [replace(fact, target_new=" Atlantis") for fact in data.facts()]
    facts = list({fact.question: fact for fact in facts}.values())
    if len(facts) < args.batches * args.size:
        raise SystemExit(f"{len(facts)} bundled facts; expected at least {args.batches * args.size}: fewer --batches")
    chain = Chain.create(args.out, bench, settings, token=args.token, corpus=args.corpus)
    seconds = []
    for i in range(args.batches):
        begun = time.perf_counter()
        chain.add(facts[i * args.size : (i + 1) * args.size])
        seconds.append(time.perf_counter() - begun)
        last = chain.status()["batches"][-1]
        sys.stdout.write(f"batch {i + 1:4d}  {seconds[-1]:7.2f} s  {last['bytes'] / 1e3:8.0f} kB\n")
        sys.stdout.flush()
    begun = time.perf_counter()
    Chain.open(args.out)
    sys.stdout.write(f"opening with every hash: {time.perf_counter() - begun:.2f} s\n")
    if len(seconds) > 2:
        sys.stdout.write(f"last batch over batch 2: {seconds[-1] / seconds[1]:.2f}\n")


if __name__ == "__main__":
    main()
