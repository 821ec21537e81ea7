"""Intervals against closed forms, and the exactness and seeding of the resampling."""

import statistics

import numpy as np
import pytest

from lora_jax.core.errors import RequestError
from lora_jax.report.statistics import mean_interval, paired_difference, spread_over_weights


def paired(first, second, **options):
    """A paired difference over examples 0..N-1."""
    index = np.arange(np.shape(first)[-1])
    return paired_difference(
        first, second, first_index=index, second_index=index, **{"seed": 0, **options}
    )


def test_interval_of_a_mean_is_the_normal_one_for_many_examples():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=2000)
    error = values.std() / np.sqrt(len(values))  # of the plug-in distribution: ddof 0
    half = statistics.NormalDist().inv_cdf(0.975) * error
    found = mean_interval(values, seed=0, num_resamples=20_000)
    assert found.estimate == pytest.approx(values.mean(), abs=1e-12)
    assert found.low == pytest.approx(values.mean() - half, abs=0.04 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.04 * half)


def test_level_sets_the_width():
    values = np.random.default_rng(1).normal(size=800)
    half = statistics.NormalDist().inv_cdf(0.75) * values.std() / np.sqrt(800)
    found = mean_interval(values, seed=0, num_resamples=20_000, level=0.5)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.05)


def test_intervals_cover_the_true_mean_as_often_as_they_say():
    rng = np.random.default_rng(2)
    accuracy, trials, covered = 0.8, 400, 0
    for trial in range(trials):
        found = mean_interval(rng.random(300) < accuracy, seed=trial, num_resamples=400)
        covered += found.low <= accuracy <= found.high
    # 400 trials at 0.95 have a standard error of 0.011; the bootstrap itself is off by about 0.01.
    assert 0.90 <= covered / trials <= 0.985


def test_seeds_add_their_variance_to_that_of_examples():
    rng = np.random.default_rng(3)
    num_seeds, num_examples = 12, 1500
    example, seed = rng.normal(size=num_examples), rng.normal(0, 0.1, size=num_seeds)
    values = example[None, :] + seed[:, None]
    error = np.sqrt(values.mean(0).var() / num_examples + values.mean(1).var() / num_seeds)
    found = mean_interval(values, seed=0, num_resamples=20_000)
    assert (found.high - found.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.05)


def test_repeating_the_same_scores_for_each_seed_is_no_new_evidence():
    scores = np.random.default_rng(4).random(500)
    one = mean_interval(scores, seed=5)
    three = mean_interval(np.stack([scores] * 3), seed=5)
    assert (three.low, three.high) == pytest.approx((one.low, one.high), abs=1e-12)


def test_resampling_follows_its_seed_and_nothing_else():
    values = np.random.default_rng(6).random((3, 200))
    np.random.seed(0)
    first = mean_interval(values, seed=1)
    np.random.seed(1)
    assert mean_interval(values, seed=1) == first
    assert mean_interval(values, seed=2).low != first.low


def test_blocks_of_resamples_do_not_show(monkeypatch):
    values = np.random.default_rng(6).random((2, 50))
    whole = mean_interval(values, seed=1)
    monkeypatch.setattr("lora_jax.report.statistics._ENTRIES_AT_ONCE", 333)
    blocks = mean_interval(values, seed=1)
    assert (blocks.low, blocks.high) == pytest.approx((whole.low, whole.high), abs=1e-12)


@pytest.mark.parametrize("shape", [(300,), (3, 300)])
def test_identical_predictions_differ_by_exactly_nothing(shape):
    scores = np.random.default_rng(8).random(shape)
    seeds = range(1 if len(shape) == 1 else shape[0])
    found = paired(scores, scores, first_seeds=seeds, second_seeds=seeds)
    assert (found.estimate, found.low, found.high) == (0.0, 0.0, 0.0)


def test_paired_interval_is_that_of_the_differences():
    rng = np.random.default_rng(9)
    shared = rng.normal(size=2000)
    first, second = shared + rng.normal(0.1, 0.2, 2000), shared + rng.normal(0, 0.2, 2000)
    error = (first - second).std() / np.sqrt(2000)
    found = paired(first, second, num_resamples=20_000)
    assert found.estimate == pytest.approx((first - second).mean(), abs=1e-12)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert found.high - found.low < 0.5 * (2 * 1.96 * np.sqrt(2) * shared.std() / np.sqrt(2000))


def test_rows_of_other_seeds_are_drawn_apart_over_shared_examples():
    rng = np.random.default_rng(10)
    first = rng.normal(size=1000)[None] + rng.normal(0, 0.1, size=8)[:, None]
    second = first.mean(0)[None] + rng.normal(0, 0.1, size=10)[:, None]
    error = np.sqrt(first.mean(1).var() / 8 + second.mean(1).var() / 10)  # examples cancel
    found = paired(
        first, second, first_seeds=range(8), second_seeds=range(10), num_resamples=20_000
    )
    assert found.estimate == pytest.approx(first.mean() - second.mean(), abs=1e-12)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.07)


def test_difference_changes_sign_with_its_sides():
    rng = np.random.default_rng(11)
    first, second = rng.random((2, 400))
    forth, back = paired(first, second), paired(second, first)
    assert (back.estimate, back.low, back.high) == pytest.approx(
        (-forth.estimate, -forth.high, -forth.low), abs=1e-12
    )


def test_other_examples_or_another_order_are_refused():
    with pytest.raises(RequestError, match=r"same test examples.*2 in common"):
        paired_difference(
            [1, 0, 1], [1, 0, 1], first_index=[0, 1, 2], second_index=[1, 2, 3], seed=0
        )
    with pytest.raises(RequestError, match="same order"):
        paired_difference([1, 0], [1, 0], first_index=[0, 1], second_index=[1, 0], seed=0)
    with pytest.raises(RequestError, match="one index per column"):
        paired_difference([1, 0], [1, 0], first_index=[0], second_index=[0, 1], seed=0)


@pytest.mark.parametrize("values", [[], np.zeros((0, 4)), np.zeros((2, 2, 2))])
def test_nothing_to_resample_is_refused(values):
    with pytest.raises(RequestError, match="at least one"):
        mean_interval(values, seed=0)


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_levels_that_are_no_probability_are_refused(level):
    with pytest.raises(RequestError, match=str(level)):
        mean_interval([1.0, 2.0], seed=0, level=level)


def test_interval_of_a_weighted_mean_is_that_of_drawn_ratios():
    """Against the bootstrap of the ratio itself: examples drawn with their weights."""
    rng = np.random.default_rng(0)
    weights = rng.integers(5, 40, size=400)
    values = 1.0 + rng.normal(size=400) * (20 / weights)
    interval = mean_interval(spread_over_weights(values, weights), seed=0)
    drawn = rng.integers(400, size=(4000, 400))
    ratios = (values * weights)[drawn].sum(1) / weights[drawn].sum(1)
    assert interval.estimate == pytest.approx(np.average(values, weights=weights))
    wanted = np.quantile(ratios, [0.025, 0.975])
    assert np.allclose([interval.low, interval.high], wanted, atol=0.15 * np.ptp(wanted))


def test_equal_weights_leave_scores_as_they_are():
    values = np.random.default_rng(0).normal(size=9)
    np.testing.assert_array_equal(spread_over_weights(values, np.full(9, 3)), values)
