"""One layer's closed form beside the published dense system, at the real size of a layer, on random keys.

    python benchmarks/solve.py --out runs/solve.json                    # Llama 3 8B's shape: 14336 x 4096, 400 keys
    python benchmarks/solve.py --d-ff 1536 --d-model 576                # SmolLM2's

editlib solves in fp64, the published form in fp32, as each does in use. The dense system costs the same whatever the
projector keeps out, so it is solved once. What editlib's update leaves of the equation, `|lhs - rhs| / |rhs|` in fp64,
bounds its error at any size; up to `--check` rows a dense solve in fp64 gives both sides' errors themselves.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from published import solve as dense_solve
from sides import measured, say
from torch import Tensor

from editlib.algorithms.closed_form import alphaedit
from editlib.algorithms.low_rank import LowRank
from editlib.algorithms.null_space import NullSpace
from editlib.files import write_json
from editlib.models.precision import wide_dtype

L2 = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-ff", type=int, default=14336)
    parser.add_argument("--d-model", type=int, default=4096)
    parser.add_argument("--keys", type=int, default=400, help="new keys")
    parser.add_argument("--past", type=int, nargs="*", default=[0, 2000], help="numbers of past keys")
    parser.add_argument("--kept-out", type=int, nargs="*", help="directions; default: 64, 512 and a third")
    parser.add_argument("--check", type=int, default=4096, help="largest d_ff that is solved densely in fp64, too")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    directions = args.kept_out or [64, 512, args.d_ff // 3]
    rows: list[dict[str, float]] = []
    for past, kept_out in itertools.product(args.past, directions):
        known = next((row for row in rows if row["past"] == past), None)  # its dense system costs the same
        row = compare(args.d_ff, args.d_model, args.keys, past, kept_out, args.device, known, args.check)
        rows.append(row)
        say(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
        if args.out:
            write_json(args.out, rows)


def compare(
    d_ff: int,
    d_model: int,
    n: int,
    past: int,
    kept_out: int,
    device: torch.device,
    known: dict[str, Any] | None = None,
    check: int = 4096,
) -> dict[str, float]:
    """Seconds and MiB of both sides, their ratios, and how exact they are.

    Args:
        known: the row of an earlier call with as many past keys: its dense figures are taken over.
        check: the largest `d_ff` at which both are compared with a dense solve in fp64.
    """
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    keys, before, residual = draw(d_ff, n), draw(d_ff, past), draw(d_model, n)
    wide = wide_dtype(device)
    space = NullSpace(torch.linalg.qr(draw(d_ff, kept_out).to(wide)).Q, False, d_ff - kept_out)
    inputs = keys.to(wide), residual.to(wide), before.to(wide)
    ours = measured(lambda: alphaedit(inputs[0], inputs[1], space, l2=L2, constraints=[inputs[2]]), device)
    row: dict[str, float] = {"d_ff": d_ff, "d_model": d_model, "keys": n, "past": past, "kept_out": kept_out}
    row |= {"seconds": ours.seconds, "mb": ours.memory_mb, "residual": left_over(ours.made, *inputs, space)}
    if known is None:
        basis = space.basis.float()
        p = torch.eye(d_ff, device=device) - basis @ basis.T
        total = before @ before.T  # what the published code holds of past keys; the projector, too, is there before
        dense = measured(lambda: dense_solve(keys, residual, p, total, L2), device)
        row |= {"dense_seconds": dense.seconds, "dense_mb": dense.memory_mb}
        if d_ff <= check:
            p, total = torch.eye(d_ff, device=device, dtype=wide) - space.basis @ space.basis.T, inputs[2] @ inputs[2].T
            exact = dense_solve(inputs[0], inputs[1], p, total, L2)
            row |= {"error": apart(ours.made.dense(), exact), "dense_error": apart(dense.made, exact)}
    else:
        row |= {name: known[name] for name in ("dense_seconds", "dense_mb")}
    row["time_ratio"] = row["dense_seconds"] / row["seconds"]
    row["memory_ratio"] = row["dense_mb"] / max(row["mb"], 1.0)
    return row


def left_over(delta: LowRank, keys: Tensor, residual: Tensor, past: Tensor, space: NullSpace) -> float:
    """What an update leaves of `(P (K K^T + K_p K_p^T) + L2 I) Δ^T = P K R^T`, as a share of the right side."""
    x = delta.right.T  # [d_ff, n]; Δ^T = x R^T, and R is a factor of both sides, so it is left out
    left = space.project(keys @ (keys.T @ x) + past @ (past.T @ x)) + L2 * x
    return apart(left, space.project(keys))


def apart(found: Tensor, wanted: Tensor) -> float:
    """The relative difference of two matrices, by Frobenius norms."""
    return float((found - wanted).norm() / wanted.norm())


if __name__ == "__main__":
    main()
