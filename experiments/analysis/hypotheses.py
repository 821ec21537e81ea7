"""Hypotheses of experiments, decided by intervals: finished sweeps in, verdicts out."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lora_jax import RequestError
from lora_jax.data import load_splits
from lora_jax.report.runs import FinishedRun, Predictions, Run, finished_runs, read_runs
from lora_jax.report.statistics import (
    Interval,
    mean_interval,
    paired_difference,
    spread_over_weights,
)
from lora_jax.settings import Settings
from lora_jax.train.task import task_of

HOLDS, REFUTED, INCONCLUSIVE = "holds", "does not hold", "inconclusive"
REVERSE = "the reverse holds"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm of a sweep: its runs at the rate with the best validation loss, by seed.

    `rates` is `{rate: validation loss}` on the seed that all rates ran with; inf: diverged.
    `num_failed` are the seeds at the chosen rate that diverged: a verdict on them is inconclusive.
    `units (examples,)` number what was drawn independently, where that is not the single example
    (see `by_prompt`).
    """

    name: str
    rates: Mapping[float, float]
    lr: float
    runs: tuple[FinishedRun, ...]
    all_runs: tuple[FinishedRun, ...]
    num_failed: int = 0
    units: np.ndarray | None = None

    @property
    def losses(self) -> np.ndarray:
        """Test losses `(seeds, examples)` in the order of `index`, or `(seeds, units)`.

        Texts count by their numbers of tokens: their row's mean is the loss a token.
        """
        return np.stack([_losses(run.predictions, self.units) for run in self.runs])

    @property
    def index(self) -> np.ndarray:
        """Which example, or unit, each column of `losses` is."""
        index = self.runs[0].predictions.index
        return index if self.units is None else np.arange(self.units.max() + 1)

    @property
    def test_loss(self) -> Interval:
        """Mean test loss with its 95% interval over seeds and examples."""
        return mean_interval(self.losses, seed=0)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The training seeds of `runs`."""
        return tuple(run.config["seed"] for run in self.runs)

    @property
    def at_edge(self) -> bool:
        """Whether the chosen rate is the smallest or largest tried."""
        return len(self.rates) > 1 and self.lr in (min(self.rates), max(self.rates))

    @property
    def test_accuracy(self) -> float:
        """Mean test accuracy over seeds."""
        return float(np.mean([run.card.metrics.test.accuracy for run in self.runs]))


def _losses(predictions: Predictions, units: np.ndarray | None) -> np.ndarray:
    loss, weight = predictions.loss, predictions.weight
    if units is not None:
        total = np.bincount(units, weight)
        loss, weight = np.bincount(units, weight * loss) / total, total
    return spread_over_weights(loss, weight)


def by_prompt(arms: Mapping[str, Arm]) -> dict[str, Arm]:
    """The same, with prompts in the place of pairs: a test split has all pairs of the prompts that
    it has, and what one prompt's pairs have in common would make intervals of pairs too narrow."""
    run = next(iter(arms.values())).runs[0]
    config = Settings.from_config(run.config)
    test = load_splits(config.data, target=task_of(config.model).target).test
    texts = [test.texts[i] for i in run.predictions.index]
    units = np.unique(texts, return_inverse=True)[1]
    found = {}
    for name, one in arms.items():
        if any(not np.array_equal(r.predictions.index, run.predictions.index) for r in one.runs):
            raise RequestError(f"{name} was not tested on the pairs of {run.name}")
        found[name] = dataclasses.replace(one, units=units)
    return found


