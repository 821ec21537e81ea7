"""For people with one params tree and their own loop: an optimizer that sees only what trains.

Splitting first (`method.init`, then gradients with respect to `trainable`) is faster: masking after
a full gradient costs about 1.5 times its FLOPs. This is for loops that cannot be changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.core import trees
from lora_jax.core.dtypes import implicit_promotion


def masked_optimizer(
    tx: optax.GradientTransformation, mask: Any | Callable[[Any], Any]
) -> optax.GradientTransformation:
    """`tx` on the leaves where `mask` is True; every other leaf stays bit for bit as it is.

    `mask` is a tree of booleans like the parameters (`method.mask(tree)`), or a function that makes
    one. Masked-out leaves have no optimizer state, and their gradients count for nothing: not in
    `clip_by_global_norm`, and NaNs there do no harm. (`optax.masked` passes the raw gradients of
    masked-out leaves through as updates.) `update` needs `params`.

    >>> tx = masked_optimizer(optax.sgd(1.0), {"a": True, "kernel": False})
    >>> params = {"a": jnp.ones(2), "kernel": jnp.ones(2)}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["kernel"]
    Array([1., 1.], dtype=float32)
    """

    def labels(params):
        chosen = mask(params) if callable(mask) else mask
        return jax.tree.map(lambda trains: "train" if trains else "freeze", chosen)

    inner = optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError(
                "masked_optimizer needs the parameters: tx.update(grads, state, params)"
            )
        with implicit_promotion():
            new, state = inner.update(updates, state, params, **extra)
        chosen = labels(params)
        # Adding -0.0 is the only addition that changes no bit pattern: +0.0 would turn -0.0 to 0.0.
        new = jax.tree.map(
            lambda label, update, p: update if label == "train" else _no_change(p),
            chosen,
            new,
            params,
        )
        return new, state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _no_change(parameter):
    if trees.is_float(parameter):
        return jnp.full(parameter.shape, -0.0, parameter.dtype)
    if jnp.issubdtype(parameter.dtype, jax.dtypes.prng_key):
        raise TypeError("random keys in params cannot be updated; take them out of the tree first")
    return jnp.zeros(parameter.shape, parameter.dtype)
