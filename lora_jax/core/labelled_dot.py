"""Products of labelled arrays, whose axes are matched by name, and other steps on one array."""

from __future__ import annotations

import jax
from jax import lax

from lora_jax.core.explicit import within


def contract(x, x_axes, y, y_axes, keep, *, precision=None, preferred=None) -> jax.Array:
    """Multiplies `x` by `y` and sums over each label that both hold and `keep` does not.

    Labels are hashable names, one per axis. A label in both arrays and in `keep` is a batch axis.
    Returns the result with its axes in the order of `keep`.

    >>> import jax.numpy as jnp
    >>> contract(jnp.ones((2, 3)), "ij", jnp.ones((3, 4)), "jk", "ik").shape
    (2, 4)
    """
    result, labels = contract_labelled(
        x, x_axes, y, y_axes, keep, precision=precision, preferred=preferred
    )
    order = [labels.index(label) for label in keep]
    return result if order == sorted(order) else result.transpose(order)


def contract_labelled(
    x, x_axes, y, y_axes, keep, *, precision=None, preferred=None
) -> tuple[jax.Array, list]:
    """`contract`, as the pair (result, its labels) that `dot_general` leaves: the batch axes, then
    the rest of `x`, then of `y`."""
    x_axes, y_axes, keep = list(x_axes), list(y_axes), list(keep)
    both = [label for label in x_axes if label in y_axes]
    batch = [label for label in both if label in keep]
    summed = [label for label in both if label not in keep]
    numbers = (
        ([x_axes.index(label) for label in summed], [y_axes.index(label) for label in summed]),
        ([x_axes.index(label) for label in batch], [y_axes.index(label) for label in batch]),
    )
    result = lax.dot_general(x, y, numbers, precision=precision, preferred_element_type=preferred)
    labels = batch + [n for n in x_axes if n not in both] + [n for n in y_axes if n not in both]
    return result, labels


def strided_slice(x, starts, sizes, strides):
    """`lax.slice` of these sizes."""
    ends = [b + (n - 1) * k + 1 for b, n, k in zip(starts, sizes, strides, strict=True)]
    return lax.slice(x, starts, ends, strides)


def times_side(x, x_axes, side, side_axes):
    """`x` times an array that has some of its labelled axes, in `x`'s dtype."""
    where = [x_axes.index(axis) for axis in side_axes]
    sizes = dict(zip(where, side.shape, strict=True))
    in_order = sorted(range(len(where)), key=where.__getitem__)

    def times(x, side):
        side = lax.reshape(permute(side, in_order), [sizes.get(n, 1) for n in range(x.ndim)])
        # lax, not jnp: this runs once per product while the user waits for a trace.
        return lax.mul(x, lax.broadcast_in_dim(cast(side, x.dtype), x.shape, range(x.ndim)))

    return within(times, x, side, like=x)


def permute(x, permutation):
    """`x` with its axes in this order; itself if they are."""
    return x if list(permutation) == list(range(x.ndim)) else lax.transpose(x, permutation)


def cast(x, dtype):
    """`x` in this dtype; itself if it is."""
    return x if x.dtype == dtype else lax.convert_element_type(x, dtype)
