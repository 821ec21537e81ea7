"""DoRA: the equation and its gradient in float64, and what a step costs."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.methods.dora import norm_of
from tests.methods.variants import (
    AXES,
    TARGETS,
    X,
    apply,
    matrices,
    params_of,
    parts64,
    step_of,
    trained,
)


def method_of(**settings):
    return lj.DoRA(**{"targets": TARGETS, "rank": 2, "alpha": 3.0, "axes": AXES, **settings})


def test_the_merged_kernel_is_magnitude_times_direction_in_float64():
    method = method_of()
    params, trainable, frozen = trained(method)
    merged = method.merge(trainable, frozen)
    for name, entry in trainable.items():
        p = parts64(entry, name)
        moved = matrices(params[name], name) + 1.5 * p["a"] @ p["b"]
        norm = np.sqrt((moved**2).sum(axis=1, keepdims=True))
        expected = p["magnitude"][:, None, :] * moved / norm
        np.testing.assert_allclose(matrices(merged[name], name), expected, atol=3e-6)


@pytest.mark.parametrize("name", ["plain", "stacked", "heads"])
def test_the_norm_without_forming_delta_equals_the_norm_of_the_sum(name):
    bound = lj.LoRA(targets=name, rank=3, alpha=2.0, axes=AXES)
    _, trainable, frozen = trained(bound)
    weight = bound.bind(trainable, frozen)[name]
    whole = matrices(weight.materialise(), name)
    found = np.asarray(norm_of(weight)).reshape(whole.shape[0], -1)
    np.testing.assert_allclose(found, np.sqrt((whole**2).sum(axis=1)), rtol=1e-5)


def test_gradients_hold_the_norm_constant():
    """By hand in float64 for y = x W', loss = sum(y c): dm = Σ c x(W+ΔW)/n, db = s aᵀ xᵀ(c m/n)."""
    rng = np.random.default_rng(0)
    w = np.asarray(rng.normal(size=(6, 4)), np.float32).astype(np.float64)
    x, c = (rng.normal(size=(5, n)).astype(np.float32) for n in (6, 4))
    method = lj.DoRA(targets="w", rank=2, alpha=3.0)
    trainable, frozen = method.init(jax.random.key(3), {"w": jnp.asarray(w, jnp.float32)})
    entry = {"b": jnp.full((2, 4), 0.3), "a": trainable["w"]["a"], "magnitude": jnp.arange(1.0, 5)}

    def loss(entry):
        return jnp.sum((lj.lift(lambda p, x: x @ p["w"])(method.bind({"w": entry}, frozen), x)) * c)

    grads = jax.jit(jax.grad(loss))(entry)
    a, b, m = (np.asarray(entry[part], np.float64) for part in ("a", "b", "magnitude"))
    moved = w + 1.5 * a @ b
    n = np.sqrt((moved**2).sum(0))
    np.testing.assert_allclose(grads["magnitude"], (c * (x @ moved) / n).sum(0), rtol=1e-4)
    flow = x.T @ (c * m / n)
    np.testing.assert_allclose(grads["b"], 1.5 * a.T @ flow, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads["a"], 1.5 * flow @ b.T, rtol=1e-4, atol=1e-5)


def test_a_step_costs_at_most_a_quarter_more_than_loras_and_keeps_no_kernel_sized_buffer():
    """Seen at width 256, 512 tokens, rank 8: FLOPs 1.02 of LoRA's."""
    lora, dora = step_of(lj.LoRA), step_of(lj.DoRA)
    flops = [step.cost_analysis()["flops"] for step in (lora, dora)]
    assert flops[0] < flops[1] <= 1.25 * flops[0]
    # Tokens and width differ, so an array of the kernel's shape can be nothing else. Inside a
    # fusion it is never stored; as the result of an instruction of the entry it would be.
    for step in (lora, dora):
        entry = step.as_text().split("ENTRY")[1]
        made = re.findall(r"= f32\[256,256\]\S* (\w[\w-]*)\(", entry)
        assert set(made) <= {"parameter"}, made


def test_a_slice_of_the_outputs_has_its_own_norm_and_leaves_the_rest_alone():
    method = method_of(targets="plain", slice=(-1, 2, 6))
    params, trainable, frozen = trained(method)
    (entry,) = trainable.values()
    merged = np.asarray(method.merge(trainable, frozen)["plain"], np.float64)
    w = np.asarray(params["plain"], np.float64)
    assert np.array_equal(merged[:, [0, 1, 6, 7]], w[:, [0, 1, 6, 7]])
    a, b, m = (np.asarray(entry[part], np.float64) for part in ("a", "b", "magnitude"))
    moved = w[:, 2:6] + 1.5 * a @ b
    expected = m * moved / np.sqrt((moved**2).sum(0))
    np.testing.assert_allclose(merged[:, 2:6], expected, atol=3e-6)


def test_what_has_no_norm_is_refused():
    with pytest.raises(lj.RequestError, match="part of the inputs"):
        method_of(targets="plain", slice=(-2, 0, 3)).init(jax.random.key(0), params_of())
    with pytest.raises(lj.RequestError, match="computed from what trains"):
        method = method_of()
        _, trainable, frozen = trained(method)
        method.mask(method.bind(trainable, frozen))


def test_a_bfloat16_base_is_normed_in_float32():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of())
    method = method_of()
    trainable, frozen = method.init(jax.random.key(1), params)
    assert trainable["plain"]["magnitude"].dtype == jnp.float32
    x = X.astype(jnp.bfloat16)
    fresh = jax.jit(lj.lift(apply))(method.bind(trainable, frozen), x)
    assert np.array_equal(fresh, jax.jit(apply)(params, x))
