"""Products of labelled arrays: `dot_general` with its axes worked out from names."""

from __future__ import annotations

import jax
from jax import lax


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
