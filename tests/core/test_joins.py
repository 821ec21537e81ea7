"""Kernels, or axes, that the model makes into one: what the grid of constructs does not ask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lora_jax as lj
from tests.core.adapted import largest_difference, normal, random_like, value_and_gradients

pytestmark = pytest.mark.usefixtures("float64")


def adapted(params, axes=None, **settings):
    method = lj.LoRA(targets=".*kernel|q|k", rank=2, alpha=3.0, axes=axes, **settings)
    trainable, frozen = method.init(jax.random.key(0), params)
    return method, random_like(trainable, seed=3), frozen


def test_a_fused_lstm_cell_is_low_rank_and_equals_its_merged_one():
    cell, x = nn.OptimizedLSTMCell(4), normal(np.random.default_rng(2), (5, 8), jnp.float64)
    carry = (jnp.ones((5, 4)), jnp.cos(jnp.arange(20.0)).reshape(5, 4))
    params = cell.init(jax.random.key(0), carry, x)
    params = random_like(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params), seed=1)
    method, trainable, frozen = adapted(params, lj.kernel_axes(cell.apply, params, carry, x))
    assert len(trainable) == 8

    def run(params, x):
        return cell.apply(params, carry, x)[1]

    found = value_and_gradients(
        lambda t, x: lj.lift(run, strict=True)(method.bind(t, frozen), x), trainable, x
    )
    expected = value_and_gradients(lambda t, x: run(method.merge(t, frozen), x), trainable, x)
    assert largest_difference(found, expected) < 1e-9


def test_joined_kernels_share_one_mask_of_their_input():
    params = random_like({"q": jnp.zeros((64, 3)), "k": jnp.zeros((64, 4))}, seed=1)
    method, trainable, frozen = adapted(params, dropout=0.5)
    run = lj.lift(lambda p, x: x @ jnp.concatenate([p["q"], p["k"]], axis=1), strict=True)
    # Each row of x is one input, so each row of the change is that of the merged one or zero.
    change = run(method.bind(trainable, frozen, key=jax.random.key(7)), jnp.eye(64))
    change -= run(frozen, jnp.eye(64))
    merged = run(method.merge(trainable, frozen), jnp.eye(64)) - run(frozen, jnp.eye(64))
    kept = np.abs(change).max(axis=1) > 1e-9
    assert 10 < kept.sum() < 54
    np.testing.assert_allclose(change, 2 * merged * kept[:, None], atol=1e-9)


def test_one_kernel_dropped_and_one_not_are_materialised_and_it_is_said():
    params = random_like({"q": jnp.zeros((6, 3)), "k": jnp.zeros((6, 4))}, seed=1)
    rules = [lj.Rule("q", rank=2, alpha=3.0, dropout=0.5), lj.Rule("k", rank=2, alpha=3.0)]
    method = lj.LoRA(rules=rules)
    trainable, frozen = method.init(jax.random.key(0), params)
    bound = method.bind(random_like(trainable, seed=3), frozen, key=jax.random.key(7))
    run = lj.lift(lambda p, x: x @ jnp.concatenate([p["q"], p["k"]], axis=1))
    with pytest.warns(lj.MaterialisedWarning, match="dropout does nothing there"):
        run(bound, jnp.ones((5, 6)))


def test_a_complex_kernel_times_a_complex_number_is_low_rank():
    params = random_like({"q": jnp.zeros((6, 4)), "k": jnp.zeros((6, 4))}, seed=1)
    method, trainable, frozen = adapted(params)

    def run(p, x):
        kernel = jax.lax.complex(p["q"], p["k"]) * (0.5 - 2j)
        return jnp.abs(jax.lax.dot(x.astype(kernel.dtype), kernel)) + jnp.imag(x @ -kernel)

    x = normal(np.random.default_rng(2), (5, 6), jnp.float64)
    found = value_and_gradients(
        lambda t, x: lj.lift(run, strict=True)(method.bind(t, frozen), x), trainable, x
    )
    expected = value_and_gradients(lambda t, x: run(method.merge(t, frozen), x), trainable, x)
    assert largest_difference(found, expected) < 1e-9


@pytest.mark.filterwarnings("ignore::lora_jax.MaterialisedWarning")
def test_a_stack_and_outputs_in_one_axis_are_right_whatever_else_they_meet():
    """Only a convolution follows them; the rest sees W + ΔW, in the shape that the model sees."""
    params = {"k": normal(np.random.default_rng(1), (3, 6, 2), jnp.float64)}
    axes = {"k": lj.KernelAxes(stack=(-2,), in_=(-3,), out=(-1,))}
    method, trainable, frozen = adapted(params, axes)

    def run(p, x):
        kernel = jax.lax.optimization_barrier(p["k"].reshape(3, 12) * 2.0)
        kernel = jax.device_put(kernel)
        turned = jnp.cos(kernel.T @ x[:3]) + jnp.flip(kernel, 1).T[:, :1] + kernel[1, :, None]
        scanned = jax.lax.scan(lambda s, row: (s + jnp.sin(row), None), turned[:, 0], kernel)[0]
        return x @ jax.lax.cond(x[0, 0] > 9, lambda k: k, lambda k: -k, turned).T + scanned[None]

    x = normal(np.random.default_rng(2), (5, 6), jnp.float64)
    found = value_and_gradients(lambda t, x: lj.lift(run)(method.bind(t, frozen), x), trainable, x)
    expected = value_and_gradients(lambda t, x: run(method.merge(t, frozen), x), trainable, x)
    assert largest_difference(found, expected) < 1e-9
