"""How likely does an adapter die, by learning rate, alpha and rank?

The design and the hypotheses: `experiments/configs/collapse.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize

from experiments.analysis import evidence, pages
from experiments.analysis.evidence import Claim, Evidence
from experiments.analysis.findings import COLOURS
from experiments.analysis.study import COLLAPSED, Study, read_study

RANKS = 64  # from 1 to this
BY_RANK = Claim(
    "by_rank", "from r = 1 to 64 at fixed alpha the rate changes by less than a factor of 1.5",
    "equivalent", math.log10(1.5), "log10",
)  # fmt: skip
BY_ALPHA = (
    Claim("by_alpha_low", "rate ∝ alpha^-p: p is above 0.3", "above", 0.3, "p"),
    Claim("by_alpha_high", "p is not above 1", "not_above", 1.0, "p"),
)
# A fit that separates the runs perfectly has no finite slope; this much of a prior bounds it.
RIDGE = 1e-3


def deaths(study: Study) -> list[dict[str, Any]]:
    """One row per run: log10 of rate, alpha and rank, the seed, and whether it died."""
    rows = []
    for arm in study.arms.values():
        for row in arm.cells:
            rows.append(
                {
                    "rate": math.log10(row["lr"]),
                    "alpha": math.log10(row["alpha"]),
                    "rank": math.log10(row["rank"]),
                    "seed": row["seed"],
                    "died": row["test_loss"] > COLLAPSED * arm.prior,
                }
            )
    return rows


def fit(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """`(p, q, c)`: the rate of half the deaths is 10^c · alpha^-p · rank^-q, by logistic regression
    on the logarithms. NaN where all or none died."""
    x = np.array([[1.0, row["rate"], row["alpha"], row["rank"]] for row in rows])
    y = np.array([row["died"] for row in rows], float)
    if y.all() or not y.any():
        return (math.nan,) * 3

    def loss(w):
        z = x @ w
        return np.logaddexp(0, z).sum() - (y * z).sum() + RIDGE * (w[1:] ** 2).sum()

    def gradient(w):
        ridge = 2 * RIDGE * np.concatenate([[0.0], w[1:]])
        return x.T @ (1 / (1 + np.exp(-np.clip(x @ w, -60, 60))) - y) + ridge

    w = minimize(loss, np.zeros(4), jac=gradient, method="BFGS").x
    return w[2] / w[1], w[3] / w[1], -w[0] / w[1]


def exponent(rows: Sequence[Mapping[str, Any]], part: int) -> Evidence:
    """`fit`'s p (0), q (1) or c (2), with a jackknife over seeds."""
    seeds = sorted({row["seed"] for row in rows})

    def statistic(kept: Collection[int]) -> float:
        return fit([row for row in rows if row["seed"] in kept])[part]

    return evidence.jackknife(statistic, seeds)


def page(out) -> None:
    """Verdicts, table and figure from the study's record in `out`."""
    study = read_study(out)
    rows = deaths(study)
    by_alpha, by_rank = exponent(rows, 0), exponent(rows, 1)
    verdicts = [evidence.decide(BY_RANK, by_rank.scaled(-math.log10(RANKS)))]
    verdicts += [evidence.decide(claim, by_alpha) for claim in BY_ALPHA]
    p, q = by_alpha.interval(), by_rank.interval()
    said = (
        f"The rate at which half the runs die goes as alpha^-p · rank^-q with p = {p.estimate:.2f} "
        f"[{p.low:.2f}, {p.high:.2f}] and q = {q.estimate:.2f} [{q.low:.2f}, {q.high:.2f}] (95%). "
        f"{sum(row['died'] for row in rows)} of {len(rows)} runs died."
    )
    text = "Share of seeds that died, by learning rate, alpha and rank; lines: the fit"
    pages.write_page(
        out, name="collapse", title="How likely does an adapter die?", study=study,
        verdicts=verdicts,
        commands=["lora-jax sweep --config=collapse --sweep=full_size --workdir=runs/collapse",
                  "python -m experiments.analysis collapse runs/collapse"],
        parts=[said, pages.save_figure(_draw(rows), out, "collapse", text), _table(rows)],
    )  # fmt: skip


def _shares(rows) -> dict[tuple[float, float], dict[float, float]]:
    """`{(rank, alpha): {rate: share that died}}`."""
    found: dict[tuple[float, float], dict[float, list[bool]]] = {}
    for row in rows:
        key = (round(10 ** row["rank"]), round(10 ** row["alpha"], 6))
        found.setdefault(key, {}).setdefault(10 ** row["rate"], []).append(row["died"])
    return {
        key: {rate: float(np.mean(own[rate])) for rate in sorted(own)}
        for key, own in sorted(found.items())
    }


def _table(rows) -> str:
    """Markdown: the share of seeds that died, a row per rank and alpha, a column per rate."""
    shares = _shares(rows)
    rates = sorted({rate for own in shares.values() for rate in own})
    lines = [
        "| rank | alpha | " + " | ".join(f"{rate:.2g}" for rate in rates) + " |",
        "|---:|---:|" + "---:|" * len(rates),
    ]
    for (rank, alpha), own in shares.items():
        cells = (f"{own[rate]:.0%}" if rate in own else "" for rate in rates)
        lines.append(f"| {rank} | {alpha:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _draw(rows):
    from matplotlib.figure import Figure

    shares = _shares(rows)
    alphas = sorted({alpha for _, alpha in shares})
    figure = Figure(figsize=(3.2 * len(alphas), 3.2), layout="constrained")
    panels = figure.subplots(1, len(alphas), sharey=True, squeeze=False)[0]
    p, q, c = fit(rows)
    for axes, alpha in zip(panels, alphas, strict=True):
        own = [(rank, one) for (rank, other), one in shares.items() if other == alpha]
        for (rank, one), colour in zip(own, COLOURS, strict=False):
            axes.plot(list(one), list(one.values()), "o-", color=colour, label=f"r = {rank}")
            half = 10 ** (c - p * math.log10(alpha) - q * math.log10(rank))
            axes.axvline(half, color=colour, linestyle=":", linewidth=1)
        axes.set_xscale("log")
        axes.set_title(f"alpha {alpha:g}", fontsize=10)
        axes.set_xlabel("learning rate of the body")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of seeds that died")
    panels[0].legend(fontsize=8)
    return figure
