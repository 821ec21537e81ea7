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


# Apart from what adapters fold their keys with, hashes of their paths.
_OF_THE_MODEL = 2106_09685


def loss_settings(settings: Any) -> dict[str, Any]:
    """The arguments of `make_loss` that a config's `train` section holds."""
    return {
        "label_smoothing": settings.label_smoothing,
        "model_dropout": bool(settings.get("model_dropout", False)),
    }


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
    model_dropout: bool = False,
    task: Task = CLASSIFICATION,
) -> LossFunction:
    """The loss of a model `apply(params, input_ids, attention_mask) -> logits` under `method`.

    With `model_dropout` the model's own dropout is on, beside the adapters'. Raises `RequestError`
    if `label_smoothing` is not in [0, 1), or the task has none.
    """
    task.check_smoothing(label_smoothing)
    logits_of = make_logits(apply, method, model_dropout=model_dropout)

    def loss(trainable, frozen, batch, key):
        logits = logits_of(trainable, frozen, batch, key)
        losses, right, _ = task.score(logits, batch, smoothing=label_smoothing)
        weights = batch["weights"]
        correct = jnp.sum(weights * right)
        return weighted_mean(losses, weights), {"correct": correct, "weight": jnp.sum(weights)}

    return loss


def make_logits(apply: Callable, method: Any, *, model_dropout: bool = False) -> Callable:
    """`(trainable, frozen, batch, key=None) -> logits (B, …)`; a key turns dropout on.

    That is the adapters', and with `model_dropout` the model's own, by its config's rates.
    """
    lifted = lift(apply)

    def logits(trainable, frozen, batch, key=None):
        params = method.bind(trainable, frozen, key=key)
        inputs = [batch[name] for name in INPUTS if name in batch]
        if not model_dropout or key is None:
            return lifted(params, *inputs)
        return lifted(params, *inputs, dropout_key=jax.random.fold_in(key, _OF_THE_MODEL))

    return logits
