"""What one edit costs beside the published procedure: AlphaEdit of the same requests, settings and contexts, twice.

    python benchmarks/edit_cost.py smollm2-135m --requests 20
    python benchmarks/edit_cost.py --shape 3b --device-map cuda --dtype bfloat16     # random weights of that shape

The published procedure is written down in `published.py`. Neither side's decomposition of the statistics is timed: both
are made once per model. A model of random weights replaces one that is not on disk; what it knows does not change what
an edit costs, but its values rarely come near their targets, so that no request rests early.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from published import Settings, alphaedit, compute_ks
from sides import (
    SHAPES,
    capital_requests,
    dense_projector,
    drawn_stats,
    encoded,
    measured,
    random_model,
    same_settings,
    say,
    target_nll,
)
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from editlib import apply_alphaedit_to_model, load
from editlib.algorithms.edit import restore
from editlib.models.anatomy import anatomy
from editlib.models.loading import DTYPES
from editlib.stats.store import find_layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="also gives the tokenizer of a --shape")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--layers", default="4,5,6,7,8")
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2, help="of each side; the faster one counts")
    parser.add_argument("--device-map", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--stats-dir", type=Path, help="stored statistics instead of drawn ones")
    args = parser.parse_args()
    model, tok = load(args.model, dtype=args.dtype, device_map=args.device_map)
    if args.shape:
        model = random_model(args.shape, len(tok), next(model.parameters()).device, DTYPES[args.dtype])
    layers = [int(layer) for layer in args.layers.split(",")]
    stored = find_layers(args.stats_dir, args.model, anatomy(model), layers) if args.stats_dir else None
    compare_edits(model, tok, layers, args.requests, args.repeats, stored)


def compare_edits(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    layers: Sequence[int],
    count: int,
    repeats: int = 1,
    stats: Mapping[int, Any] | None = None,
) -> dict[str, float]:
    """Both sides' seconds, MiB, steps and the targets' NLL, and the ratios; the weights are restored.

    Args:
        count: requests.
        repeats: runs of each side, of which the fastest counts.
        stats: of `layers`; `None`: drawn ones.
    """
    anat, settings, device = anatomy(model), Settings(layers), anatomy(model).device
    requests, hparams = capital_requests(count), same_settings(settings)
    asked = [encoded(tok, request) for request in requests]
    originals = {layer: anat.weight(layer).clone() for layer in layers}
    row: dict[str, float] = {"requests": len(requests), "nll_before": target_nll(model, asked)}
    with tempfile.TemporaryDirectory() as folder:
        stats = stats or drawn_stats(anat, layers, Path(folder))
        run = lambda some: apply_alphaedit_to_model(model, tok, some, hparams, stats=stats)  # noqa: E731
        run(requests[:2]).revert(model)  # decomposes the statistics, and warms up
        ours = []
        for _ in range(repeats):
            ours.append(measured(lambda: run(requests), device))
            row["nll"] = target_nll(model, asked)
            restore(anat, originals)
        projectors = {layer: dense_projector(stats[layer]) for layer in layers}
    best = min(ours, key=lambda cost: cost.seconds)
    row |= {"seconds": best.seconds, "mb": max(cost.memory_mb for cost in ours)}
    row |= {f"{name}_seconds": seconds for name, seconds in best.made.timings.items()}
    row["steps"] = sum(entry["steps"] for entry in best.made.diagnostics)
    say("editlib    " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    matrices = [cast(nn.Linear, anat.mlp_output(layer)) for layer in range(anat.n_layers)]  # a Llama's
    compute_ks(model, matrices[layers[0]], asked[:2])  # warms up
    theirs = []
    for _ in range(repeats):
        theirs.append(measured(lambda: alphaedit(model, anat.layers, matrices, asked, settings, projectors), device))
        row["published_nll"] = target_nll(model, asked)
        restore(anat, originals)
    fastest = min(theirs, key=lambda cost: cost.seconds)
    row |= {"published_seconds": fastest.seconds, "published_mb": max(cost.memory_mb for cost in theirs)}
    row["published_steps"] = fastest.made
    row["ratio"] = row["published_seconds"] / row["seconds"]
    say("published  " + ", ".join(f"{name} {row[name]:.4g}" for name in ("published_seconds", "published_mb", "ratio")))
    return row


if __name__ == "__main__":
    main()
