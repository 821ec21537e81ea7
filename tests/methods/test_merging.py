"""Merging: one rounding to the dtype asked for, its loss said, and no infinity written."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.methods.arithmetic import difference
from lora_jax.methods.merging import rounding_of


def small(method, dtype=jnp.bfloat16):
    """A base and a small random adapter of it."""
    base = {
        "w": jax.random.normal(jax.random.key(0), (32, 32), dtype),
        "norm": jnp.ones(4, dtype),
    }
    trainable, frozen = method.init(jax.random.key(1), base)
    trainable["w"]["b"] = 1e-3 * jax.random.normal(jax.random.key(2), (4, 32))
    return base, trainable, frozen


def in_float64(base, trainable, scale):
    a, b = (np.asarray(trainable["w"][name], np.float64) for name in "ab")
    return np.asarray(base["w"], np.float64) + scale * a @ b


@pytest.mark.parametrize("dtype", [jnp.float32, "float16", "bfloat16"])
def test_a_merge_is_the_float64_sum_rounded_once_to_the_dtype_asked_for(dtype):
    method = lj.LoRA(targets="w", rank=4, alpha=8)
    base, trainable, frozen = small(method)
    merged = method.merge(trainable, frozen, dtype=dtype)
    assert merged["w"].dtype == jnp.dtype(dtype)
    assert merged["norm"].dtype == jnp.bfloat16  # of the adapted parameters alone
    exact = in_float64(base, trainable, 2.0)
    change = np.linalg.norm(exact - np.asarray(base["w"], np.float64))
    best = np.linalg.norm(np.asarray(jnp.asarray(exact, dtype), np.float64) - exact) / change
    error = np.linalg.norm(np.asarray(merged["w"], np.float64) - exact) / change
    assert error <= 1.02 * best + 1e-5
    assert error < 1e-4 or dtype != jnp.float32


def test_a_subspace_is_merged_into_the_dtype_asked_for_too():
    base = {"w": jax.random.normal(jax.random.key(0), (16, 16), jnp.bfloat16)}
    method = lj.IntrinsicDimension(dim=8)
    trainable, frozen = method.init(jax.random.key(1), base)
    trainable["intrinsic"]["theta"] = 1e-3 * jax.random.normal(jax.random.key(2), (8,))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), base)
    merged = method.merge(trainable, frozen, dtype=jnp.float32)["w"]
    assert merged.dtype == jnp.float32
    np.testing.assert_array_equal(merged, method.merge(trainable, wide)["w"])


def test_a_merge_into_16_bits_says_its_loss():
    method = lj.LoRA(targets="w", rank=4, alpha=8)
    base, trainable, frozen = small(method)
    bound, merged = method.bind(trainable, frozen), method.merge(trainable, frozen)
    found = rounding_of(bound, merged)["w"]
    exact, before = in_float64(base, trainable, 2.0), np.asarray(base["w"], np.float64)
    after = np.asarray(merged["w"], np.float64)
    lost = np.linalg.norm(after - exact) / np.linalg.norm(exact - before)
    np.testing.assert_allclose(found.lost, lost, rtol=1e-3)
    assert found.unchanged == np.mean(after == before) > 0.5
    wide = method.merge(trainable, frozen, dtype=jnp.float32)
    assert rounding_of(bound, wide) == {}


def test_a_merge_that_makes_an_infinity_is_refused_with_the_kernels_name():
    method = lj.LoRA(targets="w", rank=4, alpha=1e9)
    _, trainable, frozen = small(method)
    with pytest.raises(lj.RequestError, match="'w' are NaN or infinite.*float32") as caught:
        method.merge(trainable, frozen, dtype=jnp.float16)
    assert "\n" not in str(caught.value)
    merged = method.merge(trainable, frozen, dtype=jnp.float32)["w"]
    assert bool(jnp.isfinite(merged).all())


@pytest.mark.parametrize("dtype", ["int8", "foo", object()])
def test_a_dtype_that_cannot_hold_the_sum_is_refused(dtype):
    method = lj.LoRA(targets="w", rank=4, alpha=8)
    _, trainable, frozen = small(method)
    with pytest.raises(lj.RequestError, match="floating-point"):
        method.merge(trainable, frozen, dtype=dtype)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize("method", [lj.LoRA, lj.DoRA, lj.PiSSA, lj.VeRA])
def test_a_float8_kernel_takes_factors_in_float32(method, dtype):
    base = {"w": (0.1 * jax.random.normal(jax.random.key(0), (8, 8))).astype(dtype)}
    made = method(targets="w", rank=2)
    trainable, frozen = made.init(jax.random.key(1), base)
    assert {x.dtype for x in trainable["w"].values()} == {jnp.dtype("float32")}
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    x = jax.random.normal(jax.random.key(3), (2, 8))
    apply = lj.lift(lambda params, x: x @ params["w"].astype(x.dtype))
    merged = made.merge(trainable, frozen, dtype=jnp.float32)["w"]
    np.testing.assert_allclose(apply(made.bind(trainable, frozen), x), x @ merged, atol=1e-5)
    assert made.merge(trainable, frozen)["w"].dtype == dtype


def test_a_difference_looks_only_at_what_it_is_of():
    base = {"w": jnp.ones((6, 4)), "mask": jnp.array([0.0, -jnp.inf]), "nan": jnp.array([jnp.nan])}
    tuned = {**base, "w": base["w"] + 1.0}
    found = difference(tuned, base, targets="w", rank=1)
    assert found.left_out == ()
    np.testing.assert_allclose(found.adapter.merge()["w"], tuned["w"], atol=1e-5)
    tuned = {**tuned, "mask": jnp.zeros(2)}
    assert difference(tuned, base, targets="w", rank=1).left_out == ("mask",)
    with pytest.raises(lj.RequestError, match="'w' of the tuned model holds NaN"):
        difference({**tuned, "w": tuned["w"].at[0, 0].set(jnp.nan)}, base, targets="w", rank=1)
