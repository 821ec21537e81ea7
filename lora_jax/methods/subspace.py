"""What says which random subspace it is: its key and what it was made for, as numbers that travel.

All that trains is stored, stacked and saved as floating-point arrays; so these are, too.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from lora_jax.core.draws import KEY_IMPL, partitionable
from lora_jax.core.errors import RequestError
from lora_jax.methods.base import PROBED


@partitionable()
def key_numbers(key: jax.Array) -> jax.Array:
    """(4,) float32 of 16 bits each, from a key of any kind."""
    words = jax.random.bits(key, (2,), jnp.uint32)
    return jnp.stack([words >> 16, words & 0xFFFF], axis=-1).reshape(-1).astype(jnp.float32)


def key_of(numbers: jax.Array) -> jax.Array:
    """The key that `key_numbers` wrote down; nothing has a gradient by it."""
    halves = jax.lax.stop_gradient(numbers).astype(jnp.uint32).reshape(-1, 2)
    return jax.random.wrap_key_data((halves[:, 0] << 16) | halves[:, 1], impl=KEY_IMPL)


def probe(project: Callable[..., jax.Array], numbers: jax.Array, dim: int) -> list[float]:
    """The first rows of a small projection with this key: what `Method.drawn` reports of it."""
    theta = jnp.arange(1, min(dim, PROBED) + 1, dtype=jnp.float32)
    return project(theta, 8 * PROBED, key_of(numbers))[: 2 * PROBED].tolist()


def layout_of(sizes: Mapping[str, int]) -> jax.Array:
    """(2,) float32: a hash of names and sizes in their order."""
    return jnp.asarray(_layout_of(sizes))


def _layout_of(sizes: Mapping[str, int]) -> np.ndarray:
    # NumPy: under a trace JAX would make a number of it that is not known.
    found = zlib.crc32(repr(list(sizes.items())).encode())
    return np.array([found >> 16, found & 0xFFFF], np.float32)


def check_layout(name: str, layout: jax.Array, sizes: Mapping[str, int]) -> None:
    """Raises `RequestError` where `layout` was made for others.

    Under a trace its numbers are not known; what is loaded or merged is seen.
    """
    is_known = not isinstance(layout, jax.core.Tracer)
    if is_known and not np.array_equal(layout, _layout_of(sizes)):
        raise RequestError(
            f"{name!r} was made for other parameters than the {len(sizes)} that move here "
            f"({sum(sizes.values()):,} numbers); bind it to the tree it was made for"
        )


def check_dim(dim: object) -> None:
    """Raises `RequestError` for what is no number of dimensions."""
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        raise RequestError(f"dim is {dim!r}; it must be a whole number of 1 or more")
