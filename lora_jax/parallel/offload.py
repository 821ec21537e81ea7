"""The optimizer's state in the host's memory, fetched to the device parameter by parameter.

QLoRA (arXiv:2305.14314, Section 3) pages it by unified memory; here JAX's memory kinds say where it
lies, so that what a step holds is known before it runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import optax

from lora_jax.core.dtypes import implicit_promotion

HOST = "pinned_host"


def is_in_hosts_memory(where: Any) -> bool:
    """Whether an array of this sharding is no part of the devices' own memory. On CPU none is."""
    return where.memory_kind == HOST and all(d.platform != "cpu" for d in where.device_set)


def lacks_host_memory(device: Any) -> str:
    """Why `device` cannot have a state in its host's memory, "" if it can."""
    kinds = {memory.kind for memory in device.addressable_memories()}
    if HOST in kinds:
        return ""
    return f"{device.platform} has no memory kind {HOST!r}, only {', '.join(sorted(kinds))}"


def leaf_by_leaf(
    tx: optax.GradientTransformation,
    clip: optax.GradientTransformation,
    moves: tuple[Any, Any] | None = None,
) -> optax.GradientTransformation:
    """`clip` of all gradients, then `tx` of each parameter with a state of its own.

    The state is `{name: {part: state}}` for a trainable `{name: {part: array}}`. The same as `tx`
    after `clip`, for a `tx` in which parameters know nothing of each other. `moves` are shardings
    of the state, here and there: it lies there, and each parameter's is brought here for its update
    and sent back before the next one's, so that at no time all of it is here.
    """

    def init(params: Any) -> Any:
        return {
            name: {part: tx.init({name: {part: leaf}}) for part, leaf in entry.items()}
            for name, entry in params.items()
        }

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        gradients: Any = clip.update(updates, clip.init(params))[0]
        changes: dict[str, Any] = {}
        states: dict[str, Any] = {}
        before = None
        for name, entry in gradients.items():
            changes[name], states[name] = {}, {}
            for part, gradient in entry.items():
                own, held = state[name][part], params[name][part]
                if moves is not None:
                    if before is not None:
                        # Not before the one before has gone: else all would be fetched at once.
                        own, _ = jax.lax.optimization_barrier((own, before))
                    own = jax.device_put(own, moves[0][name][part])
                with implicit_promotion():
                    one: Any = {name: {part: gradient}}
                    found, new = tx.update(one, own, {name: {part: held}})
                change = cast(Any, found)[name][part]
                if moves is not None:
                    new = jax.device_put(new, moves[1][name][part])
                before = changes[name][part], states[name][part] = change, new
        return changes, states

    return optax.GradientTransformationExtraArgs(init, update)


def offload(
    parts: tuple[optax.GradientTransformation, optax.GradientTransformation],
    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation],
    shapes_of: Callable[[optax.GradientTransformation], Any],
    shardings_of: Callable[[Any], Any],
    *,
    kind: str | None = HOST,
) -> tuple[optax.GradientTransformation, Any]:
    """`(tx, shardings of the train state)` with the moments in the memory of `kind`.

    `parts` are `train.optimizer_parts`, `wrap` a method's `optimizer`; `shapes_of(tx)` gives the
    shapes of a train state, `shardings_of(shapes)` where it would lie on the devices. Scalars, such
    as counts of steps, stay there; with no `kind` all does, in a state of the same structure, so
    that a checkpoint goes on on a backend without such a memory.
    """
    clip, tx = parts
    shapes = shapes_of(wrap(leaf_by_leaf(tx, clip)))
    here = shardings_of(shapes)
    if kind is None:
        return wrap(leaf_by_leaf(tx, clip)), here
    there = jax.tree.map(
        lambda x, where: where.with_memory_kind(kind) if x.ndim else where,
        shapes.opt_state,
        here.opt_state,
    )
    placed = dataclasses.replace(here, opt_state=there)
    return wrap(leaf_by_leaf(tx, clip, (here.opt_state, there))), placed
