"""ΔW against W: what an adapter amplifies. Hu et al. 2021, Section 7.3, Table 7, Appendix H.4."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from lora_jax.analysis import formulas
from lora_jax.analysis.factors import SVD, delta_svd, kernel_svd, wide
from lora_jax.analysis.formulas import Amplification as Amplification
from lora_jax.core.errors import RequestError
from lora_jax.core.stacks import one_by_one


@jax.jit
def projected_norm(kernel: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """‖uᵀ @ kernel @ v‖_F `(…)` of `kernel (…, d_in, d_out)`, `u (…, d_in, k)`, `v (…, d_out, l)`.

    The paper's ‖UᵀWVᵀ‖_F, whose W is this kernel's transpose.

    >>> kernel = jnp.diag(jnp.array([3.0, 4.0]))
    >>> projected_norm(kernel, jnp.eye(2), jnp.eye(2)[:, :1]).item()
    3.0
    """
    return formulas.projected_norm(wide(kernel), wide(u), wide(v))


@functools.partial(jax.jit, static_argnames="rank")
def amplification(
    delta_kernel: jax.Array, kernel: jax.Array, rank: int, *, key: jax.Array | None = None
) -> Amplification:
    """Table 7 for a dense ΔW and W, `(…, d_in, d_out)` both, and the first `rank` directions.

    Args:
      delta_kernel, kernel: ΔW and W.
      rank: r, the number of directions.
      key: draws the random directions (default: `jax.random.key(0)`).

    Raises:
      RequestError: shapes that differ, or a rank beyond them.

    >>> delta, kernel = jnp.zeros((4, 4)).at[3, 3].set(2.0), jnp.diag(jnp.array([8.0, 4, 2, 1]))
    >>> row = amplification(delta, kernel, 1)
    >>> row.factor.item(), round(row.over_random.item(), 2)
    (2.0, 2.3)
    """
    return amplification_of(kernel_svd(delta_kernel), kernel, rank, key=key)


@functools.partial(jax.jit, static_argnames="rank")
def adapter_amplification(
    a: jax.Array,
    b: jax.Array,
    scale: jax.Array | float,
    kernel: jax.Array,
    *,
    rank: int | None = None,
    key: jax.Array | None = None,
) -> Amplification:
    """`amplification` of an adapter, ΔW = scale · a @ b, which is not formed.

    Args:
      a, b, scale: `(…, d_in, r)`, `(…, r, d_out)` and `()` or `(…)`.
      kernel: W `(…, d_in, d_out)`.
      rank: the number of directions (default: all r).
      key: as in `amplification`, which raises the same.
    """
    svd = delta_svd(a, b, scale)
    return amplification_of(svd, kernel, svd.s.shape[-1] if rank is None else rank, key=key)


def amplification_of(
    delta: SVD,
    kernel: jax.Array,
    rank: int,
    *,
    key: jax.Array | None = None,
    kernel_s: jax.Array | None = None,
) -> Amplification:
    """`amplification` of a ΔW whose SVD is there already, and perhaps W's singular values, too."""
    kernel = wide(kernel)
    d_in, d_out = kernel.shape[-2:]
    found, most = (delta.u.shape[-2], delta.v.shape[-2]), min(delta.s.shape[-1], d_in, d_out)
    if found != (d_in, d_out):
        raise RequestError(f"ΔW is {found}, the kernel {(d_in, d_out)}; give those of one kernel")
    if not 1 <= rank <= most:
        raise RequestError(f"rank is {rank}; it must be from 1 to {most}, the directions of ΔW")
    kernel_s = kernel_svd(kernel).s if kernel_s is None else kernel_s
    keys = jax.random.split(jax.random.key(0) if key is None else key)
    first, second = (
        _basis(jax.random.normal(k, (*kernel.shape[:-2], d, rank), kernel.dtype))
        for k, d in zip(keys, (d_in, d_out), strict=True)
    )
    return formulas.amplification_between(delta, kernel, rank, kernel_s, (first, second))


def _basis(matrices: jax.Array) -> jax.Array:
    return one_by_one(lambda one: jnp.linalg.qr(one)[0], matrices)
