"""Figures of what adapters learned: spectra, φ beside that of random spaces, ΔW beside W."""

from __future__ import annotations

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lora_jax.analysis.adapters import MatrixProfile, Pair, PairProfile, group_by_kind
from lora_jax.report.canvas import INK, WIDTH, Drawing, style_sheet, to_svg

MAX_PANELS = 9
_HUES = (
    "#2f86c9", "#d9661f", "#159b78", "#c2699a", "#d1940a", "#7a6fd0", "#4aa3c7", "#b5483f",
    "#6f9a24",
)  # fmt: skip
_MAP = "viridis"


def draw_spectra(named: dict[str, list[MatrixProfile]]) -> Drawing:
    """Singular values of ΔW over the largest, a panel an adapter, a line a matrix."""
    names = list(named)[:MAX_PANELS]
    columns = min(3, len(names))
    with style_sheet():
        rows = -(-len(names) // columns)
        figure = Figure(figsize=(WIDTH, 0.8 + 2.7 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
        kinds = group_by_kind([p.module for name in names for p in named[name]])
        colours = {kind: _HUES[n % len(_HUES)] for n, kind in enumerate(kinds)}
        of_module = {module: kind for kind, some in kinds.items() for module in some}
        for axes, name in zip(panels, names, strict=False):
            for profile in named[name]:
                s = profile.s[profile.s > 0]
                if s.size:
                    axes.plot(
                        np.arange(1, s.size + 1), s / s[0], "-", linewidth=1.1, alpha=0.6,
                        marker="o" if s.size <= 16 else None, markersize=3,
                        color=colours[of_module[profile.module]],
                    )  # fmt: skip
            if axes.lines:  # a fresh adapter has none
                axes.set_yscale("log")
            axes.set_title(name, parse_math=False)
            axes.set_xlabel("direction")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in panels[len(names) :]:
            axes.set_visible(False)
        panels[0].set_ylabel("singular value / largest")
        _legend(figure, panels[0], colours)
        svg = to_svg(figure, "spectra")
    caption = (
        "Singular values of ΔW, each matrix by its largest. A line that falls at once is a change "
        "of few directions, whatever rank was paid for."
    )
    if len(named) > len(names):
        caption += f" The first {len(names)} of {len(named)} adapters."
    return Drawing("spectra", "Spectra of ΔW", caption, svg)


def draw_similarity(pair: Pair, number: int, space: str = "input") -> Drawing:
    """Heat-maps of φ(i, j), the mean over the layers of each kind of matrix, and the random one."""
    kinds = group_by_kind([profile.module for profile in pair.profiles])
    by_name = {profile.module: profile for profile in pair.profiles}
    panels: list[tuple[str, np.ndarray]] = []
    random: dict[str, np.ndarray] = {}
    for kind, modules in list(kinds.items())[:MAX_PANELS]:
        some = _of_one_size([by_name[module] for module in modules])
        grids = [getattr(p, space) for p in some]
        panels.append((f"{kind}\nmean of {len(some)}", np.mean(grids, axis=0)))
        width = some[0].shape[0 if space == "input" else 1]
        expected = some[0].expected if space == "input" else some[0].expected_output
        random.setdefault(f"random, expected\nof d = {width:,}", expected)
    panels += random.items()
    svg = _heat_maps(panels, f"similarity-{number}-{space}", pair.first, pair.second)
    caption = (
        f"φ(i, j) of the first i directions of {pair.first} and the first j of {pair.second} in "
        f"the space of {space}s: 1 where the smaller space lies in the larger one. Last, what two "
        "random spaces of the same widths have in common, max(i, j) / d: only what exceeds it was "
        f"learned.{_left_out(kinds)}"
    )
    title = f"{pair.first} and {pair.second}: directions of {space}s"
    return Drawing(f"similarity-{number}-{space}", title, caption, svg)


def draw_against_kernel(name: str, number: int, profiles: list[MatrixProfile]) -> Drawing:
    """φ of W's and ΔW's directions (Figure 8), the mean over the layers of each kind."""
    kinds = group_by_kind([profile.module for profile in profiles])
    by_name = {profile.module: profile for profile in profiles}
    panels = []
    random: dict[str, np.ndarray] = {}
    for kind, modules in list(kinds.items())[:MAX_PANELS]:
        some = _of_one_size([by_name[module] for module in modules])
        grids = [p.kernel_similarity for p in some]
        panels.append((f"{kind}\nmean of {len(some)}", np.mean(grids, axis=0)))
        (rows, columns), width = grids[0].shape, some[0].shape[0]
        i, j = np.arange(1, rows + 1)[:, None], np.arange(1, columns + 1)
        random.setdefault(f"random, expected\nof d = {width:,}", np.maximum(i, j) / width)
    panels += random.items()
    svg = _heat_maps(panels, f"kernel-{number}", "W", f"ΔW of {name}")
    caption = (
        "φ(i, j) of W's first i directions of inputs and ΔW's first j. Near the random panel: ΔW "
        f"reads directions that W does not emphasise (Hu et al. 2021, Figure 8).{_left_out(kinds)}"
    )
    return Drawing(f"kernel-{number}", f"{name}: ΔW's directions among W's", caption, svg)


def draw_amplification(named: dict[str, list[MatrixProfile]]) -> Drawing:
    """Table 7 as a figure: what W holds in ΔW's, its own and random directions; the factor."""
    with style_sheet():
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for n, profiles in enumerate(named.values()):
            colour = _HUES[n % len(_HUES)]
            found = [p.amplification for p in profiles if p.amplification is not None]
            places = np.arange(len(found))
            shares = {
                "v": [_positive(one.from_kernel, one.kernel_norm) for one in found],
                "o": [_positive(one.from_delta, one.kernel_norm) for one in found],
                "x": [_positive(one.from_random, one.kernel_norm) for one in found],
            }
            for marker, values in shares.items():
                left.plot(places, values, marker, color=colour, markersize=4.5, alpha=0.8)
            values = [_positive(one.factor, 1.0) for one in found]
            right.plot(places, values, "o-", color=colour, markersize=4.5, linewidth=0.8)
        shown = (("v", "its own first r"), ("o", "ΔW's r"), ("x", "r random ones"))
        legends = {
            left: {f"in {what}": left.plot([], [], m, color=INK)[0] for m, what in shown},
            right: {
                name: right.plot([], [], "o-", color=_HUES[n % len(_HUES)])[0]
                for n, name in enumerate(named)
            },
        }
        left.set_title("Share of ‖W‖ in r directions of inputs and outputs")
        right.set_title("Amplification, ‖ΔW‖ / ‖UᵀWV‖")
        for axes in (left, right):
            drawn = np.concatenate([line.get_ydata() for line in axes.lines]).astype(float)
            if np.isfinite(drawn).any():
                axes.set_yscale("log")
            axes.set_xlabel("matrix, in the adapter's order")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            # Labels apart: matplotlib would leave out what begins with an underscore.
            handles = legends[axes]
            legend = axes.legend(
                list(handles.values()), list(handles), loc="upper center",
                bbox_to_anchor=(0.5, -0.18), ncols=3,
            )  # fmt: skip
            for text in legend.get_texts():
                text.set_parse_math(False)
        svg = to_svg(figure, "amplification")
    caption = (
        "Hu et al. 2021, Table 7, of every matrix. Left: ΔW's own directions above random ones say "
        "that W was there already, below its first ones that it was not prominent. Right: how much "
        "stronger ΔW is in them than W."
    )
    return Drawing("amplification", "What ΔW amplifies", caption, svg)


def _heat_maps(panels: list[tuple[str, np.ndarray]], name: str, first: str, second: str) -> str:
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with style_sheet():
        figure = Figure(figsize=(WIDTH, 0.6 + 2.9 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for one, (title, grid) in zip(axes, panels, strict=False):
            image = one.imshow(
                grid, vmin=0, vmax=1, cmap=_MAP, origin="lower", aspect="auto",
                interpolation="nearest",
                extent=(0.5, grid.shape[1] + 0.5, 0.5, grid.shape[0] + 0.5),
            )  # fmt: skip
            one.grid(visible=False)
            one.set_title(title, parse_math=False, fontsize=8)
            one.set_xlabel(f"j, {second}", parse_math=False)
            one.set_ylabel(f"i, {first}", parse_math=False)
            for axis in (one.xaxis, one.yaxis):
                axis.set_major_locator(MaxNLocator(5, integer=True))
        for one in axes[len(panels) :]:
            one.set_visible(False)
        figure.colorbar(image, ax=list(axes), shrink=0.7, label="φ")
        return to_svg(figure, name)


def _positive(part: jax.Array | float, whole: jax.Array | float) -> float:
    """part / whole where it has a place on a logarithmic axis, else nan."""
    value = float(part / whole) if whole else np.nan
    return value if value > 0 and np.isfinite(value) else np.nan


def _left_out(kinds: dict[str, list[str]]) -> str:
    return f" The first {MAX_PANELS} of {len(kinds)} kinds." if len(kinds) > MAX_PANELS else ""


def _of_one_size(profiles: list) -> list:
    """Those whose grids have the commonest shape: means are over what can be added."""
    sizes = [_size(profile) for profile in profiles]
    most = max(set(sizes), key=sizes.count)
    return [p for p, size in zip(profiles, sizes, strict=True) if size == most]


def _size(profile: PairProfile | MatrixProfile) -> tuple[int, ...]:
    grid = profile.input if isinstance(profile, PairProfile) else profile.kernel_similarity
    return (*(() if grid is None else grid.shape), *profile.shape)


def _legend(figure: Figure, axes, colours: dict[str, str]) -> None:
    shown = dict(list(colours.items())[:12])
    lines = [axes.plot([], [], color=colour)[0] for colour in shown.values()]
    legend = figure.legend(
        lines, list(shown), loc="outside lower center", ncols=min(3, len(shown)), fontsize=8
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
