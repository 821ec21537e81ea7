"""The optimizer's state in the host's memory, fetched to the device parameter by parameter.

QLoRA (arXiv:2305.14314, Section 3) pages it by unified memory; here JAX's memory kinds say where it
lies, so that what a step holds is known before it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

HOST = "pinned_host"


def is_in_hosts_memory(where: Any) -> bool:
    """Whether an array of this sharding is no part of the devices' own memory. On CPU none is."""
    return where.memory_kind == HOST and all(d.platform != "cpu" for d in where.device_set)


def host_memory(device: Any) -> str:
    """Why `device` cannot have a state in its host's memory, "" if it can."""
    kinds = {memory.kind for memory in device.addressable_memories()}
    if HOST in kinds:
        return ""
    return f"{device.platform} has no memory kind {HOST!r}, only {', '.join(sorted(kinds))}"


def leaf_by_leaf(
    tx: optax.GradientTransformation, clip: optax.GradientTransformation
) -> optax.GradientTransformation:
    """`clip` of all gradients, then `tx` of each parameter with a state of its own.

    The state is `{name: {part: state}}` for a trainable `{name: {part: array}}`. The same as `tx`
    after `clip`, for a `tx` in which parameters know nothing of each other.
    """

    def init(params):
        return {
            name: {part: tx.init({name: {part: leaf}}) for part, leaf in entry.items()}
            for name, entry in params.items()
        }

    def update(gradients, state, params=None):
        return _updated(tx, clip, gradients, state, params, lambda of_one, name, part: of_one)

    return optax.GradientTransformation(init, update)


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
    fetched = _offloaded(tx, clip, here.opt_state, there)
    return wrap(fetched), here.replace(opt_state=there)


def _offloaded(
    tx: optax.GradientTransformation, clip: optax.GradientTransformation, here: Any, there: Any
) -> optax.GradientTransformation:
    """`leaf_by_leaf`, whose state lies `there` and is brought `here` for its parameter's update.

    Both are shardings of the state. One after the other: at no time are the moments of all
    parameters on the device.
    """

    def fetch(of_one, name, part):
        return jax.tree.map(jax.device_put, of_one, here[name][part])

    def put_back(of_one, name, part):
        return jax.tree.map(jax.device_put, of_one, there[name][part])

    def update(gradients, state, params=None):
        return _updated(tx, clip, gradients, state, params, fetch, put_back)

    return optax.GradientTransformation(leaf_by_leaf(tx, clip).init, update)


def _updated(tx, clip, gradients, state, params, fetch: Callable, put_back: Callable | None = None):
    gradients, _ = clip.update(gradients, clip.init(params))
    updates: dict[str, Any] = {}
    states: dict[str, Any] = {}
    before = None
    for name, entry in gradients.items():
        updates[name], states[name] = {}, {}
        for part, gradient in entry.items():
            own, held = state[name][part], params[name][part]
            if before is not None and put_back is not None:
                # Not before the one before has gone: else all would be fetched at once.
                own, _ = jax.lax.optimization_barrier((own, before))
            found, new = tx.update(
                {name: {part: gradient}}, fetch(own, name, part), {name: {part: held}}
            )
            updates[name][part] = found[name][part]
            states[name][part] = new if put_back is None else put_back(new, name, part)
            before = (updates[name][part], states[name][part])
    return updates, states
