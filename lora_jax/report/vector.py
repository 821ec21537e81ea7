"""Charts and heat maps as SVG text, for pages that should not wait for matplotlib.

Its import alone takes as long as all else that `lora-jax analyze` does. Colours of text and axes
are the page's (`currentColor`).
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from lora_jax.report.drawing import FONT

WIDTH = 960  # of a figure; the page scales the picture to its column
ACROSS = 3  # panels in a row
_LEFT, _TOP, _RIGHT, _BOTTOM = 58, 38, 14, 42  # of a panel, around what is drawn
_SIZE = 11  # of text
_RAMP = ((32, 24, 74), (43, 86, 150), (34, 148, 140), (122, 196, 84), (250, 228, 70))


@dataclass(frozen=True)
class Curve:
    """Points of one colour; `line` joins them, `marker` is "o", "v", "x" or "" for none."""

    x: Sequence[float]
    y: Sequence[float]
    colour: str = "currentColor"
    line: bool = True
    marker: str = "o"


@dataclass(frozen=True)
class Box:
    """The place of a panel's plot in the figure: left, top, width and height."""

    x: float
    y: float
    width: float
    height: float


def svg(name: str, height: float, parts: Iterable[str]) -> str:
    """The figure as an <svg> element of `WIDTH` by `height`."""
    font = escape(FONT)
    return (
        f'<svg role="img" aria-label="{escape(name)}" xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 {WIDTH} {height:.0f}" font-family="{font}" font-size="{_SIZE}" '
        f'fill="currentColor">{"".join(parts)}</svg>'
    )


