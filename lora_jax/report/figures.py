"""The report's figures, as inline SVG that takes its ink from the page, light or dark."""

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lora_jax.report.canvas import (
    INK,
    LINES,
    WIDTH,
    Drawing,
    label_points,
    method_styles,
    style_sheet,
    to_svg,
)
from lora_jax.report.groups import Basin, flatten
from lora_jax.report.quantities import count_text, rate_text
from lora_jax.report.ranks import draw_ranks, ranks_by_targets
from lora_jax.report.runs import Run
from lora_jax.report.tables import Row, Summary, score_names

MAX_PANELS = 24


def draw_figures(summary: Summary) -> list[Drawing]:
    """Every figure that the runs have data for.

    Differences between methods first, how learning rates were chosen next, training curves last.
    """
    drawings = []
    with style_sheet():
        if summary.rows:
            drawings.append(_draw_results(summary.rows))
        ranks = ranks_by_targets(summary.rows)
        if ranks:
            drawings.append(draw_ranks(summary.rows, ranks))
        if len(summary.rows) > 1:
            drawings.append(_draw_size(summary.rows))
        if summary.basins:
            drawings.append(_draw_basins(summary.basins))
        curves = _draw_curves(summary)
        if curves is not None:
            drawings.append(curves)
    return drawings


def _draw_results(rows: tuple[Row, ...]) -> Drawing:
    """Accuracy and loss side by side, a line per method, with intervals and single seeds."""
    styles, names = method_styles(row.method for row in rows), score_names(rows)
    figure = Figure(figsize=(WIDTH, 1.1 + 0.42 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(rows))[::-1]
    for place, row in zip(places, rows, strict=True):
        accuracy = row.accuracy and row.accuracy.scaled(100)
        seeds = [100 * value for value in row.seed_accuracies]
        _whisker(left, place, 100 * row.test_accuracy, accuracy, seeds, styles[row.method])
        _whisker(right, place, row.test_loss, row.loss, row.seed_losses, styles[row.method])
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


def _whisker(axes, place, value, interval, seeds, style) -> None:
    colour, marker = style
    if interval is not None and math.isfinite(interval.low + interval.high):
        axes.plot(
            [interval.low, interval.high],
            [place, place],
            color=colour,
            linewidth=2.4,
            alpha=0.55,
            solid_capstyle="round",
        )
    if len(seeds) > 1:
        axes.plot(
            seeds, [place - 0.24] * len(seeds), marker, color=colour, markersize=3, alpha=0.75
        )
    axes.plot([value], [place], marker, color=colour, markersize=7)


def _draw_size(rows: tuple[Row, ...]) -> Drawing:
    """Accuracy against how much is trained, adapters of one kind joined over their ranks."""
    styles = method_styles(row.method for row in rows)
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    # A count of 0 (a frozen model without a head) has no place on a logarithmic axis.
    sizes = [max(1, row.adapter_count + row.head_count) for row in rows]
    series: dict[tuple, list[int]] = {}
    for i, row in enumerate(rows):
        series.setdefault((row.method, row.targets), []).append(i)
        colour, marker = styles[row.method]
        if row.accuracy is not None:
            low, high = 100 * row.accuracy.low, 100 * row.accuracy.high
            axes.plot([sizes[i]] * 2, [low, high], color=colour, linewidth=2.4, alpha=0.4)
        axes.plot([sizes[i]], [100 * row.test_accuracy], marker, color=colour, markersize=7)
    segments = []
    for (method, _), members in series.items():
        line = sorted((sizes[i], 100 * rows[i].test_accuracy) for i in members)
        axes.plot(*zip(*line, strict=True), color=styles[method][0], linewidth=1, alpha=0.6)
        segments += zip(line, line[1:], strict=False)
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 2, max(sizes) * 4)
    axes.set_xlabel("trained parameters, adapter and head")
    axes.set_ylabel(f"test {score_names(rows).accuracy} (%)")
    axes.xaxis.set_major_formatter(lambda value, _: count_text(round(value)))
    label_points(
        figure,
        axes,
        [(size, 100 * row.test_accuracy) for size, row in zip(sizes, rows, strict=True)],
        [row.label for row in rows],
        [styles[row.method][0] for row in rows],
        segments,
    )
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
    drawn: dict[str, int] = {}
    for basin in sorted(basins, key=lambda basin: min(basin.losses)):
        colour, marker = styles[basin.method]
        dashes = LINES[drawn.setdefault(basin.method, 0) % len(LINES)]
        drawn[basin.method] += 1
        losses = np.array(basin.losses)
        kept = np.isfinite(losses)
        rates = np.array(basin.rates)
        axes.plot(
            rates[kept],
            losses[kept],
            marker=marker,
            markersize=4.5,
            color=colour,
            linestyle=dashes,
            linewidth=1.6,
            label=f"{basin.label}: {rate_text(basin.chosen)}",
        )
        axes.plot(rates[~kept], [top + margin] * (~kept).sum(), "x", color=colour, markersize=6)
        for rate, losses_of_seeds in zip(basin.rates, basin.seed_losses, strict=True):
            if len(losses_of_seeds) > 1:
                axes.plot(
                    [rate] * len(losses_of_seeds), losses_of_seeds, "_", color=colour, alpha=0.6
                )
        if math.isfinite(min(basin.losses)):
            axes.plot(
                [basin.chosen],
                [min(basin.losses)],
                "o",
                markersize=11,
                markerfacecolor="none",
                markeredgecolor=colour,
                markeredgewidth=1.4,
            )
    axes.set_xscale("log")
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("validation loss (nats)")
    legend = figure.legend(loc="outside right upper", title="method: chosen rate")
    legend.set_alignment("left")
    for text in legend.get_texts():
        text.set_parse_math(False)
    caption = (
        "Each method at each learning rate tried: mean validation loss over seeds, single seeds as "
        "ticks, runs that diverged as crosses at the top. Rings mark the rates the table uses."
    )
    return Drawing("rates", "How learning rates were chosen", caption, to_svg(figure, "rates"))


