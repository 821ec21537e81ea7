"""The figure of the question behind LoRA: what does a higher rank bring, on which matrices?"""

import math

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lora_jax.report.canvas import LINES, WIDTH, Drawing, method_styles, plain_legend, to_svg
from lora_jax.report.statistics import Interval
from lora_jax.report.tables import REFERENCES, Row, score_names

_HUES = ("#2f86c9", "#159b78", "#c2699a", "#d1940a", "#7a6fd0", "#4aa3c7")


def ranks_by_targets(rows: tuple[Row, ...]) -> dict[tuple, list[tuple[int, Row]]]:
    """Ranks and rows that differ by rank only (and its rate), by what they share, ascending.

    Only those with two ranks or more.
    """
    found: dict[tuple, list[tuple[int, Row]]] = {}
    for row in rows:
        if row.rank is not None:
            rest = tuple((k, str(v)) for k, v in row.differing.items())
            found.setdefault((row.method_name, row.targets, rest), []).append((row.rank, row))
    return {
        key: sorted(series, key=lambda one: one[0])
        for key, series in found.items()
        if len({rank for rank, _ in series}) > 1
    }


def draw_ranks(rows: tuple[Row, ...], series: dict[tuple, list[tuple[int, Row]]]) -> Drawing:
    """Loss and accuracy against rank, a line per choice of targets, references as bands."""
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    both, names = figure.subplots(1, 2), score_names(rows)
    ranks = sorted({rank for some in series.values() for rank, _ in some})
    shift = 0.06 * math.log2(max(ranks) / min(ranks) * 2)
    measures = (
        (both[0], "Test loss", names.loss, "loss"),
        (both[1], f"Test {names.accuracy}", f"{names.accuracy} (%)", "accuracy"),
    )
    styles = method_styles(row.method for row in rows)
    lines = {}
    for axes, title, label, score in measures:
        for row in rows:
            if row.method in REFERENCES:
                value, low, high = _with_ends(*row.score(score))
                colour = styles[row.method][0]
                lines[row.label] = axes.axhline(value, color=colour, linewidth=1.2)
                axes.axhspan(low, high, color=colour, alpha=0.12, linewidth=0)
        for number, ((name, targets, rest), some) in enumerate(series.items()):
            colour = _HUES[number % len(_HUES)]
            # Side by side, or their intervals would lie on one another.
            move = 2 ** (shift * (number - (len(series) - 1) / 2) / 2)
            places = [rank * move for rank, _ in some]
            points = [_with_ends(*row.score(score)) for _, row in some]
            (line,) = axes.plot(
                places, [value for value, _, _ in points], "o",
                linestyle=LINES[number % len(LINES)], color=colour, markersize=6, linewidth=1.4,
            )  # fmt: skip
            extra = "".join(f", {key.rpartition('.')[2]}={value}" for key, value in rest)
            lines[f"{name} {targets}{extra}"] = line
            for place, (_, low, high) in zip(places, points, strict=True):
                axes.plot([place] * 2, [low, high], color=colour, linewidth=2.4, alpha=0.45)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(title)
        axes.set_xlabel("rank")
        axes.set_ylabel(label)
    ncols = min(4, len(lines))
    plain_legend(figure, lines.values(), lines, loc="outside lower center", ncols=ncols)
    caption = (
        "Each choice of targets at each rank (logarithmic); bars and bands are 95% intervals over "
        "test examples, and over seeds where there are several. A flat line says that a higher "
        "rank bought nothing that could be seen here, not that it never does."
    )
    return Drawing("ranks", "What a higher rank brings", caption, to_svg(figure, "ranks"))


def _with_ends(value: float, interval: Interval | None) -> tuple[float, float, float]:
    return (value, interval.low, interval.high) if interval else (value, value, value)
