"""What every figure of the report shares: styles, label placement, and SVG fit for a page."""

import io
import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend

from lora_jax.report.drawing import FONT
from lora_jax.report.drawing import Drawing as Drawing

INK = "#010203"  # stands for the page's text colour until `to_svg` replaces it
ACROSS = 3  # panels in a row
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


# Decorates functions that draw.
in_style = matplotlib.rc_context(_STYLE_SHEET)


def panels(
    number: int, margin: float, height: float, *, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of `number` panels in rows of `ACROSS`, `height` inches a row and `margin` once."""
    across = min(ACROSS, number)
    down = -(-number // across)
    figure = Figure(figsize=(WIDTH, margin + height * down), layout="constrained")
    grid = figure.subplots(down, across, sharey=sharey, squeeze=False).ravel()
    for empty in grid[number:]:
        empty.remove()
    return figure, list(grid[:number])


def plain_legend(owner: Figure | Axes, handles, labels, **options) -> Legend:
    """A legend whose labels are texts, not formulas; none is left out for how it begins."""
    legend = owner.legend(list(handles), list(labels), **options)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return legend


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
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=none)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    for side in ("width", "height"):
        svg = re.sub(rf'(<svg[^>]*?) {side}="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"'DejaVu Sans'(, sans-serif)?", FONT.replace("'", "&#39;"), svg)
    # Figures share a page, so an id such as "axes_1" must not be in two of them.
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def label_points(figure, axes, points, labels, colours, segments) -> None:
    """Writes each label next to its point, at the first of ten places where it covers nothing.

    points are (x, y) in data coordinates, as are the ends of the line segments to keep clear.
    """
    canvas = FigureCanvasAgg(figure)  # measures text
    canvas.draw()
    unit = figure.dpi / 72
    pixels = axes.transData.transform(points)
    on_lines = [
        np.linspace(start, end, 40)
        for start, end in (axes.transData.transform(ends) for ends in segments)
    ]
    taken = [_boxes(pixels, 5 * unit), *(_boxes(one, 2 * unit) for one in on_lines)]
    frame = axes.get_window_extent()
    places = [
        (side * across, up)
        for across, up in ((9, 0), (9, 11), (9, -11), (9, 22), (9, -22))
        for side in (1, -1)
    ]
    for point, label, colour in zip(points, labels, colours, strict=True):
        if not np.isfinite(point).all():
            continue
        tried = []
        for right, up in places:
            text = axes.annotate(
                label, point, (right, up), textcoords="offset points",
                ha="left" if right > 0 else "right", va="center", color=colour,
                fontweight="bold", fontsize=8.5, parse_math=False,
            )  # fmt: skip
            own = text.get_window_extent(canvas.get_renderer()).extents
            outside = max(0.0, own[2] - frame.x1) + max(0.0, frame.x0 - own[0])
            tried.append((_overlap(own, np.concatenate(taken)) + outside, len(tried), own, text))
        _, best, own, _ = min(tried, key=lambda one: one[:2])
        taken.append(own[None])
        for place, (*_, text) in enumerate(tried):
            if place != best:
                text.remove()


def _boxes(points: np.ndarray, reach: float) -> np.ndarray:
    """(N, 4) boxes left, bottom, right, top around (N, 2) points."""
    return np.concatenate([points - reach, points + reach], axis=1)


def _overlap(box: np.ndarray, others: np.ndarray) -> float:
    """The area that `box` (4,) shares with `others` (N, 4)."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return float(np.maximum(sides, 0.0).prod(axis=1).sum())
