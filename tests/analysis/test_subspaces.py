"""φ and its null, against float64 NumPy written from the definition, and planted by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import analysis
from lora_jax.core.errors import RequestError


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def phi64(a1, a2):
    """Eq. (4) of the paper for every i and j, an SVD and a norm at a time."""
    u1, u2 = (np.linalg.svd(np.asarray(a, np.float64), full_matrices=False)[0] for a in (a1, a2))
    grid = np.empty((u1.shape[1], u2.shape[1]))
    for i in range(1, u1.shape[1] + 1):
        for j in range(1, u2.shape[1] + 1):
            norm = np.linalg.norm(u1[:, :i].T @ u2[:, :j], "fro")
            grid[i - 1, j - 1] = norm**2 / min(i, j)
    return grid


def orthonormal(seed, d, r):
    return np.linalg.qr(normal(seed, d, r))[0]


@pytest.mark.parametrize(("d", "r1", "r2"), [(12, 3, 5), (7, 7, 2), (30, 1, 4), (5, 8, 5)])
def test_phi_is_that_of_float64_numpy(d, r1, r2):
    a1, a2 = normal(0, d, r1), normal(1, d, r2)
    found = jax.jit(analysis.subspace_similarity)(a1.astype(np.float32), a2.astype(np.float32))
    np.testing.assert_allclose(found, phi64(a1, a2), atol=2e-6)
    assert float(found.min()) >= 0 and float(found.max()) <= 1 + 1e-6


def test_a_stack_of_layers_and_cells_is_each_of_them():
    a1, a2 = normal(0, 3, 2, 9, 4), normal(1, 3, 2, 9, 3)
    found = analysis.subspace_similarity(a1, a2)
    assert found.shape == (3, 2, 4, 3)
    for place in np.ndindex(3, 2):
        np.testing.assert_allclose(found[place], phi64(a1[place], a2[place]), atol=2e-6)


def test_a_space_with_itself_is_1_and_with_its_complement_0():
    basis = orthonormal(0, 10, 10)
    a, rest = basis[:, :4] * [4.0, 3.0, 2.0, 1.0], basis[:, 4:] * [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    np.testing.assert_allclose(analysis.subspace_similarity(a, a), 1.0, atol=1e-6)
    np.testing.assert_allclose(analysis.subspace_similarity(a, rest), 0.0, atol=1e-6)
    # Whatever the columns are mixed with, the whole space is the same.
    mixed = a @ normal(3, 4, 4)
    assert float(analysis.subspace_similarity(a, mixed)[-1, -1]) == pytest.approx(1.0, abs=1e-5)


def test_planted_directions_are_counted_by_hand():
    """The first and third directions of one are the second and first of the other."""
    basis = orthonormal(1, 16, 8)
    a1 = basis[:, [0, 1, 2]] * [3.0, 2.0, 1.0]
    a2 = basis[:, [2, 0, 7, 6]] * [4.0, 3.0, 2.0, 1.0]
    expected = [
        [0, 1, 1, 1],  # direction 0 is a2's second
        [0, 1 / 2, 1 / 2, 1 / 2],
        [1, 2 / 2, 2 / 3, 2 / 3],
    ]
    found = analysis.subspace_similarity(a1, a2)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_an_angle_between_two_lines_is_its_squared_cosine():
    angle = 0.3
    a1, a2 = np.array([[1.0], [0.0]]), np.array([[np.cos(angle)], [np.sin(angle)]])
    found = analysis.subspace_similarity(a1, a2)
    np.testing.assert_allclose(found, np.cos(angle) ** 2, atol=1e-6)
    # The projection metric is sqrt(p - sum of squared cosines): phi = 1 - d²/p.
    metric = np.sqrt(1 - np.cos(angle) ** 2)
    np.testing.assert_allclose(found, 1 - metric**2, atol=1e-6)


def test_directions_that_are_not_there_share_nothing():
    """A padded adapter: singular vectors of 0 would be whatever the SVD makes up."""
    a = np.zeros((9, 4), np.float32)
    a[:, :2] = normal(0, 9, 2)
    found = np.asarray(analysis.subspace_similarity(a, a))
    np.testing.assert_allclose(found[1:2, 1:2], 1.0, atol=1e-5)
    np.testing.assert_allclose(found[3, 3], 2 / 4, atol=1e-5)
    nothing = analysis.subspace_similarity(np.zeros((9, 2), np.float32), a)
    assert np.array_equal(nothing, np.zeros((2, 4)))


@pytest.mark.parametrize("space", ["input", "output"])
def test_phi_of_deltas_is_that_of_the_dense_ones_and_no_mixing_changes_it(space):
    a1, b1, a2, b2 = normal(0, 12, 3), normal(1, 3, 10), normal(2, 12, 4), normal(3, 4, 10)
    deltas = [a1 @ b1, a2 @ b2]
    vectors = [np.linalg.svd(x if space == "input" else x.T)[0] for x in deltas]
    expected = phi64(vectors[0][:, :3] * [3, 2, 1], vectors[1][:, :4] * [4, 3, 2, 1])
    found = analysis.delta_subspace_similarity(a1, b1, a2, b2, space=space)
    np.testing.assert_allclose(found, expected, atol=5e-6)
    mix = normal(4, 3, 3) + 2 * np.eye(3)
    mixed = analysis.delta_subspace_similarity(
        a1 @ mix, np.linalg.inv(mix) @ b1, a2, b2, space=space
    )
    np.testing.assert_allclose(mixed, found, atol=2e-5)
    # A alone does change, but for all of its directions together.
    plain, moved = (analysis.subspace_similarity(a, a2) for a in (a1, a1 @ mix))
    assert float(jnp.max(jnp.abs(plain - moved))) > 0.01
    np.testing.assert_allclose(plain[-1], moved[-1], atol=2e-5)


def test_what_cancels_in_the_factors_is_no_direction():
    a, b = normal(0, 30, 8), normal(1, 8, 20)
    nothing = np.concatenate([a, a], axis=1), np.concatenate([b, -b])
    for svd in (analysis.delta_svd(*nothing), analysis.delta_svd(0 * a, b)):
        assert (
            not np.any(svd.s) and not np.any(svd.basis("input")) and not np.any(svd.basis("output"))
        )
    # One direction beside them, a tenth as large, is one.
    u, v = normal(2, 30, 1), normal(3, 1, 20)
    one = analysis.delta_svd(np.c_[nothing[0], u / 10], np.r_[nothing[1], v])
    for space in ("input", "output"):
        assert np.sum(np.any(one.basis(space) != 0, axis=0)) == 1
    assert one.s[0] == pytest.approx(np.linalg.norm(u) * np.linalg.norm(v) / 10, rel=1e-4)


def test_both_spaces_of_one_kernel_have_as_many_directions():
    for seed in range(6):
        kernel = (normal(seed, 3, 2) @ normal(seed + 9, 2, 4000)).astype(np.float32)
        svd = analysis.kernel_svd(kernel)
        counts = [int(np.any(svd.basis(s) != 0, axis=0).sum()) for s in ("input", "output")]
        assert counts == [2, 2]


def test_phi_of_dense_kernels_takes_their_first_directions():
    w1, w2 = normal(0, 8, 6), normal(1, 8, 6)
    for space, turned in (("input", lambda x: x), ("output", lambda x: x.T)):
        found = analysis.kernel_subspace_similarity(w1, w2, space=space, num_directions=4)
        np.testing.assert_allclose(found, phi64(turned(w1), turned(w2))[:4, :4], atol=5e-6)


@pytest.mark.parametrize(("r1", "r2", "d"), [(4, 8, 64), (8, 8, 16), (3, 1, 5)])
def test_the_null_of_the_formula_is_that_of_sampling(r1, r2, d):
    samples = analysis.sample_similarity(jax.random.key(0), r1, r2, d, num_samples=400)
    expected = np.maximum(np.arange(1, r1 + 1)[:, None], np.arange(1, r2 + 1)) / d
    np.testing.assert_allclose(analysis.expected_similarity(r1, r2, d), expected, rtol=1e-6)
    error = np.asarray(samples.std(0)) / np.sqrt(400)
    assert np.all(np.abs(samples.mean(0) - expected) < 4.5 * error + 1e-6)


def test_bfloat16_is_analysed_in_float32():
    a = jnp.asarray(normal(0, 40, 4), jnp.bfloat16)
    found = analysis.subspace_similarity(a, a)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(
        found, phi64(a.astype(jnp.float32), a.astype(jnp.float32)), atol=2e-6
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: analysis.subspace_similarity(normal(0, 4, 2), normal(0, 5, 2)), "4 and 5 dim"),
        (lambda: analysis.subspace_similarity(np.ones(3), np.ones((3, 1))), r"shape \(3,\)"),
        (lambda: analysis.subspace_similarity(np.ones((3, 1), int), np.ones((3, 1))), "int"),
        (lambda: analysis.delta_svd(normal(0, 4, 2), normal(0, 3, 5)), "rank 2.*rank 3"),
        (lambda: analysis.delta_svd(normal(0, 4, 2), normal(0, 2, 5)).basis("in"), "space is 'in'"),
        (lambda: analysis.expected_similarity(9, 2, 8), "9 and 2 directions in 8"),
    ],
)
def test_what_cannot_be_compared_is_named(call, words):
    with pytest.raises(RequestError, match=words):
        call()