def read_arms(workdir: str | Path) -> dict[str, Arm]:
    """The arms of a sweep whose cells are named NAME-lrRATE-sSEED, in the sweep's order.

    Raises `RequestError` for cells of other names, or a sweep that has not ended.
    """
    named: dict[str, list[Run]] = {}
    runs, place = read_runs(workdir), Path(workdir) / "sweep.json"
    if not place.is_file():
        raise RequestError(f"{workdir} has no sweep.json; give the --workdir of a sweep")
    sweep = json.loads(place.read_text())
    order, there = sweep["cells"], {run.name for run in runs}
    if missing := [name for name in order if name not in there]:
        why = sweep.get("refused", {}).get(missing[0], "it has not begun; run the sweep to its end")
        raise RequestError(f"{workdir}: there is no {missing[0]}: {why}")
    known = {name: number for number, name in enumerate(order)}
    for run in sorted(runs, key=lambda run: known.get(run.name, len(known))):
        name, mark, _ = run.name.rpartition("-lr")
        if not mark:
            raise RequestError(f"{workdir}: cell {run.name!r} is of no tuned arm")
        failed = run.folder / "failure.json"
        if not run.finished and not failed.exists():
            raise RequestError(f"{workdir}: {run.name} has not ended; run the sweep to its end")
        named.setdefault(name, []).append(run)
    found = {name: _arm(name, some) for name, some in named.items()}
    counts = {name: len(one.runs) + one.num_failed for name, one in found.items()}
    if len(set(counts.values())) > 1:
        fewest = min(counts, key=counts.get)
        raise RequestError(
            f"{workdir}: {fewest} has {counts[fewest]} seeds at its best rate, others "
            f"{max(counts.values())}; run the sweep to its end"
        )
    return found


def _arm(name: str, runs: list[Run]) -> Arm:
    seed = runs[0].config["seed"]
    first = {r.config["optimizer"]["lr"]: r for r in runs if r.config["seed"] == seed}
    rates = {lr: _validation_loss(run) for lr, run in sorted(first.items())}
    lr = best_rate(name, rates)
    chosen = [run for run in runs if run.config["optimizer"]["lr"] == lr]
    own = finished_runs(chosen)
    own.sort(key=lambda run: run.config["seed"])
    tried = [run for run in finished_runs(runs) if run.config["seed"] == seed]
    more = (run for run in own if run not in tried)
    failed = len(chosen) - len(own)
    return Arm(name, rates, lr, tuple(own), (*tried, *more), failed)


def _validation_loss(run: Run) -> float:
    loss = run.card.metrics.validation.loss if isinstance(run, FinishedRun) else math.inf
    return loss if math.isfinite(loss) else math.inf


def best_rate(name: str, rates: Mapping[float, float]) -> float:
    """The rate with the least finite validation loss, the smallest of several."""
    finite = {lr: loss for lr, loss in rates.items() if math.isfinite(loss)}
    if not finite:
        raise RequestError(f"{name} diverged at every rate; tune it over smaller ones")
    return min(sorted(finite), key=finite.get)


def difference(first: Arm, second: Arm, *, level: float = 0.95) -> Interval:
    """Test loss of the first minus the second's, paired over examples and, where they share them,
    seeds: the wider of the bootstrap's interval, which is too narrow with few seeds, and Student's.
    """
    bootstrap = paired_difference(
        first.losses,
        second.losses,
        first_index=first.index,
        second_index=second.index,
        first_seeds=first.seeds,
        second_seeds=second.seeds,
        seed=0,
        level=level,
    )
    if first.seeds != second.seeds:
        return bootstrap
    return _hull(bootstrap, _student(first.losses - second.losses, level))


def _student(rows: np.ndarray, level: float) -> Interval:
    """The mean of `rows (seeds, examples)` with an interval from the spread of both.

    Variances of the means over seeds and over examples add up (a crossed design); degrees of
    freedom by Welch and Satterthwaite. Nearly right from three seeds on; with one, examples alone.
    """
    from scipy.stats import t

    num_seeds, num_examples = rows.shape
    parts = [(np.var(rows.mean(axis=0), ddof=1) / num_examples, num_examples - 1)]
    if num_seeds > 1:
        parts.append((np.var(rows.mean(axis=1), ddof=1) / num_seeds, num_seeds - 1))
    variance = sum(part for part, _ in parts)
    mean = float(rows.mean())
    if not variance:
        return Interval(mean, mean, mean)
    freedom = variance**2 / sum(part**2 / count for part, count in parts)
    reach = float(t.ppf((1 + level) / 2, freedom) * math.sqrt(variance))
    return Interval(mean, mean - reach, mean + reach)


