"""What the tests of every variant share: a small model, random parts, and ΔW in float64 NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from tests.core.adapted import normal, random_like

# A plain matrix, a stack of two under scan, a kernel with two axes of outputs, and a tied table.
SHAPES = {"plain": (6, 8), "stacked": (2, 8, 8), "heads": (8, 2, 3), "table": (7, 6)}


def params_of(seed=0):
    rng = np.random.default_rng(seed)
    made = {name: normal(rng, shape, scale=shape[-2] ** -0.5) for name, shape in SHAPES.items()}
    return {**made, "head": jnp.ones((6, 3)) / 6}


def apply(params, x):
    h = x + params["table"][jnp.argmax(x, axis=1)]
    h = jnp.tanh(h @ params["plain"])
    h, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), h, params["stacked"])
    h = jnp.einsum("bi,ihd->bhd", h, params["heads"]).reshape(-1, 6)
    return jnp.tanh(h) @ params["head"] + (h @ params["table"].T)[:, :3]


X = normal(np.random.default_rng(9), (5, 6))
AXES = lj.kernel_axes(apply, params_of(), X)
TARGETS = "plain|stacked|heads|table"


_STARTED = {}


def started(method):
    """`(params, trainable, frozen)` as the method starts; made once for all tests of a method."""
    place = id(method), jax.config.jax_enable_x64  # what is drawn depends on it
    if place not in _STARTED:
        params = params_of()
        _STARTED[place] = method, (params, *method.init(jax.random.key(1), params))
    return _STARTED[place][1]


def trained(method, seed=3):
    """`(params, trainable, frozen)` with every part that trains moved from its start at random."""
    params, trainable, frozen = started(method)
    noise = random_like(trainable, seed, scale=0.3)
    moved = {
        name: {
            part: x if part in method.FROZEN_PARTS else x + noise[name][part]
            for part, x in entry.items()
        }
        for name, entry in trainable.items()
    }
    return params, moved, frozen


def matrices(kernel, name):
    """A kernel as float64 matrices (stack, in, out)."""
    kernel = np.asarray(kernel, np.float64)
    shape = {"stacked": (2, 8, 8), "heads": (1, 8, 6)}.get(name, (1, *kernel.shape))
    return kernel.reshape(shape)


def parts64(entry, name):
    """The parts of one adapter as float64 arrays, a leading stack axis, other axes merged."""
    stack = 2 if name == "stacked" else 1
    flat = {}
    for part, x in entry.items():
        x = np.asarray(x, np.float64)
        x = x if name == "stacked" else x[None]
        if part.endswith("b") and x.ndim > 2 and name == "heads":
            x = x.reshape(1, x.shape[1], -1)
        elif part in ("magnitude", "lambda_b"):
            x = x.reshape(stack, -1)
        flat[part] = x
    return flat


def step_of(kind, d=256, tokens=512, rank=8):
    """The compiled gradient of a two-matrix model of width d under a method, with its trainable."""
    params = {"w": jnp.ones((d, d)), "v": jnp.ones((d, d))}
    method = kind(targets="w|v", rank=rank)
    trainable, frozen = method.init(jax.random.key(0), params)
    x = jax.ShapeDtypeStruct((tokens, d), jnp.float32)

    def loss(trainable, frozen, x):
        bound = method.bind(trainable, frozen)
        return jnp.mean(lj.lift(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"])(bound, x) ** 2)

    return jax.jit(jax.grad(loss)).lower(trainable, frozen, x).compile()
