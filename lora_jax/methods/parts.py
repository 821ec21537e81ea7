"""Optimizers that tell the parts of an adapter apart: rates of their own, or none at all."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import optax


def by_part(
    tx: optax.GradientTransformation, fixed: Set[str], multipliers: Mapping[str, float]
) -> optax.GradientTransformation:
    """`tx` on trees `{path: {part: array}}`: parts in `fixed` do not move, the updates of others
    are multiplied as `multipliers` says.

    `tx` never sees a fixed part: it has no state for it, does not decay it, and its gradient counts
    for nothing in a norm. A multiplier acts after all of `tx`, so on the decoupled weight decay
    too, as a parameter group's learning rate does in torch.
    """
    if not fixed and not multipliers:
        return tx

    def trained(tree):
        kept = {
            path: {part: x for part, x in entry.items() if part not in fixed}
            for path, entry in tree.items()
        }
        return {path: entry for path, entry in kept.items() if entry}

    def init(params):
        return tx.init(trained(params))

    def update(updates, state, params=None):
        new, state = tx.update(trained(updates), state, None if params is None else trained(params))

        def whole(path: str, part: str, old: jax.Array) -> Any:
            if part in fixed:
                # Adding -0.0 is the only addition that changes no bit pattern.
                return jnp.full(old.shape, -0.0, old.dtype)
            return new[path][part] * multipliers.get(part, 1.0)

        return {
            path: {part: whole(path, part, old) for part, old in entry.items()}
            for path, entry in updates.items()
        }, state

    return optax.GradientTransformation(init, update)
