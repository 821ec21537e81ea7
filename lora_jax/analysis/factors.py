"""Singular vectors of ΔW = a @ b from its factors, without forming it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.core.dtypes import float32_or_wider
from lora_jax.core.errors import RequestError

SPACES = ("input", "output")


class SVD(NamedTuple):
    """`u (…, d_in, k)`, `s (…, k)` descending, `v (…, d_out, k)`: kernel = u @ diag(s) @ v^T."""

    u: jax.Array
    s: jax.Array
    v: jax.Array

    def basis(self, space: str) -> jax.Array:
        """`u` for "input", `v` for "output"; directions of singular value 0 are zero.

        They are arbitrary: what has not been learned shares nothing with anything. A value is 0 if
        it is below the rounding of the largest, eps · max(d_in, d_out) · s[0].
        """
        if space not in SPACES:
            raise RequestError(f"space is {space!r}; choose one of {', '.join(SPACES)}")
        vectors = self.u if space == "input" else self.v
        size = max(self.u.shape[-2], self.v.shape[-2])
        return jnp.where(is_there(self.s, size)[..., None, :], vectors, 0)


def is_there(s: jax.Array, size: int) -> jax.Array:
    """Which of `s (…, k)`, descending, are not 0 to the rounding of a matrix of `size` rows."""
    largest = s[..., :1]
    return (s > largest * size * jnp.finfo(s.dtype).eps) & (s > 0)


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
    u, s, vh = jnp.linalg.svd(wide(kernel), full_matrices=False)
    return SVD(u, s, jnp.swapaxes(vh, -1, -2))


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
    q_a, r_a = jnp.linalg.qr(a)
    q_b, r_b = jnp.linalg.qr(jnp.swapaxes(b, -1, -2))
    u, s, vh = jnp.linalg.svd(r_a @ jnp.swapaxes(r_b, -1, -2), full_matrices=False)
    norms = jnp.linalg.norm(r_a, axis=(-2, -1)) * jnp.linalg.norm(r_b, axis=(-2, -1))
    s = jnp.where(s > jnp.finfo(s.dtype).eps * a.shape[-1] * norms[..., None], s, 0)
    scale = jax.lax.broadcast_to_rank(jnp.asarray(scale, s.dtype)[..., None], s.ndim)
    v = q_b @ jnp.swapaxes(vh, -1, -2)
    return SVD(q_a @ u, s * jnp.abs(scale), v * jnp.where(scale < 0, -1, 1)[..., None, :])
