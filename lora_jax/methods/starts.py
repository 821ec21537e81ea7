"""How factors start: drawn at random, or from the singular vectors of the kernel."""

from __future__ import annotations

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.dtypes import float32_or_wider
from lora_jax.methods.sites import Site


def key_of_name(key: Any, name: str) -> Any:
    """A key of the name alone: adding a target leaves the others' draws as they were."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def draw(key: jax.Array, init: str, site: Site, dtype) -> jax.Array:
    """A random `a (stack…, in…, r)` by the name of its distribution (see `Rule`).

    Each of the r columns has a key of its own, so that an adapter padded to a wider rank starts as
    its unpadded twin.
    """
    bound = 1.0 / math.sqrt(site.size("i"))
    shape = (*site.sizes("s"), *site.sizes("i"))
    # Drawn flat: the same numbers, from a program that compiles in half the time or less.
    size = math.prod(shape)

    def column(index):
        column_key = jax.random.fold_in(key, index)
        if init == "kaiming_uniform":
            # With a=√5, as microsoft/LoRA and PEFT draw it, Kaiming-uniform is U(±1/√in).
            return jax.random.uniform(column_key, (size,), dtype, -bound, bound)
        return bound * jax.random.normal(column_key, (size,), dtype)

    a = jax.vmap(column, out_axes=-1)(jnp.arange(site.rank)).reshape(*shape, site.rank)
    if init != "orthogonal":
        return a
    matrices = a.reshape(*site.sizes("s"), site.size("i"), site.rank)
    q, r = jnp.linalg.qr(matrices)
    # With the signs of r's diagonal, q is Haar-distributed (Mezzadri 2007, math-ph/0609050).
    signs = jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))
    return (q * signs[..., None, :]).reshape(a.shape)


def to_matrices(kernel: jax.Array, site: Site) -> jax.Array:
    """A kernel of the site's shape as `(stack…, in, out)`, inputs and outputs one axis each."""
    order = [n for role in "sio" for n, r in enumerate(site.roles) if r == role]
    return kernel.transpose(order).reshape(*site.sizes("s"), site.size("i"), site.size("o"))


def top_singular(kernel: jax.Array, site: Site) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The `rank` largest singular values of each matrix of a kernel, with their vectors.

    Returns `p (stack…, in…, r)`, `sigma (stack…, r)`, `q (stack…, r, out…)` in float32 or wider:
    the best rank-r approximation of the kernel is `(p * sigma) @ q` (Eckart & Young 1936). The sign
    of each pair is such that the largest entry of its column of `p` is positive.
    """
    wide = float32_or_wider(kernel.dtype)
    matrices = to_matrices(kernel.astype(wide), site)
    p, sigma, q = jnp.linalg.svd(matrices, full_matrices=False)
    p, sigma, q = p[..., : site.rank], sigma[..., : site.rank], q[..., : site.rank, :]
    largest = jnp.argmax(jnp.abs(p), axis=-2, keepdims=True)
    signs = jnp.sign(jnp.take_along_axis(p, largest, axis=-2))
    p, q = p * signs, q * jnp.swapaxes(signs, -1, -2)
    return p.reshape(site.part_shape("sir")), sigma, q.reshape(site.part_shape("sro"))


def times_ranks(x: jax.Array, ranks: jax.Array, spec: str, site: Site) -> jax.Array:
    """`x`, whose axes have the roles `spec`, times `ranks (stack…, r)`."""
    place = sum(len(site.sizes(role)) for role in spec[: spec.index("r")])
    stack = len(site.sizes("s"))
    shape = [n if axis < stack or axis == place else 1 for axis, n in enumerate(x.shape)]
    return x * ranks.reshape(shape)
