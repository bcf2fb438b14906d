"""What `editlib plan` says beside what the same steps take: statistics, values and solve of small models.

    python benchmarks/plan_check.py                           # three shapes, random weights
    python benchmarks/plan_check.py --shapes 135m --requests 8

Random weights never reach their targets, so that every value takes all of its steps, as the plan has it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from sides import SHAPES, capital_requests, measured, random_model, say
from transformers import AutoTokenizer

from editlib.algorithms import costs
from editlib.algorithms.alphaedit import apply_alphaedit_to_model
from editlib.algorithms.machine import measure
from editlib.algorithms.null_space import null_spaces
from editlib.hparams import AlphaEditHyperParams
from editlib.models.anatomy import anatomy
from editlib.models.packaged.fetch import fetch
from editlib.models.precision import cast_params, fast_dtype
from editlib.models.size import model_size
from editlib.stats.corpus import load_corpus
from editlib.stats.file import StatsHeader
from editlib.stats.layer_stats import layer_stats

TOKENS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["135m", "360m", "1b"])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 5])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    for shape in args.shapes:
        say(f"{shape}: " + check(shape, args.layers, args.requests, args.steps, args.device))


def check(shape: str, layers: Sequence[int], requests: int, steps: int, device: torch.device) -> str:
    """Planned and measured seconds of each step, and their ratios."""
    tok = AutoTokenizer.from_pretrained(str(fetch("smollm2-135m")))
    model = random_model(shape, len(tok), device, torch.float32)
    machine, size, anat = measure(model.config, torch.float32, device), model_size(model.config), anatomy(model)
    asked = capital_requests(requests)
    hparams = AlphaEditHyperParams.from_dict(
        {
            "layers": list(layers),
            "context_templates": ["{}"],
            "v_num_grad_steps": steps,
            "early_stop_loss": 0.0,
            "nullspace_threshold": 0.75,
            "nullspace_rule": "dimensions",
        },
        "plan check",
    )
    text = load_corpus("wiki-sample")
    header = StatsHeader(shape, "", anat.d_ff, TOKENS, 0, text.name, text.sha256, 512, 0, 0, "")

    def statistics() -> dict:
        with cast_params(model, fast_dtype(model)):
            made = layer_stats(anat, tok, layers, text.documents, tokens=TOKENS, header=header, progress=False)
        null_spaces(made, hparams, device)
        return made

    stats = measured(statistics, device)
    with tempfile.TemporaryDirectory() as folder:
        kept = {layer: replace(one, path=Path(folder) / f"{layer}.npz") for layer, one in stats.made.items()}
        null_spaces(kept, hparams, device)  # kept beside the files, so that the edit does not decompose again
        apply_alphaedit_to_model(model, tok, asked[:1], hparams, stats=kept).revert(model)  # warms up
        edit = measured(lambda: apply_alphaedit_to_model(model, tok, asked, hparams, stats=kept), device)
    lengths = [len(tok(request.question)["input_ids"]) for request in asked]
    mean = round(sum(lengths) / requests)
    job = costs.Job(layers, requests, prompt_tokens=mean, suffix_tokens=2, steps=steps, kept_out=size.d_ff // 4)
    planned = {
        "statistics": costs.statistics(size, layers, TOKENS),
        "values": costs.values(size, job),
        "write": costs.solve(size, job),
    }
    seconds = {"statistics": stats.seconds, **edit.made.timings}
    pairs = [(name, step.seconds(machine), seconds[name]) for name, step in planned.items()]
    return "; ".join(f"{name} {told:.2f} planned, {took:.2f} measured, {told / took:.2f}" for name, told, took in pairs)


if __name__ == "__main__":
    main()
