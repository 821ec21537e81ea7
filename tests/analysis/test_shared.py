"""Shared directions on planted truths, and their null against float64 NumPy's random spaces."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import analysis
from lora_jax.core.errors import RequestError

D = 384


def orthonormal(rng, d, r):
    return np.linalg.qr(rng.normal(size=(d, r)))[0]


def planted(rng, r1, r2, count, cosine, order="random", d=D):
    """Two bases that share `count` directions of squared cosine `cosine`; all else is random.

    `order`: the shared directions come "first", at "random" places, or "mixed" with all others.
    """
    pairs = orthonormal(rng, d, 2 * count)
    first, other = pairs[:, :count], pairs[:, count:]
    found = []
    for r, own in ((r1, first), (r2, np.sqrt(cosine) * first + np.sqrt(1 - cosine) * other)):
        rest = rng.normal(size=(d, r - count))
        basis = np.c_[own, np.linalg.qr(rest - own @ (own.T @ rest))[0]]
        if order == "random":
            basis = basis[:, rng.permutation(r)]
        elif order == "mixed":
            basis = basis @ orthonormal(rng, r, r)
        found.append(basis)
    return found


def counts_of(num, *args, seed=0, **options):
    rng = np.random.default_rng(seed)
    bases = [planted(rng, *args, **options) for _ in range(num)]
    return analysis.shared_directions(*map(np.stack, zip(*bases, strict=True))).count


@pytest.mark.parametrize("order", ["first", "random", "mixed"])
@pytest.mark.parametrize("cosine", [1.0, 0.8])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_planted_directions_among_64_are_counted(count, cosine, order):
    found = counts_of(6, 64, 64, count, cosine, order=order)
    assert np.all(np.abs(found - count) <= 1) and np.sum(found == count) >= 4


@pytest.mark.parametrize(("r1", "r2"), [(64, 64), (64, 8), (8, 8), (1, 4)])
def test_random_spaces_share_nothing_but_for_the_level(r1, r2):
    """1%, up to 2% where the approximation is loosest: of 100, 7 or more have a chance of 0.5%."""
    rng = np.random.default_rng(0)
    # The first space may as well be the first axes.
    found = [
        analysis.shared_directions(np.eye(D)[:, :r1], orthonormal(rng, D, r2)).count
        for _ in range(100)
    ]
    assert np.sum(found) <= 6 and np.max(found) <= 1


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_directions_are_found_among_many_and_weak_ones_among_few(count):
    found = counts_of(12, 8, 64, count, 0.8, order="mixed")
    assert np.all(np.abs(found - count) <= 1) and np.sum(found == count) >= 10
    found = counts_of(12, 8, 8, count, 0.3, order="mixed")
    assert np.all(np.abs(found - count) <= 1) and np.sum(found == count) >= 10


@pytest.mark.parametrize(("r1", "r2", "d"), [(64, 8, 384), (8, 8, 20), (8, 1, 384), (20, 20, 60)])
def test_the_threshold_is_a_quantile_of_random_spaces(r1, r2, d):
    """Of 2,000 largest cos² of float64 NumPy 0.1% to 2% exceed the quantile of 1%."""
    rng = np.random.default_rng(0)
    # The first r1 axes are one space; the other's squared singular values on them are cos².
    draws = np.linalg.qr(rng.normal(size=(2000, d, r2)))[0][:, :r1]
    largest = np.linalg.svd(draws, compute_uv=False)[:, 0] ** 2
    found = analysis.shared_directions(np.eye(d)[:, :r1], orthonormal(rng, d, r2))
    assert 0.001 <= np.mean(largest > found.thresholds[0]) <= 0.02
    assert np.all(np.diff(found.thresholds) < 0)  # fewer directions are left to each next test


def test_cosines_are_those_of_float64_numpy_in_stacks():
    rng = np.random.default_rng(0)
    u1, u2 = (np.stack([orthonormal(rng, 30, r) for _ in range(6)]) for r in (3, 5))
    u1, u2 = u1.reshape(2, 3, 30, 3), u2.reshape(2, 3, 30, 5)
    found = analysis.shared_directions(u1, u2)
    assert found.count.shape == (2, 3) and found.cosines.shape == (2, 3, 3)
    for place in np.ndindex(2, 3):
        angles = np.linalg.svd(u1[place].T @ u2[place], compute_uv=False)
        np.testing.assert_allclose(found.cosines[place], angles**2, atol=2e-6)


def test_directions_that_are_not_there_do_not_count_and_leave_the_test_alone():
    rng = np.random.default_rng(0)
    u1, u2 = planted(rng, 4, 6, 2, 1.0)
    padded = np.c_[u1, np.zeros((D, 5))]
    plain, wide = (analysis.shared_directions(u, u2) for u in (u1, padded))
    assert plain.count == wide.count == 2
    np.testing.assert_allclose(wide.thresholds, np.r_[plain.thresholds, 1.0, 1.0])
    assert analysis.shared_directions(np.zeros((D, 3)), u2).count == 0


def test_spaces_near_the_whole_are_counted_soundly_or_refused():
    rng = np.random.default_rng(0)
    found = [
        analysis.shared_directions(*planted(rng, 15, 16, 0, 1.0, d=32)).count for _ in range(60)
    ]
    assert np.mean(found) < 0.1  # cos² near 1 are nothing here
    full = orthonormal(rng, 32, 32)
    assert analysis.shared_directions(full[:, :16], full[:, 16:]).count == 0
    with pytest.raises(RequestError, match="always meet; compare at most 32"):
        analysis.shared_directions(orthonormal(rng, 32, 17), orthonormal(rng, 32, 16))
    with pytest.raises(RequestError, match="in 30 dimensions always meet"):
        one, other = planted(rng, 16, 16, 0, 1.0, d=32)
        analysis.shared_directions(one, other, num_removed=2)


def test_a_marginal_gain_says_where_a_direction_is():
    """φ(k, k) stays up after a single direction; the gain is 1 at its place and null elsewhere."""
    rng = np.random.default_rng(0)
    u1, u2 = planted(rng, 32, 32, 1, 1.0, order="first")
    u1, u2 = u1[:, np.r_[1:5, 0, 5:32]], u2[:, np.r_[1:9, 0, 9:32]]  # the fifth and the ninth
    gains = np.asarray(analysis.marginal_similarity(analysis.basis_similarity(u1, u2)))
    squares = (u1.T @ u2) ** 2
    wanted = [squares[:k, :k].sum() - squares[: k - 1, : k - 1].sum() for k in range(1, 33)]
    np.testing.assert_allclose(gains, wanted, atol=1e-5)
    null = np.asarray(analysis.marginal_similarity(analysis.expected_similarity(32, 32, D)))
    np.testing.assert_allclose(null, (2 * np.arange(1, 33) - 1) / D, atol=1e-5)
    assert np.argmax(gains - null) == 8 and gains[8] > 0.9
    assert np.max(np.delete(gains - null, 8)) < 0.2


def adapters_of_one_start(rng, r1, r2, num_common, step):
    """`(a1, b1, a2, b2, start)`: nested starts of uniform columns, δa of rank 2 of its own each,
    and `num_common` learned directions of both."""
    start = rng.uniform(-1, 1, size=(D, r2)) / np.sqrt(D)
    common = orthonormal(rng, D, num_common)
    found = []
    for r in (r1, r2):
        own = rng.normal(size=(D, 2)) @ rng.normal(size=(2, r))
        learned = common @ rng.normal(size=(num_common, r))
        delta = own / np.linalg.norm(own) + learned / max(np.linalg.norm(learned), 1e-9)
        found += [start[:, :r] + step * delta, rng.normal(size=(r, D))]
    return (*found, start[:, :r1])


def counted_outside(a1, b1, a2, b2, start):
    bases = [
        analysis.delta_svd(analysis.remove_directions(a, start), b).basis("input")
        for a, b in ((a1, b1), (a2, b2))
    ]
    return int(analysis.shared_directions(*bases, num_removed=start.shape[1]).count)


@pytest.mark.parametrize(
    ("r1", "r2", "step"), [(8, 64, 0.02), (8, 64, 1.0), (8, 8, 0.02), (64, 64, 1.0)]
)
def test_a_shared_start_is_taken_out_and_what_both_learned_is_left(r1, r2, step):
    for num_common in (0, 1):
        rng = np.random.default_rng(num_common)
        found = [
            counted_outside(*adapters_of_one_start(rng, r1, r2, num_common, step)) for _ in range(4)
        ]
        assert np.all(np.abs(np.array(found) - num_common) <= 1)
        assert found.count(num_common) >= 3
    # With the start left in, nothing but it is seen.
    a1, b1, a2, b2, _ = adapters_of_one_start(np.random.default_rng(0), r1, r2, 0, 0.02)
    bases = [analysis.delta_svd(a, b).basis("input") for a, b in ((a1, b1), (a2, b2))]
    assert analysis.shared_directions(*bases).count >= 7


def test_removal_is_the_projection_of_float64_numpy_and_leaves_no_rounding():
    rng = np.random.default_rng(0)
    a, start = rng.normal(size=(2, 40, 5)), rng.normal(size=(2, 40, 3))
    found = analysis.remove_directions(a, start)
    for n in range(2):
        q = np.linalg.qr(start[n])[0]
        np.testing.assert_allclose(found[n], a[n] - q @ (q.T @ a[n]), atol=1e-5)
    untrained = analysis.remove_directions(start @ rng.normal(size=(2, 3, 7)), start)
    assert not np.any(untrained)
    nothing = analysis.remove_directions(a, np.zeros((2, 40, 3)))
    np.testing.assert_allclose(nothing, a, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda u: analysis.shared_directions(u, u[:8]), "give .*d, r1"),
        (lambda u: analysis.shared_directions(2 * u, u), "not orthonormal; take column_basis"),
        (lambda u: analysis.shared_directions(u, u, level=0.5), "level is 0.5"),
        (lambda u: analysis.shared_directions(u, u, num_removed=-1), "num_removed is -1 of 9"),
        (lambda u: analysis.shared_directions(np.ones(3), u), r"shape \(3,\)"),
        (lambda u: analysis.remove_directions(u, jnp.ones((4, 1))), r"the start \(4, 1\)"),
    ],
)
def test_what_cannot_be_counted_is_named(call, words):
    with pytest.raises(RequestError, match=words):
        call(np.eye(9)[:, :2])
