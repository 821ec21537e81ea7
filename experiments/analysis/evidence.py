"""How sure a difference of two arms is, and what that makes of a hypothesis.

The one page on the statistics of the second edition; every interval and verdict comes from here.

Design. An arm is trained with S seeds, and each run is scored on the same N test examples. A seed
draws the head, the adapters, the training examples and their order, alike in all arms, so arms are
compared pair by pair: a table of differences, seeds by examples.

Interval. Seeds and examples are crossed random effects, and the variance of the mean is
(MS_seeds + MS_examples - MS_residual) / (S N), never below its larger part (Searle, Casella &
McCulloch 1992, *Variance Components*, ch. 4). The degrees of freedom are Satterthwaite's (1946),
the quantile Student's. With one seed only the examples are left, and the table says so.

Hypotheses are of three kinds, with a margin that was written before the runs:

- `above`: the difference is above the margin. It **holds** where the 95% interval lies above the
  margin; **the reverse holds** where it lies below the negative margin; it **does not hold** where
  it lies below the margin. (A margin below 0, of a logarithm, has no reverse.)
- `equivalent`: the difference is within the margin on both sides (two one-sided tests at 5%;
  Schuirmann 1987). It holds where the 90% interval lies inside, and does not where it lies outside.
- `not_above`: the difference is below the margin (one-sided at 5%): the 90% interval's upper end.
- `below`: a measure, not a difference, is below the margin: the 95% interval's upper end.

**Inconclusive**: the interval contains the margin. An estimate without an interval gets no verdict.

Statistics that are no mean over examples (a count of directions, a fitted rate) have a jackknife
over seeds: Student's interval with the jackknife's variance. Pairs of seeds are not independent, so
leaving out a seed leaves out all its pairs; the interval is then a little too wide (Efron & Stein
1981, Ann. Statist. 9).

Many hypotheses. The p-value is of the claim's own test, on the scale of its level: p < 0.05 where
it holds. A page shows it after Holm's correction (1979) over the page's hypotheses too, and a claim
that holds only before the correction is marked.

Power is of the planned numbers of seeds and examples, with the spread seen in a pilot, at the
stated true difference: the chance that the claim, true to that extent, is found to hold.

Collapsed runs end at the loss of the classes' prior: they learned nothing. They are named and
counted, and a verdict on an arm with one is inconclusive.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
from scipy import stats

from lora_jax import RequestError
from lora_jax.report.statistics import Interval

HOLDS, REVERSE, REFUTED, INCONCLUSIVE = (
    "holds",
    "the reverse holds",
    "does not hold",
    "inconclusive",
)
# The level of a kind's interval, and its claim's one-sided test.
LEVELS = {"above": 0.95, "equivalent": 0.90, "not_above": 0.90, "below": 0.95}


@dataclasses.dataclass(frozen=True)
class Evidence:
    """An estimate with its standard error and degrees of freedom, all in the unit measured."""

    estimate: float
    error: float
    freedom: float

    def interval(self, level: float = 0.95) -> Interval:
        """Student's interval of this level."""
        reach = float(stats.t.ppf((1 + level) / 2, self.freedom)) * self.error
        return Interval(self.estimate, self.estimate - reach, self.estimate + reach)

    def p_above(self, bound: float) -> float:
        """The one-sided p-value of "above the bound"."""
        if not self.error:
            return 0.0 if self.estimate > bound else 1.0
        return float(stats.t.sf((self.estimate - bound) / self.error, self.freedom))

    def scaled(self, factor: float) -> Evidence:
        """The same in another unit; a negative factor turns the difference round."""
        return Evidence(factor * self.estimate, abs(factor) * self.error, self.freedom)


def crossed(rows: np.ndarray) -> Evidence:
    """The mean of `rows (seeds, examples)`, of crossed seeds and examples.

    >>> rows = np.array([[0.0, 2.0], [0.0, 2.0]])  # the seeds agree: only examples differ
    >>> bool(crossed(rows).error == np.std([0, 2], ddof=1) / np.sqrt(2))
    True
    """
    num_seeds, num_examples = rows.shape
    mean = float(rows.mean())
    of_examples = rows.mean(axis=0)
    if num_seeds == 1:
        return Evidence(mean, _error_of_mean(of_examples), num_examples - 1)
    of_seeds = rows.mean(axis=1)
    residual = rows - of_seeds[:, None] - of_examples + mean
    freedoms = (num_seeds - 1, num_examples - 1, (num_seeds - 1) * (num_examples - 1))
    count = num_seeds * num_examples
    # Each part's mean square over S N, as it enters the variance.
    seeds = float(np.var(of_seeds, ddof=1)) / num_seeds
    examples = float(np.var(of_examples, ddof=1)) / num_examples
    rest = float((residual**2).sum()) / freedoms[2] / count
    variance = max(seeds + examples - rest, seeds, examples)
    if not variance:
        return Evidence(mean, 0.0, freedoms[0])
    parts = zip((seeds, examples, rest), freedoms, strict=True)
    return Evidence(
        mean, math.sqrt(variance), variance**2 / sum(part**2 / free for part, free in parts)
    )


def over_seeds(values: Sequence[float]) -> Evidence:
    """The mean of one number per seed."""
    values = np.asarray(values, np.float64)
    return Evidence(float(values.mean()), _error_of_mean(values), len(values) - 1)


