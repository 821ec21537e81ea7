"""Factorizations of stacked matrices, one matrix after the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax


def one_by_one(factorize: Callable[[jax.Array], Any], matrices: jax.Array) -> Any:
    """`factorize` of each matrix of `matrices (…, m, n)`, as if it took stacks.

    On CPU, jaxlib's factorizations of a stack (seen with QR, jaxlib 0.10.2) block a thread of the
    pool that they wait for: two of them in one program never end where the pool has two threads.
    Those of a single matrix do not wait.

    Args:
      factorize: takes one matrix, returns a tree of arrays.
      matrices: two axes or more.

    >>> import jax.numpy as jnp
    >>> q, r = one_by_one(jnp.linalg.qr, jnp.ones((2, 3, 5, 4)))
    >>> q.shape, r.shape
    ((2, 3, 5, 4), (2, 3, 4, 4))
    """
    *stack, rows, columns = matrices.shape
    if not stack:
        return factorize(matrices)
    found = jax.lax.map(factorize, matrices.reshape(math.prod(stack), rows, columns))
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), found)
