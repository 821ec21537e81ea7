"""Intervals over seeds by the jackknife, for statistics of seeds or of pairs of seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from lora_jax import RequestError


class Hypothesis(NamedTuple):
    """One claim with what was measured.

    `side` says when it holds: "above" if `low` is above the margin, "below" if `high` is below it,
    "within" if the interval lies within ±margin.
    """

    name: str
    claim: str
    estimate: float
    low: float
    high: float
    level: float
    margin: float
    unit: str
    side: str


def jackknife(
    statistic: Callable[[Collection[int]], float], seeds: Sequence[int], *, level: float = 0.95
) -> tuple[float, float, float]:
    """`(estimate, low, high)`: Student's interval with the jackknife's variance over seeds.

    Pairs of seeds are not independent: each seed is in several. Leaving out a seed leaves out all
    of its pairs. For a mean over seeds this is Student's interval; for a mean over pairs the
    variance is a little too large (Efron & Stein 1981), so the interval is conservative.

    Args:
      statistic: its value on the seeds that are kept.
      seeds: at least three.
      level: of the interval.

    Raises:
      RequestError: fewer than three seeds.

    Example:
      >>> values = {0: 1.0, 1: 2.0, 2: 3.0}
      >>> low_high = jackknife(lambda kept: sum(values[s] for s in kept) / len(kept), [0, 1, 2])
      >>> [round(x, 2) for x in low_high]
      [2.0, -0.48, 4.48]
    """
    from scipy.stats import t

    if len(seeds) < 3:
        raise RequestError(f"{len(seeds)} seeds; an interval over seeds needs at least 3")
    estimate = float(statistic(seeds))
    without = np.array([statistic([s for s in seeds if s != left]) for left in seeds])
    variance = (len(seeds) - 1) / len(seeds) * np.sum(np.square(without - without.mean()))
    reach = float(t.ppf((1 + level) / 2, len(seeds) - 1)) * math.sqrt(variance)
    return estimate, estimate - reach, estimate + reach


def mean_of_pairs(
    values: np.ndarray, pairs: Sequence[tuple[int, int]]
) -> Callable[[Collection[int]], float]:
    """The statistic "mean of `values (pairs,)` over the pairs of which both seeds are kept".

    A pair of a seed with itself is a value of that seed.
    """
    found = np.asarray(values, np.float64)

    def statistic(kept: Collection[int]) -> float:
        inside = [m in kept and n in kept for m, n in pairs]
        return float(found[inside].mean())

    return statistic


def hypothesis_of(
    name: str,
    claim: str,
    statistic: Callable[[Collection[int]], float],
    seeds: Sequence[int],
    *,
    margin: float,
    unit: str,
    side: str,
) -> Hypothesis:
    """A `Hypothesis` with its interval: 95%, or 90% for "within" (two one-sided tests at 5%)."""
    level = 0.90 if side == "within" else 0.95
    return Hypothesis(
        name, claim, *jackknife(statistic, seeds, level=level), level, margin, unit, side
    )
