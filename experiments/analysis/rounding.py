"""At which learning rate does rounding weigh as much as the seed?

The design and the hypotheses: `experiments/configs/rounding.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from experiments.analysis import evidence, pages
from experiments.analysis.evidence import Claim, Evidence
from experiments.analysis.findings import COLOURS
from experiments.analysis.study import Study, read_study

# (claim, rate): of log10 of the ratio of variances.
CLAIMS = (
    (Claim("small", "at 2e-3 cuts vary by at most 1% of what seeds do", "not_above", -2.0,
           "log10"), 2e-3),
    (Claim("large", "at 8e-3 by more than 10%", "above", -1.0, "log10"), 8e-3),
    (Claim("comparable", "at 1.6e-2 by more than 50%", "above", math.log10(0.5), "log10"), 1.6e-2),
)  # fmt: skip


def losses_by_rate(study: Study) -> dict[float, np.ndarray]:
    """`{rate: (seeds, cuts)}`: test losses in nats, seeds and cuts in ascending order."""
    found: dict[float, dict[tuple[int, int], float]] = {}
    for row in study.cells:
        cut = int(row["cell"].partition("-")[0].removeprefix("c"))
        found.setdefault(row["lr"], {})[row["seed"], cut] = row["test_loss"]
    tables = {}
    for rate in sorted(found):
        seeds = sorted({seed for seed, _ in found[rate]})
        cuts = sorted({cut for _, cut in found[rate]})
        tables[rate] = np.array([[found[rate][seed, cut] for cut in cuts] for seed in seeds])
    return tables


def log_ratio(table: np.ndarray) -> float:
    """log10 of the variance over cuts, within seeds, by that over seeds of the means of the cuts.

    Of the latter what the cuts add to the means is taken off, and it is at least a tenth of what is
    left: a ratio above 10 is not distinguished from 10.
    """
    within = float(np.mean(np.var(table, axis=1, ddof=1)))
    of_means = float(np.var(table.mean(axis=1), ddof=1))
    between = max(of_means - within / table.shape[1], within / 10, 1e-30)
    return math.log10(max(within, 1e-30) / between)


def ratio(table: np.ndarray) -> Evidence:
    """`log_ratio` with a jackknife over seeds."""

    def statistic(kept: Collection[int]) -> float:
        return log_ratio(table[sorted(kept)])

    return evidence.jackknife(statistic, range(len(table)))


def page(out) -> None:
    """Verdicts, table and figure from the study's record in `out`."""
    study = read_study(out)
    tables = losses_by_rate(study)
    verdicts = [
        evidence.decide(claim, ratio(tables[rate])) for claim, rate in CLAIMS if rate in tables
    ]
    text = "Spread of the test loss over cuts and over seeds, by learning rate"
    pages.write_page(
        out, name="rounding", title="Rounding and the seed", study=study, verdicts=verdicts,
        commands=["lora-jax sweep --config=rounding --sweep=full_size --workdir=runs/rounding",
                  "python -m experiments.analysis rounding runs/rounding"],
        parts=[_table(tables), pages.save_figure(_draw(tables), out, "spread", text)],
    )  # fmt: skip


def _spreads(table: np.ndarray) -> tuple[float, float]:
    """Standard deviations over cuts and over seeds (of the means of the cuts)."""
    return (
        math.sqrt(np.mean(np.var(table, axis=1, ddof=1))),
        float(np.std(table.mean(axis=1), ddof=1)),
    )


def _table(tables) -> str:
    lines = [
        "| rate | test loss | SD over cuts | SD over seeds | ratio of variances, 95% | "
        "largest difference between cuts of a seed |",
        "|---:|---:|---:|---:|---|---:|",
    ]
    for rate, table in tables.items():
        cuts, seeds = _spreads(table)
        found = ratio(table).interval()
        low, middle, high = (f"{10**x:.2g}" for x in (found.low, found.estimate, found.high))
        lines.append(
            f"| {rate:g} | {table.mean():.3f} | {cuts:.2g} | {seeds:.2g} | {middle} [{low}, "
            f"{high}] | {np.ptp(table, axis=1).max():.2g} |"
        )
    return "\n".join(lines)


def _draw(tables):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    spreads = np.array([_spreads(table) for table in tables.values()])
    for column, label, colour in ((0, "over cuts", COLOURS[0]), (1, "over seeds", COLOURS[1])):
        axes.plot(list(tables), spreads[:, column], "o-", color=colour, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("learning rate of the body")
    axes.set_ylabel("standard deviation of the test loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
