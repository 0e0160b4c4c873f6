"""Labels beside the bubbles of a chart, placed so that they cover neither each other nor a bubble."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Box", "place", "place_labels"]

_ANGLES = 16
_GAPS = (3, 8, 15, 24, 36, 50, 68, 90)  # between bubble and label, pixels at 100 dots per inch
_SWEEPS = 4
_ALONG = tuple(step / 12 for step in range(1, 12))  # where a line to a label is looked at


class Box(NamedTuple):
    """A rectangle, in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Area that two rectangles share."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0) * max(height, 0)

    def holds(self, x: float, y: float) -> bool:
        """Whether a point is inside."""
        return self.left < x < self.right and self.bottom < y < self.top

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The point of the rectangle that is nearest to (x, y)."""
        return min(max(x, self.left), self.right), min(max(y, self.bottom), self.top)

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.top - self.bottom)


def place(bubbles: list[tuple[float, float, float]], sizes: list[tuple[float, float]], frame: Box) -> list[Box]:
    """Choose a rectangle for the label of each bubble.

    Each label takes, in turn, the position of least cost around its bubble: what it covers of other labels and bubbles
    or lies outside counts by area, labels that a line to it would cross count, and distance counts a little. After the
    first turn there are more, in which labels give way to those that came later.

    Parameters
    ----------
    bubbles
        Centre and radius, in pixels.
    sizes
        Width and height of the labels.
    frame
        What the labels are to stay in.
    """
    discs = [Box(x - r, y - r, x + r, y + r) for x, y, r in bubbles]
    chosen: dict[int, Box] = {}
    for _ in range(_SWEEPS):
        for i, ((x, y, r), (width, height)) in enumerate(zip(bubbles, sizes, strict=True)):
            others = [box for j, box in chosen.items() if j != i]

            def line(box: Box, x: float = x, y: float = y) -> list[tuple[float, float]]:
                end = box.nearest(x, y)
                return [(x + (end[0] - x) * t, y + (end[1] - y) * t) for t in _ALONG]

            def cost(candidate: tuple[float, Box], others: list[Box] = others) -> float:
                gap, box = candidate
                covered = sum(map(box.overlap, others)) + sum(map(box.overlap, discs))
                crossed = sum(other.holds(*point) for point in line(box) for other in others) if gap > _GAPS[1] else 0
                return 2 * covered + 4 * (box.area - box.overlap(frame)) + gap + 20 * crossed

            chosen[i] = min(_candidates(x, y, r, width, height), key=cost)[1]
    return [chosen[i] for i in range(len(bubbles))]


def _candidates(x: float, y: float, r: float, width: float, height: float) -> list[tuple[float, Box]]:
    """Gaps and rectangles around a bubble, the nearest and rightmost first."""
    found: list[tuple[float, Box]] = []
    for gap in _GAPS:
        for turn in range(_ANGLES):
            angle = (turn // 2 + turn % 2) * (-1) ** turn * 2 * math.pi / _ANGLES  # 0, then both sides of it
            # The point of the label next to the bubble: its left end to the right of it, its lower edge above it.
            dx, dy = math.cos(angle), math.sin(angle)
            cx = x + (r + gap) * dx + width / 2 * max(-1.0, min(1.0, 2 * dx))
            cy = y + (r + gap) * dy + height / 2 * dy
            found.append((gap, Box(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)))
    return found


def place_labels(axes: Axes, points: list[tuple[float, float]], areas: list[float], labels: list[str], colour: str,
                 fontsize: float = 8) -> None:
    """Write `labels` beside the bubbles of a scatter plot, with thin lines to those that are not next to theirs.

    Parameters
    ----------
    axes
        Of a figure whose layout is done; limits and size must not change afterwards.
    points, areas
        Data coordinates, and areas in points squared as `scatter` takes them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(axes.figure).get_renderer()  # type: ignore[arg-type, no-untyped-call]
    scale = axes.figure.dpi / 72
    texts = [axes.text(0, 0, label, fontsize=fontsize, color=colour, ha="center", va="center", transform=None)
             for label in labels]
    extents = [text.get_window_extent(renderer) for text in texts]
    pixels = axes.transData.transform(points)
    bubbles = [(x, y, scale * math.sqrt(area / math.pi)) for (x, y), area in zip(pixels, areas, strict=True)]
    frame = axes.get_window_extent(renderer)
    boxes = place(bubbles, [(1.06 * e.width + 2, e.height) for e in extents],
                  Box(frame.x0 + 2, frame.y0 + 2, frame.x1 - 2, frame.y1 - 2))
    for text, box, (x, y, r) in zip(texts, boxes, bubbles, strict=True):
        cx, cy = (box.left + box.right) / 2, (box.bottom + box.top) / 2
        text.remove()
        near = box.nearest(x, y)
        distance = math.hypot(near[0] - x, near[1] - y)
        to_data = axes.transData.inverted().transform
        place_x, place_y = to_data((cx, cy))
        axes.text(place_x, place_y, text.get_text(), fontsize=fontsize, color=colour, ha="center", va="center",
                  zorder=5)
        if distance > r + 6:
            start = (x + (near[0] - x) * r / distance, y + (near[1] - y) * r / distance)
            axes.plot(*zip(*to_data([start, near]), strict=True), color=colour, linewidth=0.5, alpha=0.6, zorder=1,
                      scalex=False, scaley=False)