def boxes(number: int, height: float, *, across: int = ACROSS) -> tuple[list[Box], float]:
    """Places of `number` panels in rows, each `height` with its margins, and where they end."""
    across = min(across, number)
    wide = WIDTH / across
    places = [
        Box(
            n % across * wide + _LEFT,
            n // across * height + _TOP,
            wide - _LEFT - _RIGHT,
            height - _TOP - _BOTTOM,
        )
        for n in range(number)
    ]
    return places, -(-number // across) * height


def chart(box: Box, curves: Sequence[Curve], title: str, x_label: str, y_label: str = "") -> str:
    """A panel of curves: x from 1 by whole numbers, y on a logarithmic axis."""
    finite = [y for curve in curves for y in curve.y if y > 0 and math.isfinite(y)]
    last = max([2.0, *(x for curve in curves for x in curve.x)])
    low, high = _decades(finite)

    def place(x: float, y: float) -> tuple[float, float]:
        up = (math.log10(y) - low) / (high - low)
        return box.x + box.width * (x - 0.5) / last, box.y + box.height * (1 - up)

    parts = [_frame(box, title, x_label, y_label)]
    powers = range(math.ceil(low), math.floor(high) + 1)
    for power in powers[:: max(1, len(powers) // 6)]:
        parts.append(_tick_y(box, place(1, 10.0**power)[1], f"{10.0**power:g}"))
    for x in _whole_ticks(last):
        parts.append(_tick_x(box, place(x, 10**low)[0], str(x)))
    for curve in curves:
        points = [
            place(x, y) for x, y in zip(curve.x, curve.y, strict=True) if y > 0 and math.isfinite(y)
        ]
        parts.append(_curve(points, curve))
    return "".join(parts)


def heat_map(box: Box, grid: np.ndarray, title: str, x_label: str, y_label: str) -> str:
    """A panel of a grid of numbers from 0 to 1; the first row is at the bottom."""
    rows, columns = grid.shape
    parts = [
        f'<image x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" '
        f'preserveAspectRatio="none" style="image-rendering:pixelated" href="{_png(grid)}"/>',
        _frame(box, title, x_label, y_label),
    ]
    for x in _whole_ticks(columns):
        parts.append(_tick_x(box, box.x + box.width * (x - 0.5) / columns, str(x)))
    for y in _whole_ticks(rows):
        parts.append(_tick_y(box, box.y + box.height * (1 - (y - 0.5) / rows), str(y), grid=False))
    return "".join(parts)


def colour_bar(y: float, label: str) -> str:
    """What the colours of heat maps mean, from 0 to 1."""
    box = Box(WIDTH / 2 - 100, y, 200, 10)
    ramp = heat_map(box, np.linspace(0, 1, 64)[None], "", "", "").split("/>")[0] + "/>"
    return (
        ramp
        + text(box.x - 8, y + 9, f"{label} = 0", "end")
        + text(box.x + box.width + 8, y + 9, "1")
    )


def legend(y: float, entries: Sequence[tuple[str, str, str]], *, left: float = 0) -> str:
    """Labels with colour and marker ("-" for a line), three in a row."""
    parts, wide = [], (WIDTH - left) / ACROSS
    for n, (label, colour, marker) in enumerate(entries):
        x, at = left + 16 + n % ACROSS * wide, y + n // ACROSS * 17
        line = marker in ("-", "o-")
        curve = Curve((), (), colour, line, "" if marker == "-" else marker[0])
        parts.append(_curve([(x, at - 4), (x + 18, at - 4)] if line else [(x + 9, at - 4)], curve))
        parts.append(text(x + 24, at, _shortened(label, wide - 40)))
    return "".join(parts)


def text(x: float, y: float, content: str, anchor: str = "start", more: str = "") -> str:
    """A line of text at a place; nothing where it is empty."""
    if not content:
        return ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(content)}</text>'


def _frame(box: Box, title: str, x_label: str, y_label: str) -> str:
    """Axes, a title of one line or two, and labels."""
    lines = [_shortened(line, box.width + _LEFT) for line in title.split("\n")]
    head = [
        text(box.x, box.y - 8 - 14 * (len(lines) - 1 - n), line, more=' font-weight="600"')
        for n, line in enumerate(lines)
    ]
    middle, left = box.y + box.height / 2, box.x - 44
    turned = f' transform="rotate(-90 {left:.1f} {middle:.1f})"'
    return "".join(
        [
            *head,
            f'<path d="M{box.x:.1f} {box.y:.1f}v{box.height:.1f}h{box.width:.1f}" fill="none" '
            'stroke="currentColor"/>',
            text(
                box.x + box.width / 2,
                box.y + box.height + 32,
                _shortened(x_label, box.width + _LEFT),
                "middle",
            ),
            text(left, middle, _shortened(y_label, box.height + _TOP), "middle", turned),
        ]
    )


def _tick_x(box: Box, x: float, label: str) -> str:
    end = box.y + box.height
    return (
        f'<path d="M{x:.1f} {end:.1f}v4" stroke="currentColor"/>'
        f"{text(x, end + 16, label, 'middle')}"
    )


def _tick_y(box: Box, y: float, label: str, *, grid: bool = True) -> str:
    across = (
        f'<path d="M{box.x:.1f} {y:.1f}h{box.width:.1f}" stroke="currentColor" opacity="0.12"/>'
    )
    return (
        f'{across if grid else ""}<path d="M{box.x:.1f} {y:.1f}h-4" stroke="currentColor"/>'
        f"{text(box.x - 7, y + 4, label, 'end')}"
    )


def _curve(points: Sequence[tuple[float, float]], curve: Curve) -> str:
    parts = []
    if curve.line and len(points) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{curve.colour}" stroke-width="1.3" '
            'opacity="0.7"/>'
        )
    parts += [_mark(x, y, curve.marker) for x, y in points if curve.marker]
    return f'<g fill="{curve.colour}" stroke="{curve.colour}">{"".join(parts)}</g>'


def _mark(x: float, y: float, marker: str) -> str:
    if marker == "o":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" stroke="none"/>'
    shape = "m-3 -3l6 6m0 -6l-6 6" if marker == "x" else "m-3 -2.5h6l-3 5.5z"
    return f'<path d="M{x:.1f} {y:.1f}{shape}"/>'


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """The ends of a logarithmic axis, as powers of ten, with a tick at least."""
    if not values:
        return -1.0, 0.0
    low, high = math.log10(min(values)), math.log10(max(values))
    pad = 0.05 * (high - low) + 0.02
    low, high = low - pad, high + pad
    if math.ceil(low) > math.floor(high):  # no power of ten between them
        low, high = (math.floor(low), high) if low % 1 < 0.5 else (low, math.ceil(high))
    return low, high


def _whole_ticks(last: float) -> list[int]:
    """At most eight whole numbers from 1 to `last`."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if last / s <= 8)
    return [1, *range(step if step > 1 else 2, int(last) + 1, step)]


def _shortened(line: str, width: float) -> str:
    """A line that fits, the beginning left out: the ends of names tell them apart."""
    most = max(8, int(width / (0.56 * _SIZE)))
    return line if len(line) <= most else f"…{line[1 - most :]}"


def _png(grid: np.ndarray) -> str:
    """The grid in the colours of the ramp, a pixel per cell, as a data URI."""
    at = np.clip(np.nan_to_num(np.asarray(grid, np.float64)[::-1]), 0, 1) * (len(_RAMP) - 1)
    stops = np.arange(len(_RAMP))
    channels = [np.interp(at, stops, channel) for channel in zip(*_RAMP, strict=True)]
    pixels = np.round(np.stack(channels, axis=-1)).astype(np.uint8)
    rows, columns = grid.shape
    lines = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 6)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