def _draw_curves(summary: Summary) -> Drawing | None:
    """Train and validation loss against step, a panel per method and per unfinished run."""
    panels: list[tuple[str, str, tuple[Run, ...]]] = [
        (row.label, row.method, row.runs) for row in summary.rows
    ]
    panels += [
        (f"{run.name} (unfinished)", str(flatten(run.config).get("method.name", "")), (run,))
        for run in summary.unfinished
    ]
    panels = [p for p in panels if any(len(run.curve("train")[0]) for run in p[2])]
    if not panels:
        return None
    shown = panels[:MAX_PANELS]
    styles = method_styles(method for _, method, _ in shown)
    across = min(3, len(shown))
    down = math.ceil(len(shown) / across)
    figure = Figure(figsize=(WIDTH, 0.9 + 2.2 * down), layout="constrained")
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    for axes in grid.ravel()[len(shown) :]:
        axes.remove()
    for number, (axes, (label, method, runs)) in enumerate(zip(grid.ravel(), shown, strict=False)):
        colour, _ = styles[method]
        for run in runs:
            axes.plot(*run.curve("train"), color=INK, alpha=0.28, linewidth=0.9)
            steps, losses = run.curve("validation")
            axes.plot(steps, losses, color=colour, linewidth=1.6, marker=".", markersize=4)
            if np.isfinite(losses).any():
                best = int(np.nanargmin(losses))
                axes.plot(
                    steps[best], losses[best], "o", color=colour, markersize=7, fillstyle="none"
                )
        axes.set_title(label, parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if number >= len(shown) - across:
            axes.set_xlabel("step")
        if number % across == 0:
            axes.set_ylabel("loss (nats)")
    caption = (
        "Grey: training loss; coloured: validation loss, its lowest value ringed; a line per seed."
    )
    if len(panels) > len(shown):
        caption += f" The first {len(shown)} of {len(panels)} are shown."
    return Drawing("curves", "Training curves", caption, to_svg(figure, "curves"))
