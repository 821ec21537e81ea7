"""How sure a mean over test examples is: seeded bootstrap intervals, over examples and over seeds.

Everything is the percentile bootstrap (Efron & Tibshirani 1993, *An Introduction to the Bootstrap*,
§6.2 for the resampling, §13.3 for the percentile interval). A table of runs by examples is a
crossed design, every run being scored on the same examples, so rows and columns are resampled
apart (Owen 2007, "The pigeonhole bootstrap"): drawing fresh examples inside each run would count
the same examples as new evidence once per seed.
"""

from dataclasses import dataclass

import numpy as np

from lora_jax.core.errors import RequestError

LEVEL = 0.95
NUM_RESAMPLES = 2000
_ENTRIES_AT_ONCE = 1 << 22  # bounds the memory of one block of resamples to some 64 MB


@dataclass(frozen=True)
class Interval:
    """An estimate with the percentile interval around it, all in the unit of what was measured."""

    estimate: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Interval":
        """The same interval in another unit, e.g. `scaled(100)` from fractions to points."""
        return Interval(self.estimate * factor, self.low * factor, self.high * factor)


def mean_interval(
    values,
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Bootstrap interval of a mean, over examples (N,) or over seeds and examples (S, N).

    Args:
      values: (N,) one score per example, or (S, N) one row per seed on the same N examples.
      seed: seeds the resampling; the same seed gives the same interval.
      num_resamples: how many bootstrap replicates the quantiles are read from.
      level: probability mass inside the interval, in (0, 1).

    Raises:
      RequestError: no values, more than two axes, or a level outside (0, 1).

    With few seeds the part of the interval that comes from seeds is too narrow (a resample of S
    rows has (S - 1) / S of their variance), and with one seed it is absent.

    >>> spread = mean_interval([0.0, 1.0] * 50, seed=0)
    >>> spread.estimate, bool(spread.low < 0.45), bool(spread.high > 0.55)
    (0.5, True, True)
    """
    rows = _rows(values)
    # Streams of their own, so that drawing more seeds leaves the drawn examples as they were.
    of_examples, of_rows = np.random.default_rng(seed).spawn(2)
    means = _resampled_example_means(rows, of_examples, num_resamples)
    return _percentile(float(rows.mean()), _draw_rows(means, of_rows), level)


def paired_difference(
    first,
    second,
    *,
    first_index,
    second_index,
    seed: int,
    first_seeds=None,
    second_seeds=None,
    num_resamples: int = NUM_RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """Bootstrap interval of mean(first) - mean(second) on the same test examples.

    Every replicate draws one set of examples for both sides, so what makes an example hard cancels
    (Efron & Tibshirani 1993, §8.3: resample the independent units, here the examples). Where both
    sides were run with the same seeds the rows are drawn together too, else apart.

    Args:
      first, second: (N,) or (S, N) scores, S of each its own, columns in the order of its index.
      first_index, second_index: (N,) which test example each column is.
      seed, num_resamples, level: as in `mean_interval`.
      first_seeds, second_seeds: (S,) the training seed of each row; without them rows are taken
        to be of seeds that do not correspond, unless both sides have one row.

    Raises:
      RequestError: the two sides were not scored on the same examples in the same order, or their
        shapes do not fit.

    >>> same = dict(first_index=range(4), second_index=range(4), seed=0)
    >>> paired_difference([1, 0, 1, 1], [1, 0, 1, 1], **same)
    Interval(estimate=0.0, low=0.0, high=0.0)
    """
    first, second = _rows(first), _rows(second)
    first_index, second_index = np.asarray(first_index), np.asarray(second_index)
    for rows, index in ((first, first_index), (second, second_index)):
        if index.shape != rows.shape[1:]:
            raise RequestError(
                f"scores of shape {rows.shape} with example indices of shape {index.shape}; "
                "give one index per column"
            )
    if not np.array_equal(first_index, second_index):
        raise RequestError(
            f"a paired difference needs the same test examples in the same order, and these differ "
            f"({len(first_index)} and {len(second_index)} examples, "
            f"{len(np.intersect1d(first_index, second_index))} in common); "
            "evaluate both runs on one test split"
        )
    if _rows_correspond(first, second, first_seeds, second_seeds):
        # Subtracting before resampling makes identical predictions differ by exactly nothing.
        return mean_interval(first - second, seed=seed, num_resamples=num_resamples, level=level)
    of_examples, *of_rows = np.random.default_rng(seed).spawn(3)
    means = _resampled_example_means(np.concatenate([first, second]), of_examples, num_resamples)
    both = (means[: len(first)], means[len(first) :])
    ours, theirs = (_draw_rows(own, rng) for own, rng in zip(both, of_rows, strict=True))
    return _percentile(float(first.mean() - second.mean()), ours - theirs, level)


def spread_over_weights(values, weights) -> np.ndarray:
    """(N,) scores whose plain mean is the weighted mean of `values`, and varies as it does.

    `m + w_i / mean(w) * (x_i - m)` with `m = sum(w x) / sum(w)`: the ratio estimator linearised
    (Cochran 1977, *Sampling Techniques*, §6.3), so that what is resampled is the example, with its
    weight. Equal weights leave the values as they are.

    >>> spread_over_weights([1.0, 4.0], [1, 2]).tolist()  # their weighted mean is 3
    [1.66666..., 4.33333...]
    """
    values, weights = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    if np.all(weights == weights[0]):
        return values
    mean = np.average(values, weights=weights)
    return mean + weights / weights.mean() * (values - mean)


def _rows(values) -> np.ndarray:
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim == 1:
        rows = rows[None]
    if rows.ndim != 2 or 0 in rows.shape:
        raise RequestError(
            f"scores of shape {rows.shape} have no mean to resample; "
            "give (examples,) or (seeds, examples) with at least one of each"
        )
    return rows


def _rows_correspond(first, second, first_seeds, second_seeds) -> bool:
    if first_seeds is None or second_seeds is None:
        return len(first) == len(second) == 1
    for rows, seeds in ((first, first_seeds), (second, second_seeds)):
        if len(seeds) != len(rows):
            raise RequestError(f"{len(seeds)} seeds for {len(rows)} rows of scores; give one each")
    return tuple(first_seeds) == tuple(second_seeds)


def _resampled_example_means(rows, rng, num_resamples) -> np.ndarray:
    """(R, N) scores -> (R, B) row means over N examples drawn with replacement, shared by rows.

    A draw is held as how often each example came up, so a block of replicates is one matrix
    product.
    """
    num_examples = rows.shape[1]
    block = max(1, _ENTRIES_AT_ONCE // num_examples)
    means = np.empty((len(rows), num_resamples))
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        drawn = rng.integers(num_examples, size=(size, num_examples))
        drawn += np.arange(size)[:, None] * num_examples
        counts = np.bincount(drawn.ravel(), minlength=size * num_examples)
        counts = counts.reshape(size, num_examples).astype(np.float64)
        means[:, start : start + size] = (rows @ counts.T) / num_examples
    return means


def _draw_rows(means, rng) -> np.ndarray:
    """(R, B) -> (B,): in every replicate the mean of R rows drawn with replacement."""
    num_rows, num_resamples = means.shape
    if num_rows == 1:
        return means[0]
    drawn = rng.integers(num_rows, size=(num_rows, num_resamples))
    return np.take_along_axis(means, drawn, axis=0).mean(axis=0)


def _percentile(estimate: float, replicates, level: float) -> Interval:
    if not 0 < level < 1:
        raise RequestError(f"level {level} is no probability; give one between 0 and 1, say 0.95")
    tail = (1 - level) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))
