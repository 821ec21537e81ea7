"""The one train step, the same for every method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from lora_jax.train.loss import LossFunction
from lora_jax.train.state import TrainState

TrainStep = Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(loss_fn: LossFunction, tx: optax.GradientTransformation) -> TrainStep:
    """`step(state, frozen, batch) -> (state, metrics)`, jitted; `state` is donated, `frozen` not.

    Gradients are taken with respect to `state.trainable` alone: the tree was split before, so no
    gradient of a frozen parameter is ever computed. `metrics` are scalars on the device: the mean
    `loss`, `grad_norm` before clipping, and what `loss_fn` gives beside (`correct` and `weight`,
    sums over the batch).
    """
    return jax.jit(step_function(loss_fn, tx), donate_argnums=0)


def step_function(loss_fn: LossFunction, tx: optax.GradientTransformation) -> TrainStep:
    """The step itself, for whoever maps it over many states before compiling."""

    def step(state: TrainState, frozen: Any, batch: Any):
        key = jax.random.fold_in(state.key, state.step)
        grad_of = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, sums), gradients = grad_of(state.trainable, frozen, batch, key)
        updates, opt_state = tx.update(gradients, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {"loss": loss, "grad_norm": optax.global_norm(gradients), **sums}
        return TrainState(state.step + 1, trainable, opt_state, state.key), metrics

    return step
