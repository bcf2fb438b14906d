"""The benchmarks for an accelerator, in under eight minutes: whole edits side by side, statistics, token, solve.

    python benchmarks/gpu.py --device cuda --out runs/gpu.json
    python benchmarks/gpu.py --device cpu --small --out runs/gpu-small.json        # the same road on tiny shapes

A part begins only while there is time left, the cheapest first, and what is finished is written at once. The model's
weights must be in the cache (`editlib fetch smollm2-135m`).
"""

from __future__ import annotations

import argparse
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import Side, layer_statistics, token
from edit_cost import compare_edits
from sides import random_model, say
from solve import compare

from editlib.errors import first_line
from editlib.files import write_json
from editlib.models.anatomy import anatomy

MODEL = "smollm2-135m"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--small", action="store_true", help="tiny shapes and few requests, to try the script itself")
    args = parser.parse_args()
    begun = time.perf_counter()
    found: dict[str, Any] = {"device": name_of(args.device), "torch": torch.__version__}
    side = Side(MODEL, str(args.device))
    for name, work, share in parts(side, args.device, args.small):
        if time.perf_counter() - begun > (1 - share) * 60 * args.minutes:
            say(f"{name}: left out, no time")
            continue
        part_begun = time.perf_counter()
        try:
            found[name] = dict(work())
        except (RuntimeError, ValueError, OSError) as error:  # what came before is kept, and what comes after is tried
            found[name] = {"error": first_line(error)}
        say(f"{name}: {time.perf_counter() - part_begun:.0f} s, {found[name]}")
        write_json(args.out, found)


def parts(side: Side, device: torch.device, small: bool) -> list[tuple[str, Callable[[], Any], float]]:
    """Name, work and the share of the time that must be left for it to begin."""
    args = Namespace(model=MODEL)
    shapes = ("tiny",) if small else ("3b", "8b")
    layers, requests = ([2, 3], 2) if small else ([4, 5], 10)
    sizes = (256, 64) if small else (14336, 4096)
    found: list[tuple[str, Callable[[], Any], float]] = [
        (f"solve-{kept}-{past}", partial(compare, *sizes, 40 if small else 400, past, kept, device, check=1024), 0.1)
        for past in ((0, 20) if small else (0, 2000))
        for kept in ((8, 85) if small else (64, 512, 4778))
    ]
    found.append(("edit-135m", partial(edit, side, [4, 5, 6, 7, 8], 2 if small else 50), 0.2))
    found += [(f"edit-{shape}", partial(shaped, side, shape, layers, requests, device), 0.25) for shape in shapes]
    if not small:
        found += [
            ("statistics", partial(layer_statistics, side, args), 0.05),
            ("token", partial(token, side, args), 0.2),
        ]
    return found


def edit(side: Side, layers: list[int], requests: int) -> dict[str, float]:
    """A whole edit of the bundled model."""
    return compare_edits(side.bench.model, side.bench.tok, layers, requests)


def shaped(side: Side, shape: str, layers: list[int], requests: int, device: torch.device) -> dict[str, float]:
    """A whole edit of random weights in bf16."""
    model = random_model(shape, len(side.bench.tok), device, torch.bfloat16)
    anatomy(model).check_layers(layers)
    return compare_edits(model, side.bench.tok, layers, requests)


def name_of(device: torch.device) -> str:
    """The device as its driver calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


if __name__ == "__main__":
    main()
