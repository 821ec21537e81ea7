"""Explicit sharding: `lift` and `kernel_axes` where an array's type names axes of a mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from tests.core.adapted import random_like
from tests.core.constructs import ALL

WHOLE = P(None, None)
MESH = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])


def looked_up(p, x):
    return p["w"].at[jnp.argmax(x, axis=1)].get(out_sharding=WHOLE)


def auto_inside(p, x):
    return jax.sharding.auto_axes(lambda w, x: jnp.tanh(x @ w), out_sharding=WHOLE)(p["w"], x)


def explicit_inside_auto(p, x):
    @jax.sharding.auto_axes(out_sharding=P(None, "tp"))
    def outer(w, x):
        return jax.sharding.explicit_axes(
            lambda w, x: jnp.tanh(x @ w), in_sharding=(P(None, "tp"), WHOLE)
        )(w, x)

    return outer(p["w"], x)


def resharded(p, x):
    return x @ jax.sharding.reshard(p["w"], P(None, "tp"))


def put_elsewhere(p, x):
    return x @ jax.device_put(p["w"], P(None, "tp"))


def gathered_by_device_put(p, x):
    return x @ jax.device_put(p["w"], WHOLE)


def product_into(p, x):
    x = jax.sharding.reshard(x, P(None, "tp"))
    return jnp.einsum("bi,io->bo", x, p["w"], out_sharding=P(None, "tp"))


def sharded_map(p, x):
    f = jax.shard_map(
        lambda w, x: jax.lax.psum(x @ w, "tp"),
        in_specs=(P("tp", None), P(None, "tp")),
        out_specs=P(),
    )
    return f(p["w"], jax.sharding.reshard(x, P(None, "tp")))


def materialised(p, x):
    return jax.sharding.auto_axes(
        lambda w, x: x @ (w / jnp.linalg.norm(w, axis=0, keepdims=True)), out_sharding=WHOLE
    )(p["w"], x)


MODELS = {
    f.__name__: f
    for f in (
        looked_up, auto_inside, explicit_inside_auto, resharded, put_elsewhere,
        gathered_by_device_put, product_into, sharded_map, materialised,
    )
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::lora_jax.MaterialisedWarning")
@pytest.mark.parametrize("kind", [lj.LoRA, lj.DoRA])
@pytest.mark.parametrize("name", MODELS)
def test_value_type_and_gradients_equal_those_through_merge(name, kind):
    apply = MODELS[name]
    outside = random_like({"w": jnp.zeros((6, 4))}, 1)
    method = kind(targets="w", rank=2, alpha=3.0)
    trainable = random_like(method.init(jax.random.key(0), outside)[0], 3)  # outside of the mesh
    with jax.set_mesh(MESH):
        params = {"w": jax.device_put(outside["w"], P("tp", None))}
        x = random_like(jnp.zeros((5, 6)), 2)
        axes = lj.kernel_axes(apply, params, x)["w"]
        assert (axes.in_, axes.out) == ((-2,), (-1,))
        _, frozen = method.init(jax.random.key(0), params)

        def lifted(t):
            return lj.lift(apply)(method.bind(t, frozen), x)

        def merged(t):
            return apply(method.merge(t, frozen), x)

        with lj.watch_materialised() as events:
            y = lifted(trainable)
        assert bool(events) == (name == "materialised"), [str(event) for event in events]
        assert jax.typeof(y) == jax.typeof(merged(trainable))
        got, expected = (
            jax.device_get(jax.jit(jax.value_and_grad(lambda t: jnp.sum(jnp.sin(f(t)))))(trainable))  # noqa: B023
            for f in (lifted, merged)
        )
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=2e-5, atol=2e-5)


def test_a_fresh_adapter_keeps_the_bits_of_the_base():
    params = random_like({"w": jnp.zeros((6, 4))}, 1)
    with jax.set_mesh(MESH):
        params = {"w": jax.device_put(params["w"], P("tp", None))}
        x = random_like(jnp.zeros((5, 6)), 2)
        method = lj.LoRA(targets="w", rank=2, alpha=3.0)
        bound = method.bind(*method.init(jax.random.key(0), params))
        assert np.array_equal(product_into(params, x), lj.lift(product_into)(bound, x))


def test_factors_made_outside_of_the_mesh_serve_layers_taken_by_index():
    outside, apply = random_like({"w": jnp.zeros((3, 6, 6))}, 1), ALL["layers_by_index"].apply
    method = lj.LoRA(targets="w", rank=2, alpha=3.0, axes={"w": lj.KernelAxes.from_roles("sio")})
    trainable, _ = method.init(jax.random.key(0), outside)
    with jax.set_mesh(MESH):
        params = {"w": jax.device_put(outside["w"], P(None, "tp", None))}
        x = random_like(jnp.zeros((5, 6)), 2)

        def loss(t):
            return jnp.sum(lj.lift(apply, strict=True)(method.bind(t, params), x) ** 2)

        found = jax.jit(jax.grad(loss))(trainable)["w"]["b"]
        expected = jax.jit(
            jax.grad(lambda t: jnp.sum(apply(method.merge(t, params), x) ** 2))
        )(trainable)["w"]["b"]  # fmt: skip
    np.testing.assert_allclose(found, jax.device_get(expected), rtol=2e-5, atol=2e-5)
