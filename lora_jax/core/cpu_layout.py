"""The two thin products of an adapter, arranged for XLA on CPU.

XLA's CPU backend is 5 to 9 times slower where the gradient of a factor is (in, r), r innermost,
than where it is (r, in), and where tokens span two axes. So rows are made one axis, and `a` enters
transposed behind a barrier, which keeps XLA from folding the transposition back: (32, 32, 384) by
r = 8, forward and backward, took 2.1 ms and takes 0.45 ms (JAX 0.10, 2 cores). Other backends lay
products out themselves, and there a flattened batch could cost a reshard.
"""

from __future__ import annotations

import jax
from jax import lax


def is_thin_case(weight_roles, contracting, batch, x_contracting, x_ndim) -> bool:
    """Whether `x (…, in…) · kernel` contracts all inputs (or all outputs) of an unstacked kernel,
    the last axes of `x`, in order."""
    if batch or "s" in weight_roles or jax.default_backend() != "cpu":
        return False
    roles = {weight_roles[axis] for axis in contracting}
    all_of_it = len(roles) == 1 and len(contracting) == weight_roles.count(next(iter(roles)))
    pairs = sorted(zip(contracting, x_contracting, strict=True))
    last = list(range(x_ndim - len(pairs), x_ndim))
    return all_of_it and [x_axis for _, x_axis in pairs] == last


def thin_products(x, first, second, scale, *, first_is_a, compute, wide, precision, preferred):
    """`(x · first) · scale · second` as (rows, outputs), all operands as matrices.

    `first` and `second` are the weight's `a (in…, r)` and `b (r, out…)`, or the other way round for
    the transposed use.
    """
    a, b = (first, second) if first_is_a else (second, first)
    rank = a.shape[-1]
    a_rI = lax.optimization_barrier(lax.reshape(a, (a.size // rank, rank)).T)
    b_rO = lax.reshape(b, (rank, b.size // rank))
    narrow, wide_out = (a_rI, b_rO) if first_is_a else (b_rO, a_rI)
    rows = lax.reshape(x, (x.size // narrow.shape[1], narrow.shape[1]))
    hidden = lax.dot_general(
        rows.astype(compute),
        narrow.astype(compute),
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=wide,
    )
    hidden = lax.mul(hidden, lax.broadcast(scale.astype(wide), hidden.shape)).astype(compute)
    return lax.dot_general(
        hidden,
        wide_out.astype(compute),
        (((1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=preferred,
    )
