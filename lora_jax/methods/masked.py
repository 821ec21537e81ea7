"""Optimizers that see only what trains: the parts of adapters, or leaves of one params tree.

Adding -0.0 is the only addition that changes no bit pattern (+0.0 would turn -0.0 into 0.0): that
is the update of what stays as it is.
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

    For people with one params tree and a loop that cannot be changed. Splitting first
    (`method.init`, then gradients with respect to `trainable`) is faster: masking after a full
    gradient costs about 1.5 times its FLOPs. Masked-out leaves have no optimizer state, and their
    gradients count for nothing: not in `clip_by_global_norm`, and NaNs there do no harm.
    (`optax.masked` passes the raw gradients of masked-out leaves through as updates.)

    Args:
      tx: any optax transformation.
      mask: a tree of booleans like the parameters (`method.mask(tree)`), or a function that makes
        one of them.

    Returns:
      The transformation. Its `update` needs `params`, and raises `ValueError` without.

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

        def chosen(label, update, p):
            return update if label == "train" else _no_change(p)

        return jax.tree.map(chosen, labels(params), new, params), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _no_change(parameter):
    if trees.is_float(parameter):
        return jnp.full(parameter.shape, -0.0, parameter.dtype)
    if jnp.issubdtype(parameter.dtype, jax.dtypes.prng_key):
        raise TypeError("random keys in params cannot be updated; take them out of the tree first")
    return jnp.zeros(parameter.shape, parameter.dtype)


def by_part(
    tx: optax.GradientTransformation,
    rate_of: Callable[[str, str], float],
    decay_of: Callable[[str, str], float] = lambda name, part: 1.0,
) -> optax.GradientTransformation:
    """`tx` on trees `{name: {part: array}}`, each update times `rate_of(name, part)`.

    Where that is 0, `tx` never sees the part: it has no state for it, does not decay it, and its
    gradient counts for nothing in a norm; it stays bit for bit as it is. Other factors act after
    all of `tx`, so on decoupled weight decay too, as a parameter group's rate does in torch.

    Where `decay_of(name, part)` is not 1, `tx` sees the parameter times that factor: decoupled
    weight decay, the only use that most optimizers make of a parameter, is then that many times
    as strong. (A trust ratio, as LAMB has it, sees the same.)
    """

    def trained(tree, seen=lambda name, part, x: x):
        kept = {
            name: {part: seen(name, part, x) for part, x in entry.items() if rate_of(name, part)}
            for name, entry in tree.items()
        }
        return {name: entry for name, entry in kept.items() if entry}

    def decayed(name: str, part: str, x: Any) -> Any:
        factor = decay_of(name, part)
        return x if factor == 1.0 else factor * x

    inner = optax.with_extra_args_support(tx)

    def init(params):
        return inner.init(trained(params))

    def update(updates, state, params=None, **extra):
        own = None if params is None else trained(params, decayed)
        with implicit_promotion():
            found, state = inner.update(trained(updates), state, own, **extra)
        new: Any = found

        def whole(name: str, part: str, old: Any) -> Any:
            rate = rate_of(name, part)
            return new[name][part] * rate if rate else _no_change(old)

        return {
            name: {part: whole(name, part, old) for part, old in entry.items()}
            for name, entry in updates.items()
        }, state

    return optax.GradientTransformationExtraArgs(init, update)
