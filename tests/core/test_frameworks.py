"""One mechanism for Flax NNX, Linen, Equinox and plain functions, whatever holds the params."""

from __future__ import annotations

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj
from tests.core.adapted import largest_difference, random_like
from tests.core.test_lift import TOLERANCE
from tests.core.test_lift import dtype as dtype  # the fixture

X = (5, 6)


class NnxBlock(nnx.Module):
    def __init__(self, dtype, rngs):
        self.inner = nnx.Linear(6, 8, param_dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(8, param_dtype=dtype, rngs=rngs)
        self.heads = nnx.LinearGeneral(8, (2, 3), param_dtype=dtype, rngs=rngs)
        self.outs = nnx.List([nnx.Linear(6, 6, param_dtype=dtype, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        h = self.norm(jnp.tanh(self.inner(x)), use_running_average=True)
        h = self.heads(h).reshape(-1, 6)
        for layer in self.outs:
            h = nnx.remat(lambda layer, h: jnp.tanh(layer(h)))(layer, h)
        return h


class NnxScanned(nnx.Module):
    def __init__(self, dtype, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.Linear(6, 6, param_dtype=dtype, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(h, layer):
            return jnp.tanh(layer(h))

        return run(x, self.layers)


def nnx_pure_dict(dtype):
    graph, state = nnx.split(NnxBlock(dtype, nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)

    def apply(params, x):
        new = nnx.State(params) if not isinstance(params, nnx.State) else params
        return nnx.merge(graph, new)(x)

    return params, apply


def nnx_state(dtype):
    graph, state = nnx.split(NnxBlock(dtype, nnx.Rngs(0)))
    return state, lambda state, x: nnx.merge(graph, state)(x)


def nnx_module(dtype):
    return NnxBlock(dtype, nnx.Rngs(0)), lambda model, x: model(x)


def nnx_scanned(dtype):
    graph, state = nnx.split(NnxScanned(dtype, nnx.Rngs(0)))
    return state, lambda state, x: nnx.merge(graph, state)(x)


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        h = linen.Dense(8, name="inner")(x)
        h = linen.remat(linen.DenseGeneral)((2, 3), name="heads")(h)
        return linen.Dense(6, name="out")(jnp.tanh(h.reshape(-1, 6)))


def linen_dict(dtype):
    model = LinenBlock()
    params = model.init(jax.random.key(0), jnp.ones(X, dtype))
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return params, model.apply


class LinenScanned(linen.Module):
    @linen.compact
    def __call__(self, x):
        body = linen.scan(
            linen.remat(_LinenLayer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return body(name="layers")(x, None)[0]


class _LinenLayer(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        return jnp.tanh(linen.Dense(6)(x)), None


def linen_scanned(dtype):
    model = LinenScanned()
    params = model.init(jax.random.key(0), jnp.ones(X, dtype))
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params), model.apply


def equinox_module(dtype):
    model = eqx.nn.MLP(6, 6, 8, 2, dtype=jnp.dtype(dtype), key=jax.random.key(0))
    return model, lambda model, x: jax.vmap(model)(x)


def equinox_attention(dtype):
    model = eqx.nn.MultiheadAttention(2, 6, dtype=jnp.dtype(dtype), key=jax.random.key(0))
    return model, lambda model, x: model(x, x, x)


def plain_nested(dtype):
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"layers": [{"w": jax.random.normal(k, (6, 6), dtype)} for k in keys]}

    def apply(params, x):
        for layer in params["layers"]:
            x = jnp.tanh(x @ layer["w"])
        return x

    return params, apply


MODELS = {
    f.__name__: f
    for f in (
        nnx_pure_dict, nnx_state, nnx_module, nnx_scanned, linen_dict, linen_scanned,
        equinox_module, equinox_attention, plain_nested,
    )
}  # fmt: skip


def adapted(name, dtype):
    params, apply = MODELS[name](dtype)
    x = jax.random.normal(jax.random.key(2), X, dtype)
    method = lj.LoRA(
        targets=r".*(kernel|weight|w)", rank=2, alpha=3.0, axes=lj.kernel_axes(apply, params, x)
    )
    trainable, frozen = method.init(jax.random.key(0), params)
    return params, apply, method, random_like(trainable, 3), frozen, x


@pytest.mark.parametrize("name", MODELS)
def test_lifted_model_equals_merge_then_apply(name, dtype):
    params, apply, method, trainable, frozen, x = adapted(name, dtype)

    def loss(run):
        def f(trainable, x):
            y = run(trainable, x)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))

    with lj.watch_materialised() as events:
        found = loss(lambda t, x: lj.lift(apply)(method.bind(t, frozen), x))(trainable, x)
    expected = loss(lambda t, x: apply(method.merge(t, frozen), x))(trainable, x)
    assert largest_difference(found, expected) < TOLERANCE[dtype]
    assert not events
    assert len(trainable) >= 1


@pytest.mark.parametrize("name", MODELS)
def test_merge_keeps_structure_shapes_dtypes_and_its_input(name):
    params, _, method, trainable, frozen, _ = adapted(name, "float32")
    before = [
        np.array(leaf)
        for leaf in jax.tree.leaves(eqx.filter(params, eqx.is_array))
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]
    merged = method.merge(trainable, params)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for left, right in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True):
        if eqx.is_array(right):
            assert left.shape == right.shape
            assert left.dtype == right.dtype
    after = [
        np.array(leaf)
        for leaf in jax.tree.leaves(eqx.filter(params, eqx.is_array))
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_linen_mutable_collections_and_rngs_pass_through():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            h = linen.BatchNorm(use_running_average=False)(linen.Dense(8)(x))
            return linen.Dense(4)(linen.Dropout(0.5, deterministic=False)(h))

    model, x = Model(), jax.random.normal(jax.random.key(1), X)
    variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)
    method = lj.LoRA(targets=r"params/.*/kernel", rank=2, alpha=2.0)
    trainable, frozen = method.init(jax.random.key(2), variables)
    trainable = random_like(trainable, 3)

    def run(variables):
        return lj.lift(model.apply)(
            variables, x, mutable=["batch_stats"], rngs={"dropout": jax.random.key(5)}
        )

    y, state = run(method.bind(trainable, frozen))
    expected, expected_state = run(method.merge(trainable, frozen))
    assert largest_difference((y, state), (expected, expected_state)) < 1e-5
    assert not np.array_equal(state["batch_stats"]["BatchNorm_0"]["mean"], np.zeros(8))


class NormAndDropout(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.dense(x)))


def test_nnx_dropout_and_running_statistics_inside_the_trace():
    graph, params, rest = nnx.split(NormAndDropout(nnx.Rngs(0)), nnx.Param, ...)
    x = jax.random.normal(jax.random.key(1), X)

    def apply(params, rest, x):
        model = nnx.merge(graph, params, rest)
        y = model(x)
        return y, nnx.state(model, nnx.BatchStat)

    method = lj.LoRA(targets="dense/kernel", rank=2, alpha=2.0)
    trainable, frozen = method.init(jax.random.key(2), params)
    trainable = random_like(trainable, 3)
    found = lj.lift(apply)(method.bind(trainable, frozen), rest, x)
    expected = apply(method.merge(trainable, frozen), rest, x)
    assert largest_difference(found, expected) < 1e-5


def test_merged_model_compiles_to_the_bases_instructions():
    params, apply, method, trainable, frozen, x = adapted("plain_nested", "float32")
    merged = method.merge(trainable, frozen)

    def instructions(params):
        text = jax.jit(apply).lower(params, x).compile().as_text()
        return [line.split(", metadata")[0] for line in text.splitlines()]

    assert instructions(merged) == instructions(params)


class NnxScannedRemat(NnxScanned):
    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(h, layer):
            return jnp.tanh(layer(h))

        return run(x, self.layers)


def test_nnx_scan_over_nnx_remat_forms_nothing_and_has_the_gradients_of_merge():
    graph, state = nnx.split(NnxScannedRemat(jnp.float32, nnx.Rngs(0)))
    x = random_like(jnp.ones(X), 2)

    def apply(state, x):
        return nnx.merge(graph, state)(x)

    axes = lj.kernel_axes(apply, state, x)
    assert axes["layers/kernel"].stack == (-3,)
    method = lj.LoRA(targets="layers/kernel", rank=2, alpha=3.0, axes=axes)
    trainable, frozen = method.init(jax.random.key(0), state)
    trainable = random_like(trainable, 3)

    def gradient(run):
        return jax.jit(jax.grad(lambda t: jnp.sum(jnp.sin(run(t)))))(trainable)

    found = gradient(lambda t: lj.lift(apply, strict=True)(method.bind(t, frozen), x))
    expected = gradient(lambda t: apply(method.merge(t, frozen), x))
    assert largest_difference(found, expected) < 1e-5


@pytest.mark.parametrize("copy", [False, True])
def test_nnx_state_closed_over_is_one_line_that_names_the_way(copy):
    graph, params, rest = nnx.split(NormAndDropout(nnx.Rngs(0)), nnx.Param, ...)

    def apply(params, x):
        return nnx.merge(graph, params, rest, copy=copy)(x)

    if copy:
        assert "dense/kernel" in lj.kernel_axes(apply, params, jnp.ones(X))
        return
    with pytest.raises(lj.RequestError, match=r"apply\(params, rest, x\)"):
        lj.kernel_axes(apply, params, jnp.ones(X))