def mean_of(rows: np.ndarray) -> Interval:
    """The mean of `rows (seeds, examples)` with the wider of the bootstrap's 95% and Student's."""
    return _hull(mean_interval(rows, seed=0), _student(rows, 0.95))


def _hull(one: Interval, other: Interval) -> Interval:
    return Interval(one.estimate, min(one.low, other.low), max(one.high, other.high))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A hypothesis, what was seen, and whether it holds."""

    name: str
    claim: str
    seen: str
    verdict: str


def interval_text(one: Interval, form: str = "+.3f") -> str:
    """The estimate with its interval in brackets."""
    return f"{one.estimate:{form}} [{one.low:{form}}, {one.high:{form}}]"


def worse(name: str, claim: str, first: Arm, second: Arm, margin: float) -> Verdict:
    """Whether the first's test loss is above the second's by more than the margin.

    It holds where the 95% interval lies above the margin and does not where it lies below; the
    reverse holds where it lies below the negative margin.
    """
    found = beyond(name, claim, difference(first, second), margin)
    return _inconclusive_if_failed(found, first, second)


def equivalent(name: str, claim: str, first: Arm, second: Arm, margin: float) -> Verdict:
    """Whether two test losses are the same within the margin: two one-sided tests at 5%.

    It holds where the 90% interval lies within ±margin and does not where it lies beyond.
    """
    found = difference(first, second, level=0.90)
    inside = -margin < found.low and found.high < margin
    outside = found.low > margin or found.high < -margin
    verdict = HOLDS if inside else REFUTED if outside else INCONCLUSIVE
    text = f"{interval_text(found)} (90%)"
    return _inconclusive_if_failed(Verdict(name, claim, text, verdict), first, second)


def not_worse(name: str, claim: str, first: Arm, second: Arm, margin: float) -> Verdict:
    """Whether the first's test loss is not above the second's by more than the margin: a one-sided
    test at 5%.
    """
    found = difference(first, second, level=0.90)
    verdict = HOLDS if found.high < margin else REFUTED if found.low > margin else INCONCLUSIVE
    text = f"{interval_text(found)} (90%)"
    return _inconclusive_if_failed(Verdict(name, claim, text, verdict), first, second)


def _inconclusive_if_failed(verdict: Verdict, *arms: Arm) -> Verdict:
    """What is left when unstable seeds drop out says nothing sure."""
    if not any(one.num_failed for one in arms):
        return verdict
    failed = ", ".join(f"{one.num_failed} of {one.name}" for one in arms if one.num_failed)
    return dataclasses.replace(
        verdict, verdict=INCONCLUSIVE, seen=f"{verdict.seen}; seeds that diverged: {failed}"
    )


def change_of_gap(after: tuple[Arm, Arm], before: tuple[Arm, Arm]) -> Interval:
    """(after[0] - after[1]) - (before[0] - before[1]) in test loss, paired throughout."""
    rows = [after[0], after[1], before[0], before[1]]
    if len({one.seeds for one in rows}) > 1:
        raise RequestError("the four arms have different seeds; run them with the same")
    first, second, third, fourth = (one.losses for one in rows)
    return mean_of((first - second) - (third - fourth))


def beyond(
    name: str, claim: str, found: Interval, margin: float, *, form: str = "+.3f", unit: str = ""
) -> Verdict:
    """Whether a 95% interval lies above the margin, below it or its negative, or contains it."""
    below = REVERSE if found.high < -margin else REFUTED
    verdict = HOLDS if found.low > margin else below if found.high < margin else INCONCLUSIVE
    return Verdict(name, claim, f"{interval_text(found, form)}{unit} (95%)", verdict)


def decide(name: str, claim: str, seen: str, holds: bool | None) -> Verdict:
    """What has no interval gets no verdict: what the point estimate alone says is named so."""
    alone = {None: INCONCLUSIVE, True: HOLDS, False: REFUTED}
    return Verdict(name, claim, seen, f"no interval (point estimate: {alone[holds]})")
