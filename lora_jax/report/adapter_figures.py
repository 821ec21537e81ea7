"""Figures of what adapters learned: spectra, φ next to that of random spaces, ΔW next to W."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lora_jax.analysis.adapters import MatrixProfile, Pair
from lora_jax.analysis.subspaces import expected_similarity
from lora_jax.report.canvas import INK, WIDTH, Drawing, in_style, panels, plain_legend, to_svg

MAX_PANELS = 9
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
        found.setdefault(re.sub(r"(?<![^./\[])\d+(?![^./\]])", "*", module), []).append(module)
    return found


@in_style
def draw_spectra(named: dict[str, list[MatrixProfile]]) -> Drawing:
    """Singular values of ΔW over the largest, a panel per adapter, a line per matrix."""
    names = list(named)[:MAX_PANELS]
    figure, all_axes = panels(len(names), 0.8, 2.7, sharey=True)
    kinds = group_by_kind(p.module for name in names for p in named[name])
    colours = {kind: _HUES[n % len(_HUES)] for n, kind in enumerate(kinds)}
    colour_of = {module: colours[kind] for kind, some in kinds.items() for module in some}
    for axes, name in zip(all_axes, names, strict=True):
        for profile in named[name]:
            s = profile.s[profile.s > 0]
            if s.size:
                axes.plot(
                    np.arange(1, s.size + 1), s / s[0], "-", linewidth=1.1, alpha=0.6,
                    marker="o" if s.size <= 16 else None, markersize=3,
                    color=colour_of[profile.module],
                )  # fmt: skip
        if axes.lines:  # a fresh adapter has none
            axes.set_yscale("log")
        axes.set_title(name, parse_math=False)
        axes.set_xlabel("direction")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    all_axes[0].set_ylabel("singular value / largest")
    shown = dict(list(colours.items())[:12])
    lines = [all_axes[0].plot([], [], color=colour)[0] for colour in shown.values()]
    ncols = min(3, len(shown))
    plain_legend(figure, lines, shown, loc="outside lower center", ncols=ncols, fontsize=8)
    caption = (
        "Singular values of ΔW, each matrix by its largest. A line that falls at once is a change "
        "of few directions, whatever rank was paid for."
    )
    if len(named) > len(names):
        caption += f" The first {len(names)} of {len(named)} adapters."
    return Drawing("spectra", "Spectra of ΔW", caption, to_svg(figure, "spectra"))


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


@in_style
def draw_amplification(named: dict[str, list[MatrixProfile]]) -> Drawing:
    """Table 7 as a figure: what W holds in ΔW's, its own and random directions; the factor."""
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = {}
    for n, (name, profiles) in enumerate(named.items()):
        colour = _HUES[n % len(_HUES)]
        found = [p.amplification for p in profiles if p.amplification is not None]
        for marker, part in (("v", "from_kernel"), ("o", "from_delta"), ("x", "from_random")):
            shares = [_positive(getattr(one, part), one.kernel_norm) for one in found]
            left.plot(range(len(found)), shares, marker, color=colour, markersize=4.5, alpha=0.8)
        factors = [_positive(one.factor, 1.0) for one in found]
        right.plot(range(len(found)), factors, "o-", color=colour, markersize=4.5, linewidth=0.8)
        null = [_positive(one.random_factor, 1.0) for one in found]
        right.plot(range(len(found)), null, "x", color=colour, markersize=4.5, alpha=0.8)
        lines[name] = right.plot([], [], "o-", color=colour)[0]
    shown = (("v", "its own first r"), ("o", "ΔW's r"), ("x", "r random ones"))
    marks = {f"in {what}": left.plot([], [], m, color=INK)[0] for m, what in shown}
    for axes, handles, title in (
        (left, marks, "Share of ‖W‖ in r directions of inputs and outputs"),
        (right, lines, "Amplification, ‖ΔW‖ / ‖UᵀWV‖"),
    ):
        axes.set_title(title)
        drawn = np.concatenate([line.get_ydata() for line in axes.lines]).astype(float)
        if np.isfinite(drawn).any():
            axes.set_yscale("log")
        axes.set_xlabel("matrix, in the adapter's order")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18), "ncols": 3}
        plain_legend(axes, handles.values(), handles, **below)
    caption = (
        "Hu et al. 2021, Table 7, of every matrix. Left: ΔW's own directions above random ones say "
        "that W was there already, below its first ones that it was not prominent. Right: how much "
        "stronger ΔW is in them than W; crosses are a ΔW of the same norm in random directions. "
        "Only the distance from the crosses was learned."
    )
    svg = to_svg(figure, "amplification")
    return Drawing("amplification", "What ΔW amplifies", caption, svg)


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
        random.setdefault(title, np.asarray(expected_similarity(size[0], size[1], shape[axis])))
    more = f" The first {MAX_PANELS} of {len(kinds)} kinds." if len(kinds) > MAX_PANELS else ""
    return found | random, more


@in_style
def _heat_maps(grids: dict[str, np.ndarray], name: str, first: str, second: str) -> str:
    figure, all_axes = panels(len(grids), 0.6, 2.9)
    for axes, (title, grid) in zip(all_axes, grids.items(), strict=True):
        image = axes.imshow(
            grid, vmin=0, vmax=1, cmap="viridis", origin="lower", aspect="auto",
            interpolation="nearest",
            extent=(0.5, grid.shape[1] + 0.5, 0.5, grid.shape[0] + 0.5),
        )  # fmt: skip
        axes.grid(visible=False)
        axes.set_title(title, parse_math=False, fontsize=8)
        axes.set_xlabel(f"j, {second}", parse_math=False)
        axes.set_ylabel(f"i, {first}", parse_math=False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))
    figure.colorbar(image, ax=all_axes, shrink=0.7, label="φ")
    return to_svg(figure, name)


def _positive(part: jax.Array | float, whole: jax.Array | float) -> float:
    """part / whole where it has a place on a logarithmic axis, else nan."""
    value = float(part / whole) if whole else np.nan
    return value if value > 0 and np.isfinite(value) else np.nan
