"""Floating-point types that sums are made in."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def float32_or_wider(*dtypes: Any) -> Any:
    """The widest of float32 and these floating-point types.

    By size, since JAX promotes neither eight-bit floats nor, where promotion is strict, any.
    """
    floats = [jnp.dtype(dtype) for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
    return max([jnp.dtype(jnp.float32), *floats], key=lambda dtype: dtype.itemsize)
