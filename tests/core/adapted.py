"""What the tests of `lift` share: a construct with adapters on all its kernels, and differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from tests.core.constructs import ALL


def random_like(tree, seed, scale=0.5):
    """The same tree with random entries: `b` starts at zero, where nothing would be tested."""
    rng = np.random.default_rng(seed)  # NumPy's: nothing to compile
    return jax.tree.map(lambda x: normal(rng, x.shape, x.dtype, scale), tree)


def normal(rng, shape, dtype=jnp.float32, scale=1.0):
    return jnp.asarray(scale * rng.normal(size=shape), dtype)


def inputs_of(name, dtype):
    """`(params, x)` of a construct, random."""
    shapes = ALL[name].shapes
    params = random_like({path: jnp.zeros(shape, dtype) for path, shape in shapes.items()}, seed=1)
    return params, normal(np.random.default_rng(2), (5, 6), dtype)


def method_of(name, params, x, kind=lj.LoRA, **settings):
    """A method on every kernel of a construct, or on the slices that it names."""
    construct = ALL[name]
    axes = lj.kernel_axes(construct.apply, params, x)
    # What no product shows (a lookup in another form, a norm) is (in, out), stated here.
    axes = {path: axes.get(path) or lj.KernelAxes((), (-2,), (-1,)) for path in params}
    settings = {"rank": 2, "alpha": 3.0, **settings}
    rules = [lj.Rule(".*", slice=part, **settings) for part in construct.slices or (None,)]
    return kind(rules=rules, axes=axes)


def setting(name, dtype, kind=lj.LoRA, **settings):
    """`(apply, method, trainable, frozen, x)`: a construct adapted, its factors random."""
    params, x = inputs_of(name, dtype)
    method = method_of(name, params, x, kind, **settings)
    trainable, frozen = method.init(jax.random.key(0), params)
    return ALL[name].apply, method, random_like(trainable, seed=3), frozen, x


def value_and_gradients(f, trainable, x, *, forward_only=False):
    """Outputs of `f(trainable, x)` and gradients in both arguments, or tangents, under jit."""

    def loss(trainable, x):
        y = f(trainable, x)
        return jnp.sum(jnp.sin(y)), y

    if forward_only:
        tangents = (random_like(trainable, 4), random_like(x, 5))
        return jax.jit(lambda t, x: jax.jvp(f, (t, x), tangents))(trainable, x)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(trainable, x)


def largest_difference(left, right) -> float:
    """The largest entry of `left - right` over the largest entry of `right`."""
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(right))
    return max(
        float(jnp.max(jnp.abs(a - b))) / scale
        for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )
