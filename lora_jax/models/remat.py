"""Layers computed again in the backward pass, by the name of what is kept in between."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx

from lora_jax.settings import SETTINGS

# JAX's own names (`jax.checkpoint_policies`), from the least memory to the most.
POLICIES = tuple(name for name in SETTINGS["train.remat"].choices if name)


def rematerialised(call: Callable, remat: str, *, in_scan: bool = False) -> Callable:
    """`call(layer, *arrays)` that keeps of each layer what the policy names; `remat=""`: itself.

    Within a scan nothing merges forward and backward, so that needs no barrier.
    """
    if not remat:
        return call
    policy = getattr(jax.checkpoint_policies, remat)

    def again(layer, *arrays):
        graph, state = nnx.split(layer)

        def run(state, *arrays):
            return call(nnx.merge(graph, state), *arrays)

        return jax.checkpoint(run, policy=policy, prevent_cse=not in_scan)(state, *arrays)

    return again
