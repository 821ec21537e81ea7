"""The one train step, the same for every method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.core.dtypes import float32_or_wider, implicit_promotion
from lora_jax.core.errors import RequestError
from lora_jax.train.loss import LossFunction
from lora_jax.train.state import TrainState

TrainStep = Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    loss_fn: LossFunction,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    out_shardings: Any = None,
) -> TrainStep:
    """`step(state, frozen, batch) -> (state, metrics)`, jitted; `state` is donated, `frozen` not.

    Gradients are taken with respect to `state.trainable` alone: the tree was split before, so no
    gradient of a frozen parameter is ever computed. `metrics` are scalars on the device: the mean
    `loss`, `grad_norm` before clipping, and what else `loss_fn` returns (`correct` and `weight`,
    sums over the batch). `accumulate` is into how many parts the batch is cut, one after the other
    with the memory of one: the same step except for rounding and dropout's draws. `out_shardings`
    are of its results on a mesh.
    """
    step = step_function(loss_fn, tx, accumulate=accumulate)
    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)


def step_function(
    loss_fn: LossFunction, tx: optax.GradientTransformation, *, accumulate: int = 1
) -> TrainStep:
    """The unjitted step, for callers that `vmap` it over several states."""
    grad_of = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate > 1:
        grad_of = _accumulated(grad_of, accumulate)

    def step(state: TrainState, frozen: Any, batch: Any):
        key = jax.random.fold_in(state.key, state.step)
        (loss, sums), gradients = grad_of(state.trainable, frozen, batch, key)
        with implicit_promotion():
            updates, opt_state = tx.update(gradients, state.opt_state, state.trainable)
            trainable = optax.apply_updates(state.trainable, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradients), **sums}
        return TrainState(state.step + 1, trainable, opt_state, state.key), metrics

    return step


def check_accumulate(parts: Any, batch_size: int) -> int:
    """`train.accumulate_steps`, checked. Raises `RequestError` if it does not divide the batch."""
    if isinstance(parts, bool) or not isinstance(parts, int) or parts < 1 or batch_size % parts:
        raise RequestError(
            f"train.accumulate_steps={parts!r} must be a whole number that divides "
            f"data.batch_size={batch_size}"
        )
    return parts


def _accumulated(grad_of: Callable, parts: int) -> Callable:
    """`grad_of` of a batch in parts: the means of the parts, weighted by their weights."""

    def accumulated(trainable: Any, frozen: Any, batch: Any, key: jax.Array):
        # Part n takes rows n, n + parts, …: a batch that is split over devices in runs of rows
        # gives each device its share of every part.
        cut = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)

        def one(number, part):
            (loss, sums), gradients = grad_of(
                trainable, frozen, part, jax.random.fold_in(key, number)
            )
            # In float32 or wider: sums of many parts, and of many tokens, outgrow 16 bits.
            wide = lambda x: x.astype(float32_or_wider(x.dtype))  # noqa: E731
            weighted = jax.tree.map(lambda x: wide(x) * sums["weight"], gradients)
            return loss * sums["weight"], sums, weighted

        def add(total, numbered):
            return jax.tree.map(jnp.add, total, one(*numbered)), None

        first = jax.tree.map(lambda x: x[0], cut)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, jnp.int32(0), first)
        )
        (loss, sums, gradients), _ = jax.lax.scan(add, zeros, (jnp.arange(parts), cut))
        total = jnp.where(sums["weight"] > 0, sums["weight"], 1.0)
        mean = jax.tree.map(lambda x, like: (x / total).astype(like.dtype), gradients, trainable)
        return (loss / total, sums), mean

    return accumulated
