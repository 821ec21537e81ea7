"""The report's figures, as inline SVG that takes its ink from the page, light or dark."""

import math
from collections import Counter

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lora_jax.report.canvas import (
    ACROSS,
    INK,
    LINES,
    WIDTH,
    Drawing,
    in_style,
    label_points,
    method_styles,
    panels,
    plain_legend,
    to_svg,
)
from lora_jax.report.groups import Basin
from lora_jax.report.quantities import count_text, rate_text
from lora_jax.report.ranks import draw_ranks, ranks_by_targets
from lora_jax.report.runs import Run
from lora_jax.report.tables import Row, Summary, score_names
from lora_jax.settings.settings import hashable_settings

MAX_PANELS = 24


@in_style
def draw_figures(summary: Summary) -> list[Drawing]:
    """Every figure that the runs have data for.

    Differences between methods first, how learning rates were chosen next, training curves last.
    """
    rows, ranks = summary.rows, ranks_by_targets(summary.rows)
    drawings = [
        _draw_results(rows) if rows else None,
        draw_ranks(rows, ranks) if ranks else None,
        _draw_size(rows) if len(rows) > 1 else None,
        _draw_basins(summary.basins) if summary.basins else None,
        _draw_curves(summary),
    ]
    return [drawing for drawing in drawings if drawing]


def _draw_results(rows: tuple[Row, ...]) -> Drawing:
    """Accuracy and loss side by side, a line per method, with intervals and single seeds."""
    styles, names = method_styles(row.method for row in rows), score_names(rows)
    figure = Figure(figsize=(WIDTH, 1.1 + 0.42 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(rows))[::-1]
    for place, row in zip(places, rows, strict=True):
        seeds = [100 * value for value in row.seed_accuracies]
        _draw_row(left, place, *row.score("accuracy"), seeds, styles[row.method])
        _draw_row(right, place, *row.score("loss"), row.seed_losses, styles[row.method])
    left.set_yticks(places, [row.label for row in rows], parse_math=False)
    left.set_ylim(-0.6, len(rows) - 0.4)
    for axes, title, label in (
        (left, f"Test {names.accuracy}", f"{names.accuracy} (%)"),
        (right, "Test loss", names.loss),
    ):
        axes.set_title(title)
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(7))
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    caption = (
        "Large marks: mean over seeds; bars: 95% intervals over test examples and seeds; "
        "small marks: single seeds. Higher accuracy and lower loss are better."
    )
    return Drawing("results", "Accuracy and loss by method", caption, to_svg(figure, "results"))


def _draw_row(axes, place, value, interval, seeds, style) -> None:
    colour, marker = style
    if interval is not None and math.isfinite(interval.low + interval.high):
        bar = {"linewidth": 2.4, "alpha": 0.55, "solid_capstyle": "round"}
        axes.plot([interval.low, interval.high], [place, place], color=colour, **bar)
    if len(seeds) > 1:
        beneath = [place - 0.24] * len(seeds)
        axes.plot(seeds, beneath, marker, color=colour, markersize=3, alpha=0.75)
    axes.plot([value], [place], marker, color=colour, markersize=7)


def _draw_size(rows: tuple[Row, ...]) -> Drawing:
    """Accuracy against how much is trained, adapters of one kind joined over their ranks."""
    styles = method_styles(row.method for row in rows)
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    # A count of 0 (a frozen model without a head) has no place on a logarithmic axis.
    sizes = [max(1, row.adapter_count + row.head_count) for row in rows]
    points: list[tuple[int, float]] = []
    series: dict[tuple, list[tuple[int, float]]] = {}
    for size, row in zip(sizes, rows, strict=True):
        (colour, marker), (value, interval) = styles[row.method], row.score("accuracy")
        points.append((size, value))
        series.setdefault((row.method, row.targets), []).append((size, value))
        if interval is not None:
            ends = [interval.low, interval.high]
            axes.plot([size] * 2, ends, color=colour, linewidth=2.4, alpha=0.4)
        axes.plot([size], [value], marker, color=colour, markersize=7)
    segments = []
    for (method, _), members in series.items():
        line = sorted(members)
        axes.plot(*zip(*line, strict=True), color=styles[method][0], linewidth=1, alpha=0.6)
        segments += zip(line, line[1:], strict=False)
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 2, max(sizes) * 4)
    axes.set_xlabel("trained parameters, adapter and head")
    axes.set_ylabel(f"test {score_names(rows).accuracy} (%)")
    axes.xaxis.set_major_formatter(lambda value, _: count_text(round(value)))
    colours = [styles[row.method][0] for row in rows]
    label_points(figure, axes, points, [row.label for row in rows], colours, segments)
    caption = (
        "How much each method trains (logarithmic) and what it reaches; bars are 95% intervals, "
        "lines join the ranks of one choice of targets."
    )
    return Drawing("size", "Accuracy and trained parameters", caption, to_svg(figure, "size"))


