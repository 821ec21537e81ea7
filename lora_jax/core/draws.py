"""Random numbers that do not depend on JAX's global PRNG settings.

Keys of `jax.random.key(seed)` take the implementation that `jax_default_prng_impl` names, and what
a threefry key draws depends on `jax_threefry_partitionable`. What is drawn again on loading, and
what a training must draw again on resuming, uses keys of one stated implementation instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

KEY_IMPL = "threefry2x32"


def key_from_seed(seed: int) -> jax.Array:
    """`jax.random.key(seed)` as JAX's default settings give it, under any settings.

    The default settings keep the lower 32 bits of the seed; so does this with x64 enabled.
    """
    # Under a trace the words stay a constant: a NumPy array.
    words: Any = np.array([0, int(seed) & 0xFFFFFFFF], np.uint32)
    return jax.random.wrap_key_data(words, impl=KEY_IMPL)


@contextlib.contextmanager
def partitionable() -> Iterator[None]:
    """Within it, threefry keys draw their partitionable bits; a decorator too.

    An equation keeps the setting under which it was traced, so this holds inside an outer `jit`.
    """
    with jax.threefry_partitionable(True):
        yield
