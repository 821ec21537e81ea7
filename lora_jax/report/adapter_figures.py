"""Figures of what adapters learned: spectra, φ next to that of random spaces, ΔW next to W."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lora_jax.analysis.adapters import Pair
from lora_jax.analysis.formulas import expected_similarity
from lora_jax.analysis.profiles import MatrixProfile
from lora_jax.report import vector
from lora_jax.report.drawing import Drawing
from lora_jax.report.vector import Curve

MAX_PANELS = 9
WIDTH_MARGIN = 220  # on both sides of a single square figure
_HUES = (
    "#2f86c9", "#d9661f", "#159b78", "#c2699a", "#d1940a", "#7a6fd0", "#4aa3c7", "#b5483f",
    "#6f9a24",
)  # fmt: skip


def group_by_kind(modules: Iterable[str]) -> dict[str, list[str]]:
    """Modules by what they are in each layer: the name with its numbers left out.

    >>> group_by_kind(["layers.0.q_proj", "layers.1.q_proj"])
    {'layers.*.q_proj': ['layers.0.q_proj', 'layers.1.q_proj']}
    """
    found: dict[str, list[str]] = {}
    for module in modules:
        kind = re.sub(r"(?<![^./\[])\d+(?![^./\]])", "*", module)
        # Names of kohya's files have underscores for dots.
        kind = re.sub(r"(blocks|layers|attentions|resnets)_\d+(?=_)", r"\1_*", kind)
        found.setdefault(kind, []).append(module)
    return found


def draw_spectra(named: dict[str, list[MatrixProfile]]) -> Drawing:
    """Singular values of ΔW over the largest, a panel per adapter, a line per matrix."""
    names = list(named)[:MAX_PANELS]
    kinds = group_by_kind(p.module for name in names for p in named[name])
    colours = {kind: _HUES[n % len(_HUES)] for n, kind in enumerate(kinds)}
    colour_of = {module: colours[kind] for kind, some in kinds.items() for module in some}
    places, height = vector.boxes(len(names), 260)
    parts = []
    for box, name in zip(places, names, strict=True):
        curves = [
            Curve(range(1, s.size + 1), (s / s[0]).tolist(), colour, marker="o" * (s.size <= 16))
            for s, colour in ((p.s[p.s > 0], colour_of[p.module]) for p in named[name])
            if s.size
        ]
        label = "singular value / largest" if box is places[0] else ""
        parts.append(vector.chart(box, curves, name, "direction", label))
    shown = [(kind, colour, "-") for kind, colour in list(colours.items())[:12]]
    parts.append(vector.legend(height + 16, shown))
    caption = (
        "Singular values of ΔW, each matrix by its largest. A line that falls at once is a change "
        "of few directions, whatever rank was paid for."
    )
    if len(named) > len(names):
        caption += f" The first {len(names)} of {len(named)} adapters."
    picture = vector.svg("spectra", height + 20 + 17 * -(-len(shown) // vector.ACROSS), parts)
    return Drawing("spectra", "Spectra of ΔW", caption, picture)


def draw_similarity(pair: Pair, number: int, space: str = "input") -> Drawing:
    """Heat-maps of φ(i, j), the mean over the layers of each kind of matrix, and the random one."""
    name, axis = f"similarity-{number}-{space}", 0 if space == "input" else 1
    grids, left_out = _grids_by_kind(pair.profiles, lambda p: getattr(p, space), axis)
    caption = (
        f"φ(i, j) of the first i directions of {pair.first} and the first j of {pair.second} in "
        f"the space of {space}s: 1 where the smaller space lies in the larger one. Last, what two "
        "random spaces of the same widths have in common, max(i, j) / d: only what exceeds it was "
        f"learned.{left_out}"
    )
    title = f"{pair.first} and {pair.second}: directions of {space}s"
    return Drawing(name, title, caption, _heat_maps(grids, name, pair.first, pair.second))


def draw_against_kernel(name: str, number: int, profiles: list[MatrixProfile]) -> Drawing:
    """φ of W's and ΔW's directions (Figure 8), the mean over the layers of each kind."""
    grids, left_out = _grids_by_kind(profiles, lambda p: p.kernel_similarity, 0)
    svg = _heat_maps(grids, f"kernel-{number}", "W", f"ΔW of {name}")
    caption = (
        "φ(i, j) of W's first i directions of inputs and ΔW's first j. Near the random panel: ΔW "
        f"reads directions that W does not emphasise (Hu et al. 2021, Figure 8).{left_out}"
    )
    return Drawing(f"kernel-{number}", f"{name}: ΔW's directions among W's", caption, svg)


def draw_amplification(named: dict[str, list[MatrixProfile]]) -> Drawing:
    """Table 7 as a figure: what W holds in ΔW's, its own and random directions; the factor."""
    shares, factors, lines = [], [], []
    for n, (name, profiles) in enumerate(named.items()):
        colour = _HUES[n % len(_HUES)]
        found = [p.amplification for p in profiles if p.amplification is not None]
        x = range(1, len(found) + 1)
        for marker, part in (("v", "from_kernel"), ("o", "from_delta"), ("x", "from_random")):
            y = [_positive(getattr(one, part), one.kernel_norm) for one in found]
            shares.append(Curve(x, y, colour, False, marker))
        factors.append(Curve(x, [_positive(one.factor, 1.0) for one in found], colour))
        null = [_positive(one.random_factor, 1.0) for one in found]
        factors.append(Curve(x, null, colour, False, "x"))
        lines.append((name, colour, "o-"))
    marks = [("v", "in its own first r"), ("o", "in ΔW's r"), ("x", "in r random ones")]
    (left, right), height = vector.boxes(2, 300, across=2)
    matrix = "matrix, in the adapter's order"
    keys = [(what, "currentColor", marker) for marker, what in marks] + lines
    parts = [
        vector.chart(left, shares, "Share of ‖W‖ in r directions of inputs and outputs", matrix),
        vector.chart(right, factors, "Amplification, ‖ΔW‖ / ‖UᵀWV‖", matrix),
        vector.legend(height + 16, keys),
    ]
    caption = (
        "Hu et al. 2021, Table 7, of every matrix. Left: ΔW's own directions above random ones say "
        "that W was there already, below its first ones that it was not prominent. Right: how much "
        "stronger ΔW is in them than W; crosses are a ΔW of the same norm in random directions. "
        "Only the distance from the crosses was learned."
    )
    picture = vector.svg("amplification", height + 20 + 17 * -(-len(keys) // vector.ACROSS), parts)
    return Drawing("amplification", "What ΔW amplifies", caption, picture)


def draw_overview(names: list[str], pairs: Sequence[Pair]) -> Drawing:
    """φ(1, 1) of every two adapters, the mean over their common matrices, as one heat map."""
    grid = np.full((len(names), len(names)), np.nan)
    for pair in pairs:
        if pair.profiles:
            i, j = names.index(pair.first), names.index(pair.second)
            value = np.mean([[p.input[0, 0], p.output[0, 0]] for p in pair.profiles], axis=0)
            grid[i, j], grid[j, i] = value
    (box,), height = vector.boxes(1, 460, across=1)
    box = vector.Box(WIDTH_MARGIN, box.y, vector.WIDTH - 2 * WIDTH_MARGIN, box.height)
    number = "number of the adapter, in the order of the table"
    parts = [
        vector.heat_map(box, grid, "φ(1, 1), mean over matrices", number, number),
        vector.colour_bar(height + 8, "φ"),
    ]
    caption = (
        "How much the first directions of every two adapters have in common: outputs below the "
        "diagonal's place of a pair (i, j), i < j, inputs above it."
    )
    return Drawing(
        "overview", "Every two adapters", caption, vector.svg("overview", height + 30, parts)
    )


def _grids_by_kind(
    profiles, grid_of: Callable[[Any], np.ndarray], axis: int
) -> tuple[dict[str, np.ndarray], str]:
    """`{title: grid}`: the mean of each kind of matrix, then random spaces of each width.

    And a sentence where there are more kinds than panels. `axis` of a matrix's shape is the width.
    """
    by_name = {profile.module: profile for profile in profiles}
    kinds = group_by_kind(by_name)
    found, random = {}, {}
    for kind, modules in list(kinds.items())[:MAX_PANELS]:
        # Means are over what can be added: grids of the commonest size.
        sizes = [(grid_of(by_name[m]).shape, by_name[m].shape) for m in modules]
        (size, shape), _ = Counter(sizes).most_common(1)[0]
        some = [by_name[m] for m, own in zip(modules, sizes, strict=True) if own == (size, shape)]
        found[f"{kind}\nmean of {len(some)}"] = np.mean([grid_of(p) for p in some], axis=0)
        title = f"random, expected\nof d = {shape[axis]:,}"
        random.setdefault(title, expected_similarity(size[0], size[1], shape[axis]))
    more = f" The first {MAX_PANELS} of {len(kinds)} kinds." if len(kinds) > MAX_PANELS else ""
    return found | random, more


def _heat_maps(grids: dict[str, np.ndarray], name: str, first: str, second: str) -> str:
    places, height = vector.boxes(len(grids), 250)
    parts = [
        vector.heat_map(box, grid, title, f"j, {second}", f"i, {first}")
        for box, (title, grid) in zip(places, grids.items(), strict=True)
    ]
    return vector.svg(name, height + 24, [*parts, vector.colour_bar(height + 4, "φ")])


def _positive(part: float, whole: float) -> float:
    """part / whole where it has a place on a logarithmic axis, else nan."""
    value = float(part / whole) if whole else np.nan
    return value if value > 0 and np.isfinite(value) else np.nan