def _draw_basins(basins: tuple[Basin, ...]) -> Drawing:
    """Validation loss against learning rate, a line per method, the chosen rate ringed."""
    styles = method_styles(basin.method for basin in basins)
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    finite = [loss for basin in basins for loss in basin.losses if math.isfinite(loss)]
    top = max(finite, default=1.0)
    margin = 0.06 * (top - min(finite, default=0.0)) or 0.05
    lines, drawn = {}, Counter[str]()
    for basin in sorted(basins, key=lambda basin: min(basin.losses)):
        colour, marker = styles[basin.method]
        dashes = LINES[drawn[basin.method] % len(LINES)]
        drawn[basin.method] += 1
        losses = np.array(basin.losses)
        kept = np.isfinite(losses)
        rates = np.array(basin.rates)
        (line,) = axes.plot(
            rates[kept], losses[kept], marker=marker, markersize=4.5, color=colour,
            linestyle=dashes, linewidth=1.6,
        )  # fmt: skip
        lines[f"{basin.label}: {rate_text(basin.chosen)}"] = line
        axes.plot(rates[~kept], [top + margin] * (~kept).sum(), "x", color=colour, markersize=6)
        for rate, of_seeds in zip(basin.rates, basin.seed_losses, strict=True):
            if len(of_seeds) > 1:
                axes.plot([rate] * len(of_seeds), of_seeds, "_", color=colour, alpha=0.6)
        if math.isfinite(min(basin.losses)):
            axes.plot(
                [basin.chosen], [min(basin.losses)], "o", markersize=11, markerfacecolor="none",
                markeredgecolor=colour, markeredgewidth=1.4,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("validation loss (nats)")
    where = {"loc": "outside right upper", "alignment": "left"}
    plain_legend(figure, lines.values(), lines, title="method: chosen rate", **where)
    caption = (
        "Each method at each learning rate tried: mean validation loss over seeds, single seeds as "
        "ticks, runs that diverged as crosses at the top. Rings mark the rates the table uses."
    )
    return Drawing("rates", "How learning rates were chosen", caption, to_svg(figure, "rates"))


def _draw_curves(summary: Summary) -> Drawing | None:
    """Train and validation loss against step, a panel per method and per unfinished run."""
    drawn: list[tuple[str, str, tuple[Run, ...]]] = [
        (row.label, row.method, row.runs) for row in summary.rows
    ]
    drawn += [
        (
            f"{run.name} (unfinished)",
            str(hashable_settings(run.config).get("method.name", "")),
            (run,),
        )
        for run in summary.unfinished
    ]
    drawn = [one for one in drawn if any(len(run.curve("train")[0]) for run in one[2])]
    if not drawn:
        return None
    shown = drawn[:MAX_PANELS]
    styles = method_styles(method for _, method, _ in shown)
    figure, all_axes = panels(len(shown), 0.9, 2.2, sharey=True)
    for number, (axes, (label, method, runs)) in enumerate(zip(all_axes, shown, strict=True)):
        colour, _ = styles[method]
        for run in runs:
            axes.plot(*run.curve("train"), color=INK, alpha=0.28, linewidth=0.9)
            steps, losses = run.curve("validation")
            axes.plot(steps, losses, color=colour, linewidth=1.6, marker=".", markersize=4)
            if np.isfinite(losses).any():
                best, ring = int(np.nanargmin(losses)), {"markersize": 7, "fillstyle": "none"}
                axes.plot(steps[best], losses[best], "o", color=colour, **ring)
        axes.set_title(label, parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if number >= len(shown) - ACROSS:
            axes.set_xlabel("step")
        if number % ACROSS == 0:
            axes.set_ylabel("loss (nats)")
    caption = (
        "Grey: training loss; coloured: validation loss, its lowest value ringed; a line per seed."
    )
    if len(drawn) > len(shown):
        caption += f" The first {len(shown)} of {len(drawn)} are shown."
    return Drawing("curves", "Training curves", caption, to_svg(figure, "curves"))
