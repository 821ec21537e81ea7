"""`kernel_axes` finds the roles that the model's products give each axis."""

from __future__ import annotations

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import lora_jax as lj

X = jax.ShapeDtypeStruct((5, 8), jnp.float32)


def axes_of(apply, x=X, **shapes):
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    return lj.kernel_axes(apply, params, x)


def roles(axes, path="w"):
    return axes[path].stack, axes[path].in_, axes[path].out


def _conv(x, w, groups=1):
    numbers = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


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
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True)),
        (8, 4), ((), (-2,), (-1,)),
    ),
    "lookup": (lambda p, x: p["w"][jnp.argmax(x, 1)], (9, 4), ((), (-2,), (-1,))),
    "convolution": (
        lambda p, x: jax.lax.conv_general_dilated(
            x[None], p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        (3, 8, 4),
        ((), (-3, -2), (-1,)),
    ),
    "lookup of one row": (lambda p, x: x @ p["w"][jnp.argmax(x[0])], (9, 8), ((), (-2,), (-1,))),
    "vmapped lookup of one row": (
        lambda p, x: jax.vmap(lambda n: p["w"][n])(jnp.argmax(x, 1)), (9, 4), ((), (-2,), (-1,)),
    ),
    "lookup vmapped over tables": (
        lambda p, x: jax.vmap(lambda t, n: t[n])(p["w"], jnp.argmax(x[:3], 1)),
        (3, 9, 4),
        ((-3,), (-2,), (-1,)),
    ),
    "convolution vmapped over kernels": (
        lambda p, x: jax.vmap(_conv)(jnp.stack([x[None]] * 2), p["w"]),
        (2, 3, 8, 4),
        ((-4,), (-3, -2), (-1,)),
    ),
    "grouped convolution vmapped over kernels": (
        lambda p, x: jax.vmap(functools.partial(_conv, groups=2))(
            jnp.stack([x[None]] * 2), p["w"]
        ),
        (2, 3, 4, 6),
        ((-4,), (-3, -2), (-1,)),
    ),
    "convolution of one input by many kernels": (
        lambda p, x: jax.vmap(_conv, (None, 0))(x[None], p["w"]),
        (2, 3, 8, 4),
        ((), (-3, -2), (-4, -1)),
    ),
    "depthwise convolution of Keras": (
        lambda p, x: _conv(x[None], p["w"].reshape(3, 1, 16), groups=8),
        (3, 8, 2),
        ((-2,), (-3,), (-1,)),
    ),
    "watched by a callback": (
        lambda p, x: (jax.debug.callback(lambda w: None, p["w"]), x @ p["w"])[1],
        (8, 4),
        ((), (-2,), (-1,)),
    ),
    "device_put": (lambda p, x: x @ jax.device_put(p["w"]), (8, 4), ((), (-2,), (-1,))),
    "padded": (
        lambda p, x: x @ jnp.pad(p["w"], ((2, 0), (0, 3))), (6, 4), ((), (-2,), (-1,)),
    ),
    "moved by an array": (
        lambda p, x: x @ (p["w"] - jnp.arange(32.0).reshape(8, 4)), (8, 4), ((), (-2,), (-1,)),
    ),
    "masked": (
        lambda p, x: x @ jnp.where(jnp.tri(8, 4) > 0, p["w"], 0), (8, 4), ((), (-2,), (-1,)),
    ),
    "chunks of the inputs": (
        lambda p, x: jax.lax.scan(
            lambda h, chunk: (h + chunk[0] @ chunk[1], None),
            jnp.zeros((5, 4)),
            (x.reshape(5, 2, 4).transpose(1, 0, 2), p["w"].reshape(2, 4, 4)),
        )[0],
        (8, 4),
        ((), (-2,), (-1,)),
    ),
    "chunks of the outputs": (
        lambda p, x: jax.lax.map(lambda w: x @ w, p["w"].reshape(8, 2, 2).transpose(1, 0, 2)),
        (8, 4),
        ((), (-2,), (-1,)),
    ),
}  # fmt: skip
JOINS = {
    "sum": lambda w, v: w + v,
    "difference": lambda w, v: w - v,
    "concatenation": lambda w, v: jnp.concatenate([w, v], axis=1),
    "stack": lambda w, v: jnp.stack([w, v], axis=1).reshape(8, 8),
    "complex number": jax.lax.complex,
}


@pytest.mark.parametrize("name", JOINS)
def test_each_of_two_kernels_made_into_one_has_its_axes(name):
    axes = axes_of(lambda p, x: x @ JOINS[name](p["w"], p["v"]), w=(8, 4), v=(8, 4))
    assert roles(axes, "w") == roles(axes, "v") == ((), (-2,), (-1,))


def test_the_gates_of_a_fused_lstm_cell_have_axes():
    cell = nn.OptimizedLSTMCell(4)
    carry = cell.initialize_carry(jax.random.key(0), X.shape)
    variables = jax.eval_shape(cell.init, jax.random.key(0), carry, X)
    axes = lj.kernel_axes(cell.apply, variables, carry, X)
    assert axes.keys() == {f"params/{side}{gate}/kernel" for side in "ih" for gate in "ifgo"}
    assert {roles(axes, path) for path in axes} == {((), (-2,), (-1,))}


@pytest.mark.parametrize("shape", [(5, 1, 1), (1, 1, 1, 8)])
def test_biases_and_scales_spread_over_the_activations_have_no_axes(shape):
    def apply(p, x):
        with jax.numpy_rank_promotion("allow"):  # as they do it
            return ((x * 1.0)[:, None] * p["v"] + p["v"]) @ p["w"]

    axes = axes_of(apply, v=shape, w=(8, 4))
    assert axes.keys() == {"w"}


def test_a_class_token_before_its_patches_has_no_axes():
    axes = axes_of(lambda p, x: jnp.concatenate([p["v"], x]) @ p["w"], v=(1, 8), w=(8, 4))
    assert axes.keys() == {"w"}


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
