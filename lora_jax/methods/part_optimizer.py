"""Optimizers with learning rates and weight decays per part of an adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from lora_jax.core.dtypes import implicit_promotion


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
            # Adding -0.0 is the only addition that changes no bit pattern.
            return new[name][part] * rate if rate else jnp.full(old.shape, -0.0, old.dtype)

        return {
            name: {part: whole(name, part, old) for part, old in entry.items()}
            for name, entry in updates.items()
        }, state

    return optax.GradientTransformationExtraArgs(init, update)
