"""Draw the plots of a report: matplotlib figures as SVG in the page's colours, or as PNG for a README."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from editlib.errors import EditlibError
from editlib.files import atomic_path
from editlib.reports.summary import FORGET, KEEP, SHARES, interval, measure, number, right_of
from editlib.version import install_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {  # of a light page; in SVG replaced by the page's variables of the same names
    "ink": "#1b1f24",
    "muted": "#59626d",
    "line": "#d5d9de",
    "forget": "#b4511f",
    "keep": "#2f6f9f",
}
INK, MUTED, LINE = COLOURS["ink"], COLOURS["muted"], COLOURS["line"]
FAMILY_COLOURS = {FORGET: COLOURS["forget"], KEEP: COLOURS["keep"]}
WIDTH = 5.0  # inches: 360 units of SVG, so that 10 pt stay readable on a telephone
MOST_RELATIONS = 14
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
}


class ReportError(EditlibError, ValueError):
    """Reports that no report can be made: matplotlib is missing, or there is nothing to plot."""


class Plot(NamedTuple):
    """Holds a drawn figure with its caption, and a text alternative."""

    title: str
    note: str
    words: str
    svg: str


def plots(metrics: Mapping[str, Any]) -> list[Plot]:
    """Draws every plot for which `metrics` has numbers.

    Raises:
        ReportError: matplotlib is not installed.
    """
    require_matplotlib()
    receipt = metrics.get("receipt") or {}
    drawn = []
    with _style():
        for title, note, figure, words in (
            ("Shares", "with 95 % intervals; further right is better", *draw_shares(metrics)),
            ("By relation", "share and, below it, how many questions it is of", *draw_relations(metrics)),
            ("Size of the edit", "norm of the update over that of the weight", *draw_layers(receipt)),
            ("Time of the edit", "seconds, by part", *draw_timings(receipt)),
        ):
            if figure is not None:
                drawn.append(Plot(title, note, words, _svg(figure, title)))
    return drawn


def plot_png(metrics: Mapping[str, Any], path: Path) -> None:
    """Writes the plot of all shares as PNG, on white.

    Raises:
        ReportError: matplotlib is not installed, or `metrics` holds no share.
        OutputError: `path` cannot be written.
    """
    require_matplotlib()
    with _style():
        figure, _ = draw_shares(metrics)
        if figure is None:
            raise ReportError("no share to plot: all groups of the metrics are empty; evaluate some requests")
        with atomic_path(Path(path)) as temporary:
            figure.savefig(
                temporary,
                format="png",
                dpi=200,
                bbox_inches="tight",
                pad_inches=0.15,
                metadata={"Software": None},
            )


def require_matplotlib() -> None:
    """Raises `ReportError` if matplotlib is missing; call it before long work that ends in a report."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ReportError(f"a report needs matplotlib for its plots: {install_line('report')}") from None


def draw_shares(metrics: Mapping[str, Any]) -> tuple[Figure | None, str]:
    """Draws bars of all shares with their intervals, forgetting above keeping."""
    groups = {name: measure(metrics, name) for name in SHARES}
    shares = {name: group for name, group in groups.items() if number(group["value"]) is not None}
    if not shares:
        return None, ""
    figure, axes = _figure(0.6 + 0.33 * (len(shares) + len({SHARES[name].family for name in shares})))
    labels, at, family, words = {}, 0.0, None, []
    for name, group in shares.items():
        share, value, ends = SHARES[name], group["value"], interval(group)
        if share.family != family:
            family = share.family
            axes.text(0, at + 0.3, family, color=FAMILY_COLOURS[family], weight="bold", va="bottom")
            at += 1
        axes.barh(at, value, height=0.62, color=FAMILY_COLOURS[family], alpha=0.65)
        if ends:
            reach = [[max(value - ends[0], 0)], [max(ends[1] - value, 0)]]
            axes.errorbar(value, at, xerr=reach, color=INK, elinewidth=1.2, capsize=2.5)
        axes.text(1.04, at, f"{value:.2f}", va="center")
        axes.text(1.17, at, right_of(group), va="center", color=MUTED, size=9)
        labels[at] = share.short
        words.append(f"{share.short} {value:.2f}")
        at += 1
    axes.set_yticks(list(labels), list(labels.values()))
    axes.set(xlim=(0, 1.02), ylim=(at - 0.4, -0.3), xticks=[0, 0.25, 0.5, 0.75, 1])
    axes.grid(axis="x", linewidth=0.6)
    return figure, ", ".join(words)


