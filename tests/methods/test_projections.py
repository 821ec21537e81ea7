"""Fastfood and dense projections: what they are as matrices, and the adjoint is the adjoint."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.core.errors import RequestError
from lora_jax.methods.projections import _Order, _signs, dense, fastfood, walsh_hadamard

PROJECTIONS = {"fastfood": fastfood, "dense": dense}


def matrix_of(project, size, num, seed=0):
    """P (size, num), a column at a time."""
    key = jax.random.key(seed)
    return np.asarray(jax.jit(jax.vmap(lambda e: project(e, size, key)))(jnp.eye(num))).T


def hadamard64(n):
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


@pytest.mark.parametrize("n", [1, 2, 64, 128, 256, 1024])
def test_the_transform_is_sylvesters_matrix(n):
    x = np.random.default_rng(n).normal(size=(3, n))
    found = walsh_hadamard(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, x @ hadamard64(n), atol=2e-5 * n**0.5, rtol=1e-4)


@pytest.mark.parametrize("width", [1, 2, 4, 8, 32, 1024, 2048])
def test_an_order_is_a_permutation_and_put_undoes_take(width):
    order = _Order(jax.random.key(width), width)
    x = jnp.arange(width, dtype=jnp.float32)
    assert sorted(np.asarray(order.take(x)).tolist()) == list(range(width))
    np.testing.assert_array_equal(order.put(order.take(x)), x)
    if width >= 1024:  # and no simple one
        moved = np.asarray(order.take(x))
        assert np.mean(np.diff(moved) == 1) < 0.02
        assert abs(np.corrcoef(moved, x)[0, 1]) < 0.15


def test_fastfood_is_the_product_of_its_factors():
    """H G Π H B from the definition, in float64, with B, Π and G read off the code's own draws."""
    size, num, key = 50, 20, jax.random.key(3)
    of_signs, of_order, of_gains = jax.random.split(key, 3)
    signs = np.resize(np.asarray(_signs(of_signs, num), np.float64), 64)  # beyond num: of zeros
    gains = np.asarray(jax.random.normal(of_gains, (64,)), np.float64)
    order = np.asarray(_Order(of_order, 64).take(jnp.arange(64.0))).astype(int)
    h = hadamard64(64)
    whole = h @ np.diag(gains) @ np.eye(64)[order] @ h @ np.diag(signs)
    wanted = whole[:size, :num] / np.sqrt(size * np.sum(gains**2))
    np.testing.assert_allclose(matrix_of(fastfood, size, num, 3), wanted, atol=2e-6)


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize(
    ("size", "num"),
    [
        (1, 1),
        (7, 3),
        (5000, 3000),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((64, 64), (1000, 40))),
    ],
)
def test_the_adjoint_matches_the_product_by_inner_products(name, size, num):
    rng = np.random.default_rng(size)
    theta, x = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in (num, size))
    project = lambda t: PROJECTIONS[name](t, size, jax.random.key(1))  # noqa: E731
    forward, transpose = (
        jax.jit(lambda t: jax.vjp(project, t)[0])(theta),
        jax.vjp(project, theta)[1],
    )
    inner = np.vdot(np.asarray(x, np.float64), np.asarray(forward, np.float64))
    (back,) = transpose(x)
    other = np.vdot(np.asarray(back, np.float64), np.asarray(theta, np.float64))
    assert abs(inner - other) < 1e-5 * np.linalg.norm(forward) * np.linalg.norm(x) + 1e-6


@pytest.mark.parametrize("name", PROJECTIONS)
def test_columns_have_unit_norm_and_are_nearly_orthogonal(name):
    size, num = 3000, 200
    columns = matrix_of(PROJECTIONS[name], size, num)
    norms = np.linalg.norm(columns, axis=0)
    tolerance = 1e-5 if name == "dense" else 0.06
    assert abs(norms.mean() - 1) < 0.01 and np.all(np.abs(norms - 1) < tolerance)
    off = (columns.T @ columns)[~np.eye(num, dtype=bool)]
    # Of independent Gaussian columns it is 1 / sqrt(size) = 0.018.
    assert np.sqrt(np.mean(off**2)) < 0.03 and np.abs(off).max() < 0.15


def test_the_norm_is_1_in_expectation_over_keys():
    keys = jax.random.split(jax.random.key(0), 300)
    column = jax.vmap(lambda key: fastfood(jnp.zeros(5).at[2].set(1.0), 37, key))(keys)
    squares = np.sum(np.square(column), axis=1)
    assert abs(squares.mean() - 1) < 4 * squares.std() / np.sqrt(300)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_subspace_lies_in_every_larger_one_of_its_key(name):
    project, key = PROJECTIONS[name], jax.random.key(5)
    theta = jnp.asarray(np.random.default_rng(0).normal(size=9), jnp.float32)
    wider = jnp.pad(theta, (0, 21))
    np.testing.assert_allclose(project(theta, 80, key), project(wider, 80, key), atol=1e-6)
    assert not np.allclose(project(theta, 80, key), project(theta, 80, jax.random.key(6)))


@pytest.mark.parametrize("name", PROJECTIONS)
def test_the_matrix_is_the_same_for_every_dtype_and_setting_of_x64(name):
    key, theta = jax.random.key(2), jnp.array([1.0, -0.5, 2.0], jnp.float32)
    project, before = PROJECTIONS[name], jax.config.jax_enable_x64
    found = np.asarray(project(theta, 21, key))
    narrow = project(theta.astype(jnp.bfloat16), 21, key)
    assert narrow.dtype == jnp.float32
    np.testing.assert_array_equal(narrow, found)  # 1, -0.5 and 2 are bfloat16's own
    try:
        jax.config.update("jax_enable_x64", True)
        np.testing.assert_array_equal(project(theta, 21, key), found)
        wide = project(theta.astype(jnp.float64), 21, key)
        assert wide.dtype == jnp.float64
        np.testing.assert_allclose(wide, found, atol=1e-6)
    finally:
        jax.config.update("jax_enable_x64", before)


def test_memory_is_that_of_a_few_vectors_of_parameters():
    """P would be 1024 times as large; nothing of that size is there, forwards or back."""
    size, num = 100_000, 1024

    def loss(theta):
        return jnp.sum(jnp.sin(fastfood(theta, size, jax.random.key(0))))

    compiled = jax.jit(jax.grad(loss)).lower(jax.ShapeDtypeStruct((num,), jnp.float32)).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    assert memory < 12 * 4 * 131_072 < 4 * size * num / 50


def test_cells_of_different_keys_are_mapped_as_one_program():
    keys = jax.random.split(jax.random.key(0), 3)
    thetas = jnp.asarray(np.random.default_rng(1).normal(size=(3, 6)), jnp.float32)

    def gradient(theta, key):
        return jax.grad(lambda t: jnp.sum(fastfood(t, 40, key) ** 3))(theta)

    together = jax.jit(jax.vmap(gradient))(thetas, keys)
    for theta, key, row in zip(thetas, keys, together, strict=True):
        np.testing.assert_allclose(row, gradient(theta, key), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fastfood(jnp.ones(9), 5, jax.random.key(0)), "d is 9; a subspace of 5 .* 1 to 8"),
        (lambda: fastfood(jnp.ones((2, 2)), 5, jax.random.key(0)), r"\(2, 2\)"),
        (lambda: fastfood(jnp.ones(2), 0, jax.random.key(0)), "0 parameters"),
        (lambda: walsh_hadamard(jnp.ones(6)), "power of 2"),
    ],
)
def test_what_is_no_subspace_is_named(call, words):
    with pytest.raises(RequestError, match=words):
        call()
