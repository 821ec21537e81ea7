"""What a training carries from step to step."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes, and nothing else: the frozen tree is not in here.

    `step` counts finished steps, () int32. `key` is the run's typed random key; it never changes,
    the key of a step is `fold_in(key, step)`.
    """

    step: jax.Array
    trainable: Any
    opt_state: Any
    key: jax.Array


def init_state(trainable: Any, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step; it owns its arrays, since a step donates them."""
    trainable = jax.tree.map(jnp.copy, trainable)
    return TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable), jnp.copy(key))