def draw_relations(metrics: Mapping[str, Any]) -> tuple[Figure | None, str]:
    """Draws a heat map of the shares by relation, `MOST_RELATIONS` at most."""
    from matplotlib.patches import Rectangle

    table = {name: measure(metrics, name).get("by_relation") or {} for name in SHARES}
    table = {name: {r: c for r, c in cells.items() if _valued(c)} for name, cells in table.items()}
    columns = [name for name, cells in table.items() if cells]
    sizes: dict[str, int] = {}
    for name in columns:
        for relation, cell in table[name].items():
            sizes[relation] = sizes.get(relation, 0) + int(number(cell.get("n")) or 0)
    every = sorted(sizes, key=lambda relation: (-sizes[relation], relation))
    relations = every[:MOST_RELATIONS]
    if not relations:
        return None, ""
    figure, axes = _figure(0.5 + 0.45 * len(relations))
    words = []
    for y, relation in enumerate(relations):
        for x, name in enumerate(columns):
            cell = table[name].get(relation)
            if cell is None:
                axes.text(x, y, "–", ha="center", va="center", color=MUTED)
                continue
            value, colour = cell["value"], FAMILY_COLOURS[SHARES[name].family]
            look = {"color": colour, "alpha": 0.08 + 0.42 * min(max(value, 0), 1), "lw": 0}
            axes.add_patch(Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, **look))
            axes.text(x, y + 0.03, f"{value:.2f}", ha="center", va="bottom")
            axes.text(x, y + 0.03, str(cell.get("n", "")), ha="center", va="top", size=8)
            words.append(f"{relation}: {SHARES[name].short} {value:.2f}")
    heads = [SHARES[name].head for name in columns]
    axes.set_xticks(range(len(columns)), heads, size=8.5)
    axes.set_yticks(range(len(relations)), [_cut(relation.replace("_", " "), 18) for relation in relations])
    axes.xaxis.tick_top()
    if len(every) > MOST_RELATIONS:
        axes.set_xlabel(f"the {MOST_RELATIONS} largest of {len(every)} relations")
    axes.tick_params(length=0)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(relations) - 0.5, -0.5))
    axes.spines[:].set_visible(False)
    return figure, ", ".join(words)


def draw_layers(receipt: Mapping[str, Any]) -> tuple[Figure | None, str]:
    """Draws how large the update of each layer is, relative to its weight."""
    layers = receipt.get("layers") or {}
    ratios = {str(layer): norms["ratio"] for layer, norms in layers.items() if _valued(norms, "ratio")}
    if not ratios:
        return None, ""
    layers = sorted(ratios, key=lambda layer: (0, int(layer), "") if layer.isdecimal() else (1, 0, layer))
    figure, axes = _figure(2.4)
    bars = axes.bar(range(len(layers)), [ratios[layer] for layer in layers], width=0.62, color=MUTED)
    if len(layers) <= 10:
        axes.bar_label(bars, [f"{ratios[layer]:.3f}" for layer in layers], padding=2)
    shown = range(0, len(layers), 1 + len(layers) // 16)
    axes.set_xticks(shown, [_cut(layers[at], 10) for at in shown])
    middle, half = (len(layers) - 1) / 2, max(len(layers), 5) / 2 + 0.1  # so that bars stay narrow with few layers
    axes.set(xlabel="layer", xlim=(middle - half, middle + half))
    axes.margins(y=0.15)
    axes.grid(axis="y", linewidth=0.6)
    axes.tick_params(axis="y", labelcolor=MUTED)
    return figure, ", ".join(f"layer {layer} {ratios[layer]:.4f}" for layer in layers)


def draw_timings(receipt: Mapping[str, Any]) -> tuple[Figure | None, str]:
    """Draws how long each part of the edit took, in the order of the work."""
    timings = receipt.get("timings") or {}
    times = {str(part).replace("_", " "): timings[part] for part in timings if _valued(timings, part)}
    if not times:
        return None, ""
    figure, axes = _figure(0.55 + 0.33 * len(times))
    bars = axes.barh(range(len(times)), list(times.values()), height=0.62, color=MUTED)
    said = [f"{took:.0f} s" if took >= 0.5 or took == 0 else "< 1 s" for took in times.values()]
    axes.bar_label(bars, said, padding=4)
    axes.set_yticks(range(len(times)), [_cut(part, 24) for part in times])
    axes.set(ylim=(len(times) - 0.5, -0.5), xlim=(0, max(1, *times.values()) * 1.18))
    axes.grid(axis="x", linewidth=0.6)
    return figure, ", ".join(f"{part} {text}" for part, text in zip(times, said, strict=True))


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    return figure, axes


@contextmanager
def _style() -> Iterator[None]:
    """Applies our matplotlib settings instead of the user's, without warnings about missing glyphs."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        cast("dict[str, Any]", matplotlib.rcParams).update(STYLE)
        warnings.filterwarnings("ignore", "Glyph")
        yield


def _svg(figure: Figure, salt: str) -> str:
    """Writes the figure as an element of a page: no XML head, no metadata, no clashing ids, the page's colours."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": f"editlib {salt}"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue()
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") :])
    used = set(re.findall(r'(?:href="|url\()#(\w+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _valued(entry: Mapping[str, Any] | None, key: str = "value") -> bool:
    return number((entry or {}).get(key)) is not None


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
