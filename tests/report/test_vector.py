"""Figures drawn without matplotlib: marks are where their ticks say, colours are the numbers."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from lora_jax.analysis.adapters import Pair, PairProfile
from lora_jax.report import adapter_figures, vector

SVG = "{http://www.w3.org/2000/svg}"


def figure(parts, name="x"):
    return ElementTree.fromstring(vector.svg(name, 300, parts))


def test_points_lie_at_the_ticks_of_their_values():
    (box,), _ = vector.boxes(1, 300)
    curve = vector.Curve([1, 2, 4], [0.1, 0.01, 10.0], "#123456")
    root = figure([vector.chart(box, [curve], "title", "x", "y")])
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SVG}circle")]
    texts = {t.text: (float(t.get("x")), float(t.get("y"))) for t in root.iter(f"{SVG}text")}
    for (x, y), number, value in zip(circles, "124", ("0.1", "0.01", "10"), strict=True):
        assert y == pytest.approx(texts[value][1] - 4, abs=0.2)
        if number != "1":  # of both axes
            assert x == pytest.approx(texts[number][0], abs=0.2)
        assert box.x <= x <= box.x + box.width and box.y <= y <= box.y + box.height


@pytest.mark.parametrize("y", [[], [np.nan, 0.0], [3.0], [2.1, 2.2, 2.3], [1e-30, 1e30]])
def test_a_chart_of_any_values_has_a_tick_and_stays_in_its_box(y):
    (box,), _ = vector.boxes(1, 300)
    curve = vector.Curve(range(1, len(y) + 1), y)
    root = figure([vector.chart(box, [curve], "t", "x")])
    assert [t for t in root.iter(f"{SVG}text") if re.fullmatch(r"1(e[+-]\d+|0*)|0\.0*1", t.text)]
    for circle in root.iter(f"{SVG}circle"):
        assert box.y - 0.1 <= float(circle.get("cy")) <= box.y + box.height + 0.1


def test_a_heat_map_has_a_pixel_per_cell_brighter_the_larger_and_row_one_below():
    (box,), _ = vector.boxes(1, 300)
    grid = np.linspace(0, 1, 12).reshape(3, 4)
    root = figure([vector.heat_map(box, grid, "t", "j", "i")])
    data = next(root.iter(f"{SVG}image")).get("href").partition(",")[2]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"), int)
    assert pixels.shape == (3, 4)
    assert np.all(np.diff(pixels[::-1].reshape(-1)) > 0)


def test_hostile_names_stay_text_and_long_ones_fit():
    (box,), _ = vector.boxes(1, 300)
    name = "<script>&\"'" + "x" * 400
    root = figure(
        [vector.chart(box, [], name, name, name), vector.legend(280, [(name, "#fff", "o-")])], name
    )
    assert not list(root.iter("script")) and not list(root.iter(f"{SVG}script"))
    assert all(len(t.text) < 160 for t in root.iter(f"{SVG}text"))


def test_every_two_of_many_adapters_have_a_cell():
    grid = np.ones((1, 1))

    def pair(first, second, value):
        own = (grid * value, grid * value / 2, grid, grid, grid)
        return Pair(first, second, (PairProfile("w", (4, 4), *own),), (), ())

    drawing = adapter_figures.draw_overview(
        ["a", "b", "c"], [pair("a", "b", 1), pair("b", "c", 0.5)]
    )
    root = ElementTree.fromstring(drawing.svg)
    data = next(root.iter(f"{SVG}image")).get("href").partition(",")[2]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"), int)[::-1]
    assert pixels[0, 1] == pixels.max() and pixels[0, 1] > pixels[1, 0] > pixels[0, 2]
    assert pixels[1, 2] == pixels[1, 0]