def jackknife(statistic: Callable[[Collection[int]], float], seeds: Sequence[int]) -> Evidence:
    """A statistic of the seeds that are kept, with the jackknife's standard error over seeds.

    Raises `RequestError` for fewer than three seeds.

    >>> values = {0: 1.0, 1: 2.0, 2: 3.0}
    >>> found = jackknife(lambda kept: sum(values[s] for s in kept) / len(kept), [0, 1, 2])
    >>> round(found.interval().low, 2), round(found.interval().high, 2)
    (-0.48, 4.48)
    """
    if len(seeds) < 3:
        raise RequestError(f"{len(seeds)} seeds; an interval over seeds needs at least 3")
    without = np.array([statistic([s for s in seeds if s != left]) for left in seeds])
    variance = (len(seeds) - 1) / len(seeds) * float(np.square(without - without.mean()).sum())
    return Evidence(float(statistic(seeds)), math.sqrt(variance), len(seeds) - 1)


def mean_of_pairs(
    values: np.ndarray, pairs: Sequence[Sequence[int]]
) -> Callable[[Collection[int]], float]:
    """For `jackknife`: the mean of `values (pairs,)` over the pairs of which both seeds are kept.

    A pair of a seed with itself is a value of that seed.
    """
    found = np.asarray(values, np.float64)

    def statistic(kept: Collection[int]) -> float:
        inside = [m in kept and n in kept for m, n in pairs]
        return float(found[inside].mean())

    return statistic


def _error_of_mean(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


@dataclasses.dataclass(frozen=True)
class Claim:
    """A hypothesis as written before the runs. `power` is the chance to find it, if true to the
    extent `expected`, None where no pilot had a spread."""

    name: str
    text: str
    kind: str
    margin: float
    unit: str = "nats"
    power: float | None = None
    expected: float | None = None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A claim with what was seen; numbers in the claim's unit, `holm` after Holm's correction."""

    name: str
    claim: str
    kind: str
    margin: float
    unit: str
    estimate: float
    low: float
    high: float
    level: float
    p: float
    holm: float
    verdict: str
    power: float | None = None
    expected: float | None = None
    note: str = ""

    @property
    def seen(self) -> str:
        """The estimate with its interval."""
        form = {"points": "+.1f", "nats": "+.3f"}.get(self.unit, ".3g")
        text = f"{self.estimate:{form}} [{self.low:{form}}, {self.high:{form}}] ({self.level:.0%})"
        return f"{text} {self.unit}".rstrip() if self.unit != "nats" else text


def decide(claim: Claim, found: Evidence, *, spoilt: str = "") -> Verdict:
    """The verdict on a claim, before Holm; `spoilt` says which runs leave it inconclusive."""
    level, margin = LEVELS[claim.kind], claim.margin
    interval = found.interval(level)
    below = found.scaled(-1)
    if claim.kind == "above":
        p = min(1.0, 2 * found.p_above(margin))
        verdict = (
            HOLDS
            if interval.low > margin
            else REVERSE
            if interval.high < -margin <= 0
            else REFUTED
            if interval.high < margin
            else INCONCLUSIVE
        )
    elif claim.kind == "equivalent":
        p = max(found.p_above(-margin), below.p_above(-margin))
        inside = -margin < interval.low and interval.high < margin
        outside = interval.low > margin or interval.high < -margin
        verdict = HOLDS if inside else REFUTED if outside else INCONCLUSIVE
    else:
        p = min(1.0, (2 if claim.kind == "below" else 1) * below.p_above(-margin))
        verdict = (
            HOLDS if interval.high < margin else REFUTED if interval.low > margin else INCONCLUSIVE
        )
    return Verdict(
        claim.name, claim.text, claim.kind, margin, claim.unit,
        found.estimate, interval.low, interval.high, level, p, p,
        INCONCLUSIVE if spoilt else verdict, claim.power, claim.expected, spoilt,
    )  # fmt: skip


def with_holm(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The same with p-values after Holm's correction over all of them.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    corrected = holm([verdict.p for verdict in verdicts])
    return [dataclasses.replace(v, holm=p) for v, p in zip(verdicts, corrected, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979, Scand. J. Statist. 6)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    found, largest = [0.0] * len(p_values), 0.0
    for place, n in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[n]))
        found[n] = largest
    return found


def power_of(
    kind: str, margin: float, true: float, *, seed_sd: float, seeds: int, example_sd: float = 0.0,
    examples: int = 1,
) -> float:  # fmt: skip
    """The chance that a claim of this kind is found to hold at a true difference of `true`.

    `seed_sd` and `example_sd` are a pilot's standard deviations of the paired difference between
    seeds and between examples. Student's with `seeds - 1` degrees of freedom.
    """
    error = math.sqrt(seed_sd**2 / seeds + example_sd**2 / examples)
    free = seeds - 1
    reach = float(stats.t.ppf((1 + LEVELS[kind]) / 2, free)) * error

    def below(bound: float) -> float:
        return float(stats.t.cdf((bound - true) / error, free))

    if kind == "above":
        return 1 - below(margin + reach)
    upper = below(margin - reach)
    return upper if kind == "not_above" else max(0.0, upper - below(-margin + reach))
