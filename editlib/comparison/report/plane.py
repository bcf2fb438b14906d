"""Draw the forget-retain plane as SVG in the page's colours: numbers beside the points, names in the legend."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from editlib.comparison.cells import AXES

WIDTH, HEIGHT = 424, 404  # units of SVG; text of 11 units stays readable on a telephone
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 48
LETTER, LINE = 6.4, 11  # width of a letter and height of a line, for labels
SHAPES = {  # shape and page colour of each family
    "none": ("cross", "muted"),
    "closed form": ("circle", "keep"),
    "closed form, refusal": ("square", "other"),
    "fine-tuning": ("triangle", "forget"),
    "prompt": ("diamond", "extra"),
}
WAYS = [(1, 0), (0, -1), (-1, 0), (0, 1), (0.75, -0.75), (-0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)]


class Box(NamedTuple):
    """Describes a rectangle by its edges."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


def plane(summaries: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> str:
    """Draws the points of methods (their means, and small ones for each seed), and the front as a stepped line.

    Args:
        summaries: as in the results; numbered from 1 in this order, those without scores are not drawn.
        axes: the names of the axes.
    """
    placed = [(n, summary) for n, summary in enumerate(summaries, 1) if all(summary[axis] is not None for axis in AXES)]
    points = ", ".join(
        f"{summary['method']} {summary['forget']:.2f} and {summary['retain']:.2f}" for _, summary in placed
    )
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"forget and retain: {points}")}">',
        *_grid(axes),
        *_front([summary for _, summary in placed if summary["front"]]),
        *(mark for _, summary in placed for mark in _seeds(summary)),
        *(_marked(number, summary) for number, summary in placed),
        *_labels([(str(number), *_at(summary["forget"], summary["retain"])) for number, summary in placed]),
        "</svg>",
    ]
    return "\n".join(parts)


def mark(family: str, x: float = 0, y: float = 0, size: float = 4.6) -> str:
    """Draws the sign of a family around `(x, y)`."""
    shape, colour = SHAPES.get(family, ("circle", "ink"))
    look = f'style="fill:var(--{colour});stroke:var(--paper);stroke-width:.8"'
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}" {look}/>'
    ways = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "triangle": [(0, -1.15), (1.1, 0.85), (-1.1, 0.85)],
        "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        "cross": [
            *[(-1.1, -0.4), (-0.4, -0.4), (-0.4, -1.1), (0.4, -1.1), (0.4, -0.4), (1.1, -0.4)],
            *[(1.1, 0.4), (0.4, 0.4), (0.4, 1.1), (-0.4, 1.1), (-0.4, 0.4), (-1.1, 0.4)],
        ],
    }[shape]
    corners = " ".join(f"{x + size * a:.1f},{y + size * b:.1f}" for a, b in ways)
    return f'<polygon points="{corners}" {look}/>'


def _at(forget: float, retain: float) -> tuple[float, float]:
    x = LEFT + forget * (WIDTH - LEFT - RIGHT)
    return x, TOP + (1 - retain) * (HEIGHT - TOP - BOTTOM)


def _grid(axes: Sequence[str]) -> Iterator[str]:
    for step in range(5):
        value = step / 4
        (x, y), (left, bottom), (right, top) = _at(value, value), _at(0, 0), _at(1, 1)
        text = f"{value:g}"
        yield f'<path class="grid" d="M{x:.1f} {top:.1f}V{bottom:.1f}M{left:.1f} {y:.1f}H{right:.1f}"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{text}</text>'
        yield f'<text x="{left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield f'<text class="axis" x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">forget: {escape(axes[0])} →</text>'
    centre = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'transform="translate(12 {centre}) rotate(-90)"'
    yield f'<text class="axis" {turned} text-anchor="middle">retain: {escape(axes[1])} →</text>'


def _front(summaries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields the Pareto front as a stepped line: no measured point lies above it and to its right."""
    points = sorted({_at(summary["forget"], summary["retain"]) for summary in summaries})
    if points:
        start = _at(0, 0)
        steps = "".join(f"V{y:.1f}H{x:.1f}" for x, y in points)
        yield f'<path class="front" d="M{start[0]:.1f} {points[0][1]:.1f}{steps}V{start[1]:.1f}"/>'


def _seeds(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yields a small point per seed, if there are several."""
    points = [(forget, retain) for _, forget, retain in summary["points"] if None not in (forget, retain)]
    if len(points) < 2:
        return
    _, colour = SHAPES.get(summary["family"], ("circle", "ink"))
    for forget, retain in points:
        x, y = _at(forget, retain)
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" style="fill:var(--{colour});opacity:.45"/>'


def _marked(number: int, summary: Mapping[str, Any]) -> str:
    label = f"{number} {summary['method']}: forget {summary['forget']:.3f}, retain {summary['retain']:.3f}"
    drawn = mark(summary["family"], *_at(summary["forget"], summary["retain"]))
    return f"<g><title>{escape(label)}</title>{drawn}</g>"


def _labels(points: Sequence[tuple[str, float, float]]) -> Iterator[str]:
    """Yields each label as near to its point as possible without covering another label or point."""
    taken = [Box(x - 5, y - 5, x + 5, y + 5) for _, x, y in points]
    room = Box(LEFT - 6, 0, WIDTH, HEIGHT - BOTTOM + 6)
    for text, x, y in points:
        half, best = len(text) * LETTER / 2 + 1, None
        for away in (11, 15, 20, 26, 33, 41, 50):
            for across, down in WAYS:
                u, v = x + across * (away + half - 4), y + down * away
                box = Box(u - half, v - LINE / 2, u + half, v + LINE / 2)
                inside = room.left <= box.left and room.top <= box.top
                inside = inside and box.right <= room.right and box.bottom <= room.bottom
                if inside and not any(box.meets(other) for other in taken):
                    best = (u, v, box, away)
                    break
            if best:
                break
        u, v, box, away = best or (x, y, Box(x, y, x, y), 0)
        taken.append(box)
        if away > 15:
            yield f'<path class="lead" d="M{x:.1f} {y:.1f}L{u:.1f} {v:.1f}"/>'
        yield f'<text class="number" x="{u:.1f}" y="{v + 4:.1f}" text-anchor="middle">{escape(text)}</text>'
