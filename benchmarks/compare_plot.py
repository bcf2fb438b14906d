"""The forget-retain planes of comparisons as one picture.

    python benchmarks/compare_plot.py runs/results-facts runs/results-tofu --out docs/images/results.png

Each folder is one that `editlib compare --out` wrote; every set of it gets a panel. Points on the Pareto front are
filled.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

LOOKS = {  # of the families: marker, colour
    "none": ("X", "#6b7280"),
    "closed form": ("o", "#1f6f5c"),
    "closed form, refusal": ("s", "#3b6fb6"),
    "fine-tuning": ("^", "#b4532a"),
    "prompt": ("D", "#8a5fb0"),
}


def draw(panel: Axes, name: str, about: dict[str, Any]) -> None:
    """One set: forgetting to the right, keeping upwards; higher is better on both."""
    for number, one in enumerate(about["methods"], 1):
        x, y = one["forget"], one["retain"]
        if x is None or y is None:
            continue
        marker, colour = LOOKS.get(one["family"], ("o", "black"))
        style = "full" if one["front"] else "none"
        label = f"{number} {one['method']}"
        panel.plot(x, y, marker, color=colour, markersize=8, fillstyle=style, linestyle="none", label=label)
        above = number % 2 == 0  # neighbouring points are often neighbours in the list
        panel.annotate(str(number), (x, y), (0, 8 if above else -15), textcoords="offset points", ha="center")
    panel.set(title=name, xlim=(-0.03, 1.05), ylim=(-0.03, 1.08))
    panel.set_xlabel(f"forget: {about['axes'][0]}", fontsize=8)
    panel.set_ylabel(f"retain: {about['axes'][1]}", fontsize=8)
    panel.grid(color="#d5d9de")
    panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="what `editlib compare --out` wrote")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    args = parser.parse_args()
    sets: dict[str, Any] = {}
    for folder in args.folders:
        try:
            sets |= json.loads((folder / "results.json").read_text(encoding="utf-8"))["sets"]
        except OSError as error:
            raise SystemExit(
                f"{folder}: no finished comparison ({error.strerror}); run `editlib compare` first"
            ) from None
    figure = Figure(figsize=(5.2 * len(sets), 5.6), layout="constrained")
    for panel, (name, about) in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets.items(), strict=True):
        draw(panel, name, about)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
