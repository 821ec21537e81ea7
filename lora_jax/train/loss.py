"""The training loss: the task's losses of the examples, averaged by their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.lift import lift
from lora_jax.train.task import CLASSIFICATION, Task
from lora_jax.train.task import cross_entropy as cross_entropy

# (trainable, frozen, batch, key) -> (mean loss, {"correct": (), "weight": ()})
LossFunction = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]

# What a model is called with, in its order, as far as a batch has it.
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """`sum(w * v) / sum(w)`, 0 where all weights are 0; rows of weight 0 may hold anything."""
    total = jnp.sum(weights)
    kept = jnp.where(weights > 0, values, 0.0)
    return jnp.sum(kept * weights) / jnp.where(total > 0, total, 1.0)


def make_loss(
    apply: Callable,
    method: Any,
    *,
    label_smoothing: float = 0.0,
    task: Task = CLASSIFICATION,
) -> LossFunction:
    """The loss of a model `apply(params, input_ids, attention_mask) -> logits` under `method`.

    Raises `RequestError` if `label_smoothing` is not in [0, 1), or the task has none.
    """
    task.check_smoothing(label_smoothing)
    logits_of = make_logits(apply, method)

    def loss(trainable, frozen, batch, key):
        logits = logits_of(trainable, frozen, batch, key)
        losses, right, _ = task.score(logits, batch, smoothing=label_smoothing)
        weights = batch["weights"]
        correct = jnp.sum(weights * right)
        return weighted_mean(losses, weights), {"correct": correct, "weight": jnp.sum(weights)}

    return loss


def make_logits(apply: Callable, method: Any) -> Callable:
    """`(trainable, frozen, batch, key=None) -> logits (B, …)`; a key turns dropout on."""
    lifted = lift(apply)

    def logits(trainable, frozen, batch, key=None):
        params = method.bind(trainable, frozen, key=key)
        return lifted(params, *(batch[name] for name in INPUTS if name in batch))

    return logits
