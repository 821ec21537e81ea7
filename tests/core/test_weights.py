"""A transformed adapted value stands for the transformed array; merging is float64 to rounding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax as lj
from lora_jax.core.values import materialise
from lora_jax.core.weights import LoRAWeight


def weight_of(shape, roles, rank=2, seed=0):
    rng = np.random.default_rng(seed)
    sizes = {r: [n for n, role in zip(shape, roles, strict=True) if role == r] for r in "sio"}

    def normal(*size):
        return jnp.asarray(rng.normal(size=size), jnp.float32)

    return LoRAWeight(
        kernel=normal(*shape),
        a=normal(*sizes["s"], *sizes["i"], rank),
        b=normal(*sizes["s"], rank, *sizes["o"]),
        scale=normal(*sizes["s"]),
        key=None,
        roles=roles,
        path="w",
    )


def delta_float64(weight):
    """ΔW by NumPy's einsum in float64, from the roles alone."""
    letters = "abcdefgh"[: len(weight.roles)]
    group = {
        r: "".join(l for l, role in zip(letters, weight.roles, strict=True) if role == r)
        for r in "sio"
    }
    s, i, o = group["s"], group["i"], group["o"]
    a, b, scale = (np.asarray(x, np.float64) for x in (weight.a, weight.b, weight.scale))
    return np.einsum(f"{s},{s}{i}z,{s}z{o}->{letters}", scale, a, b)


kernels = st.lists(st.sampled_from("sio"), min_size=2, max_size=5).filter(
    lambda roles: "i" in roles and "o" in roles
)


@settings(max_examples=10, deadline=None)
@given(kernels, st.integers(0, 99))
def test_delta_equals_float64_numpy_for_any_roles(roles, seed):
    shape = [2 + n % 3 for n in range(len(roles))]
    weight = weight_of(shape, "".join(roles), seed=seed)
    np.testing.assert_allclose(weight.delta(), delta_float64(weight), rtol=1e-5, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(kernels, st.randoms(use_true_random=False))
def test_transpose_commutes_with_materialising(roles, random):
    weight = weight_of([2 + n % 3 for n in range(len(roles))], "".join(roles))
    order = list(range(len(roles)))
    random.shuffle(order)
    np.testing.assert_allclose(
        materialise(weight.transpose(order)), materialise(weight).transpose(order), atol=1e-5
    )


RESHAPES = [
    ((4, 6), "io", (2, 2, 6), True),
    ((4, 6), "io", (4, 2, 3), True),
    ((4, 6), "io", (1, 4, 1, 6, 1), True),
    ((4, 2, 3), "ioo", (4, 6), True),
    ((2, 3, 6), "iio", (6, 2, 3), True),
    ((3, 4, 6), "sio", (3, 2, 2, 6), True),
    ((4, 1, 6), "isp".replace("p", "o"), (4, 6), True),
    ((4, 6), "io", (24,), False),
    ((4, 6), "io", (8, 3), False),
    ((3, 4, 6), "sio", (12, 6), False),
]


@pytest.mark.parametrize(("shape", "roles", "new", "followed"), RESHAPES)
def test_reshape_follows_within_a_role_and_refuses_across_roles(shape, roles, new, followed):
    weight = weight_of(shape, roles)
    reshaped = weight.reshape(new)
    assert (reshaped is not None) == followed
    if followed:
        np.testing.assert_allclose(
            materialise(reshaped), materialise(weight).reshape(new), atol=1e-5
        )


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_slices_commute_with_materialising(data):
    shape, roles = (3, 4, 6), "sio"
    weight = weight_of(shape, roles)
    starts = [data.draw(st.integers(0, n - 1)) for n in shape]
    sizes = [data.draw(st.integers(1, n - s)) for n, s in zip(shape, starts, strict=True)]
    window = tuple(slice(s, s + n) for s, n in zip(starts, sizes, strict=True))
    expected = materialise(weight)[window]
    np.testing.assert_allclose(
        materialise(weight.slice_axes(starts, sizes, [1, 1, 1])), expected, atol=1e-5
    )
    dynamic = weight.slice_axes([jnp.int32(s) for s in starts], sizes, None)
    np.testing.assert_allclose(materialise(dynamic), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "half_ulp"), [("float32", 2**-24), ("bfloat16", 2**-9), ("float16", 2**-12)]
)
def test_merged_parameters_equal_float64_numpy_to_rounding(dtype, half_ulp, record_property):
    """W + s·a·b rounded once: at most half a unit in the last place, plus float32's error."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(64, 48)), dtype)
    method = lj.LoRA(targets="w", rank=4, alpha=6.0)
    trainable, frozen = method.init(jax.random.key(0), {"w": kernel})
    trainable["w"]["b"] = jnp.asarray(rng.normal(size=(4, 48)), jnp.float32)
    merged = method.merge(trainable, frozen)["w"]
    assert merged.dtype == kernel.dtype
    a, b = (np.asarray(trainable["w"][name], np.float64) for name in "ab")
    exact = np.asarray(kernel, np.float64) + 1.5 * a @ b
    error = np.abs(np.asarray(merged, np.float64) - exact)
    record_property("largest_error", float(error.max()))
    allowed = half_ulp * 2.0 ** np.ceil(np.log2(np.maximum(np.abs(exact), 2**-14))) + 2e-6
    assert np.all(error <= allowed)


def test_a_padded_adapter_with_its_true_scale_is_its_unpadded_twin():
    weight = weight_of((6, 4), "io", rank=2)
    padded = LoRAWeight(
        kernel=weight.kernel,
        a=jnp.pad(weight.a, ((0, 0), (0, 3))),
        b=jnp.pad(weight.b, ((0, 3), (0, 0))),
        scale=weight.scale,
        key=None,
        roles="io",
        path="w",
    )
    np.testing.assert_allclose(materialise(padded), materialise(weight), rtol=1e-6)


def test_lora_apply_equals_float64_numpy_under_jit_grad_and_vmap():
    rng = np.random.default_rng(0)
    x, w, a, b = (
        rng.normal(size=s).astype(np.float32) for s in ((3, 5, 6), (6, 4), (6, 2), (2, 4))
    )
    y = jax.jit(jax.vmap(lambda x: lj.lora_apply(x, w, a, b, alpha=8.0)))(x)
    x64, w64, a64, b64 = (v.astype(np.float64) for v in (x, w, a, b))
    np.testing.assert_allclose(y, x64 @ (w64 + 4.0 * a64 @ b64), rtol=1e-5, atol=1e-5)
    grad = jax.grad(lambda b: lj.lora_apply(x, w, a, b, alpha=8.0).sum())(jnp.asarray(b))
    expected = 4.0 * (x64 @ a64).sum(axis=(0, 1))[:, None] * np.ones((1, 4))
    np.testing.assert_allclose(grad, expected, rtol=1e-4)


@pytest.mark.parametrize(("a", "b"), [((6, 2), (3, 4)), ((5, 2), (2, 4)), ((6, 2), (2, 5))])
def test_lora_apply_refuses_shapes_that_disagree(a, b):
    with pytest.raises(ValueError, match=r"\("):
        lj.lora_apply(jnp.ones((3, 6)), jnp.ones((6, 4)), jnp.ones(a), jnp.ones(b), alpha=1.0)
