"""The formula, and the one place where its scale is computed."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def scale_of(alpha: float, rank: int, *, stabilised: bool = False) -> float:
    """`alpha / rank`, the factor before `a @ b` (Hu et al. 2021, §4.1: "scale ΔWx by α/r").

    `stabilised`: `alpha / sqrt(rank)` instead (Kalajdzievski 2023, arXiv:2312.03732, Theorem 3.2).

    >>> scale_of(16.0, 4), scale_of(16.0, 4, stabilised=True)
    (4.0, 8.0)
    """
    return alpha / (math.sqrt(rank) if stabilised else rank)


def lora_apply(x: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array, *, alpha: float):
    """`x @ kernel + (alpha / r) * (x @ a) @ b`, the rank r read off `a`; ΔW is never formed.

    Args:
      x: inputs `(..., in)`.
      kernel: the frozen kernel `(in, out)`.
      a: `(in, r)`, any float dtype, as `b`.
      b: `(r, out)`.
      alpha: the scale is `alpha / r`.

    Returns:
      `(..., out)` in the dtype that `x @ kernel` has.

    Raises:
      ValueError: the shapes disagree.

    Source: Hu et al. 2021 (arXiv:2106.09685), Eq. 3, transposed to Flax's orientation: the
    paper's B·A is `(a @ b).T`.

    >>> x, kernel = jnp.ones((2, 3)), jnp.zeros((3, 4))
    >>> lora_apply(x, kernel, jnp.ones((3, 1)), jnp.ones((1, 4)), alpha=2.0)[0, 0].item()
    6.0
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"a {a.shape} and b {b.shape} do not share a rank: a (in, r), b (r, out)")
    if kernel.shape != (a.shape[0], b.shape[1]):
        raise ValueError(f"kernel {kernel.shape} is not (in, out) = {(a.shape[0], b.shape[1])}")
    y = x @ kernel
    h = (x @ a.astype(x.dtype)) * jnp.asarray(scale_of(alpha, a.shape[1]), x.dtype)
    return y + (h @ b.astype(x.dtype)).astype(y.dtype)
