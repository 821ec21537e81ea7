"""What every figure of the report shares: styles, label placement, and SVG fit for a page."""

import io
import re
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"

INK = "#010203"  # stands for the page's text colour until `to_svg` replaces it
WIDTH = 10.0  # inches; the page scales the picture to its column
# Hues of Okabe & Ito's colour-blind safe set, lightness moved to stand out on white and on black.
_STYLES = {
    "lora": ("#2f86c9", "o"),
    "full": ("#d9661f", "s"),
    "head": ("#8b8b8b", "D"),
    "bitfit": ("#159b78", "^"),
}
_OTHER_STYLES = (
    ("#c2699a", "v"), ("#d1940a", "P"), ("#7a6fd0", "X"), ("#4aa3c7", "<"),
    ("#b5483f", "h"), ("#6f9a24", ">"), ("#96703c", "d"), ("#cf63d6", "p"),
)  # fmt: skip
LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_STYLE_SHEET: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Drawing:
    """One figure: a name for its anchor, a title and a caption in plain text, and the SVG."""

    name: str
    title: str
    caption: str
    svg: str


def style_sheet():
    """A context in which matplotlib draws in the report's style."""
    return matplotlib.rc_context(_STYLE_SHEET)


def method_styles(methods) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method; those without their own take the next free one."""
    others = iter(_OTHER_STYLES * 8)
    return {
        name: _STYLES[name] if name in _STYLES else next(others, _OTHER_STYLES[0])
        for name in dict.fromkeys(methods)
    }


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element: scalable, in the page's ink and font, with its own ids."""
    with matplotlib.rc_context({"svg.hashsalt": name}):
        text = io.StringIO()
        figure.savefig(
            text,
            format="svg",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"'DejaVu Sans'(, sans-serif)?", FONT.replace("'", "&#39;"), svg)
    # Figures share a page, so an id such as "axes_1" must not be in two of them.
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def label_points(figure, axes, points, labels, colours, segments) -> None:
    """Writes each label beside its point, at the first of ten places where it covers nothing.

    points are (x, y) in data coordinates, as are the ends of the line segments to keep clear.
    """
    canvas = FigureCanvasAgg(figure)  # measures text
    canvas.draw()
    pixels = axes.transData.transform(points)
    unit = figure.dpi / 72
    taken = [(x - 5 * unit, y - 5 * unit, x + 5 * unit, y + 5 * unit) for x, y in pixels]
    for ends in segments:
        start, end = axes.transData.transform(ends)
        for x, y in np.linspace(start, end, 40):
            taken.append((x - 2 * unit, y - 2 * unit, x + 2 * unit, y + 2 * unit))
    frame = axes.get_window_extent()
    places = [
        (side * across, up)
        for across, up in ((9, 0), (9, 11), (9, -11), (9, 22), (9, -22))
        for side in (1, -1)
    ]
    for point, label, colour in zip(points, labels, colours, strict=True):
        if not np.isfinite(point).all():
            continue
        boxes = []
        for right, up in places:
            text = axes.annotate(
                label,
                point,
                (right, up),
                textcoords="offset points",
                ha="left" if right > 0 else "right",
                va="center",
                color=colour,
                fontweight="bold",
                fontsize=8.5,
                parse_math=False,
            )
            extent = text.get_window_extent(canvas.get_renderer())
            own = (extent.x0, extent.y0, extent.x1, extent.y1)
            outside = max(0.0, own[2] - frame.x1) + max(0.0, frame.x0 - own[0])
            covered = sum(_overlap(own, other) for other in taken)
            boxes.append((covered + outside, len(boxes), own, text))
        best = min(boxes, key=lambda box: box[:2])
        taken.append(best[2])
        for box in boxes:
            if box is not best:
                box[3].remove()


def _overlap(one, other) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)
