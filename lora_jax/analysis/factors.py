"""Singular vectors of ΔW = a @ b from its factors, without forming it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lora_jax.analysis.formulas import SVD as SVD
from lora_jax.analysis.formulas import is_there as is_there
from lora_jax.analysis.formulas import product_svd, thin_svd
from lora_jax.core.dtypes import float32_or_wider
from lora_jax.core.errors import RequestError


def wide(array: jax.Array) -> jax.Array:
    """The array in float32 or wider: an SVD of bfloat16 is one of its rounding.

    Raises `RequestError` for what is no stack of matrices of floats.
    """
    array = jnp.asarray(array)
    if array.ndim < 2 or not jnp.issubdtype(array.dtype, jnp.floating):
        raise RequestError(
            f"got {array.dtype} of shape {array.shape}; give floating point (…, rows, columns)"
        )
    return array.astype(float32_or_wider(array.dtype))


@jax.jit
def kernel_svd(kernel: jax.Array) -> SVD:
    """The thin SVD of `kernel (…, d_in, d_out)`, in float32 or wider."""
    return thin_svd(wide(kernel))


@jax.jit
def delta_svd(a: jax.Array, b: jax.Array, scale: jax.Array | float = 1.0) -> SVD:
    """The thin SVD of `scale * a @ b`, `a (…, d_in, r)`, `b (…, r, d_out)`: at most r directions.

    By QR of both factors and an SVD of r x r: O((d_in + d_out) r^2), where forming ΔW would cost
    O(d_in d_out r). What is left where large factors cancel, up to eps · r · ‖a‖ ‖b‖, is rounding
    and becomes 0.

    Args:
      a, b: the factors, of any floating dtype.
      scale: `()` or `(…)`.

    Returns:
      An `SVD` in float32 or wider, with k = min(r, d_in, d_out).

    Raises:
      RequestError: ranks that differ.

    >>> a, b = jnp.array([[3.0], [4.0]]), jnp.array([[0.0, 2.0, 0.0]])
    >>> [round(float(s), 4) for s in delta_svd(a, b).s]
    [10.0]
    """
    a, b = wide(a), wide(b)
    if a.shape[-1] != b.shape[-2]:
        raise RequestError(
            f"a {a.shape} has rank {a.shape[-1]}, b {b.shape} rank {b.shape[-2]}; give the a and b "
            "of one adapter"
        )
    return product_svd(a, b, scale)
