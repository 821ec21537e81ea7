"""`kernel_axes` finds the roles that the model's products give each axis."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lora_jax as lj

X = jax.ShapeDtypeStruct((5, 8), jnp.float32)


def axes_of(apply, x=X, **shapes):
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    return lj.kernel_axes(apply, params, x)


def roles(axes, path="w"):
    return axes[path].stack, axes[path].in_, axes[path].out


CASES = {
    "dense": (lambda p, x: x @ p["w"], (8, 4), ((), (-2,), (-1,))),
    "transposed": (lambda p, x: x @ p["w"].T, (4, 8), ((), (-1,), (-2,))),
    "heads": (lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["w"]), (8, 2, 3), ((), (-3,), (-2, -1))),
    "merged by reshape": (lambda p, x: x @ p["w"].reshape(8, 6), (8, 2, 3), ((), (-3,), (-2, -1))),
    "two inputs": (
        lambda p, x: jnp.einsum("bhd,hdo->bo", x.reshape(5, 2, 4), p["w"]),
        (2, 4, 3),
        ((), (-3, -2), (-1,)),
    ),
    "scanned": (
        lambda p, x: jax.lax.scan(lambda h, w: (h @ w, None), x, p["w"])[0],
        (3, 8, 8),
        ((-3,), (-2,), (-1,)),
    ),
    "by index": (
        lambda p, x: jax.lax.fori_loop(0, 3, lambda n, h: h @ p["w"][n], x),
        (3, 8, 8),
        ((-3,), (-2,), (-1,)),
    ),
    "python loop": (lambda p, x: x @ p["w"][0] @ p["w"][1], (2, 8, 8), ((-3,), (-2,), (-1,))),
    "experts": (
        lambda p, x: jnp.einsum("bi,eio->beo", x, p["w"]), (3, 8, 4), ((), (-2,), (-3, -1)),
    ),
    "expert batch": (
        lambda p, x: jnp.einsum("ebi,eio->ebo", jnp.stack([x] * 3), p["w"]),
        (3, 8, 4),
        ((-3,), (-2,), (-1,)),
    ),
    "cast, jit and remat": (
        lambda p, x: jax.jit(jax.checkpoint(lambda w: x @ w.astype(jnp.float32)))(p["w"]),
        (8, 4),
        ((), (-2,), (-1,)),
    ),
    "normalised": (
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0)), (8, 4), ((), (-2,), (-1,)),
    ),
    "lookup": (lambda p, x: p["w"][jnp.argmax(x, 1)], (9, 4), ((), (-2,), (-1,))),
    "convolution": (
        lambda p, x: jax.lax.conv_general_dilated(
            x[None], p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        (3, 8, 4),
        ((), (-3, -2), (-1,)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_roles_follow_the_products(name):
    apply, shape, expected = CASES[name]
    assert roles(axes_of(apply, w=shape)) == expected


def test_a_tied_embedding_reports_both_uses():
    axes = axes_of(lambda p, x: p["w"][jnp.argmax(x, 1)] @ p["w"].T, w=(9, 4))["w"]
    assert axes.ops == ("gather", "dot_general")
    assert axes.conflicts
    assert axes.roles(2, "w") == "io"


def test_a_parameter_without_a_product_has_no_axes():
    assert "w" not in axes_of(lambda p, x: x + p["w"].sum(), w=(8, 4))


def test_equinox_kernels_are_out_by_in():
    model = eqx.nn.Linear(8, 4, key=jax.random.key(0))
    axes = lj.kernel_axes(lambda m, x: jax.vmap(m)(x), model, X)
    assert roles(axes, "weight") == ((), (-1,), (-2,))


def test_nnx_attention_kernels():
    model = nnx.MultiHeadAttention(2, 8, rngs=nnx.Rngs(0), decode=False)
    x = jax.ShapeDtypeStruct((1, 5, 8), jnp.float32)
    axes = lj.kernel_axes(lambda m, x: m(x), model, x)
    assert roles(axes, "query/kernel") == ((), (-3,), (-2, -1))
    assert roles(axes, "out/kernel") == ((), (-3, -2), (-1,))


def test_kernels_of_three_axes_need_axes_and_accept_an_override():
    params = {"w": jnp.ones((8, 2, 3))}
    with pytest.raises(lj.RequestError, match=r"'w' has 3 axes.*kernel_axes"):
        lj.LoRA(targets="w").init(jax.random.key(0), params)
    own = {"w": lj.KernelAxes(stack=(), in_=(-3,), out=(-2, -1))}
    trainable, _ = lj.LoRA(targets="w", rank=2, axes=own).init(jax.random.key(0), params)
    assert trainable["w"]["a"].shape == (8, 2)
    assert trainable["w"]["b"].shape == (2, 2, 3)


@pytest.mark.parametrize(
    "wrong", [((), (-2,), (-1,)), ((-3,), (-3,), (-1,)), ((-3, -2, -1), (), ()), ((), (0,), (1, 2))]
)
def test_axes_that_do_not_cover_the_kernel_are_refused(wrong):
    own = {"w": lj.KernelAxes(*wrong)}
    with pytest.raises(lj.RequestError, match="axes of 'w'"):
        lj.LoRA(targets="w", rank=2, axes=own).init(jax.random.key(0), {"w": jnp.ones((8, 2, 3))})
