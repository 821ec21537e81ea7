"""Floating-point types that sums are made in, and what lets JAX promote implicitly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp


def float32_or_wider(*dtypes: Any) -> Any:
    """The widest of float32 and these floating-point types.

    By size, since JAX promotes neither eight-bit floats nor, where promotion is strict, any.
    """
    floats = [jnp.dtype(dtype) for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
    return max([jnp.dtype(jnp.float32), *floats], key=lambda dtype: dtype.itemsize)


def promoted(*dtypes: Any) -> Any:
    """What JAX promotes these floating-point types to by default, where promotion is strict too."""
    first, *others = (jnp.dtype(dtype) for dtype in dtypes)
    return first if all(other == first for other in others) else float32_or_wider(first, *others)


@contextlib.contextmanager
def implicit_promotion() -> Iterator[None]:
    """Within it, dtypes and ranks promote implicitly, whatever the global settings.

    For code of other libraries that relies on it: optax takes `decay**count` of an integer count,
    which `jax_numpy_dtype_promotion=strict` refuses. Our own code says each promotion itself.
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
