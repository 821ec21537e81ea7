"""The training loss: weighted cross-entropy with label smoothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.errors import RequestError
from lora_jax.core.lift import lift

# (trainable, frozen, batch, key) -> (mean loss, {"correct": (), "weight": ()})
LossFunction = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def cross_entropy(logits: jax.Array, labels: jax.Array, *, smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy per example in at least float32: `(1-e) * -log p[y] + e * mean_k(-log p[k])`.

    Shapes: `logits (..., classes)` of any float dtype, `labels (...)` int; the result is `(...)`.
    Source: Szegedy et al. 2016 (arXiv:1512.00567), §7, with uniform u(k).

    >>> cross_entropy(jnp.zeros((1, 4)), jnp.array([2]), smoothing=0.1)[0].item()  # log 4
    1.386294...
    """
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    log_p = jax.nn.log_softmax(wide, axis=-1)
    nll = -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
    if smoothing == 0.0:
        return nll
    return (1.0 - smoothing) * nll - smoothing * jnp.mean(log_p, axis=-1)


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """`sum(w * v) / sum(w)`, 0 where all weights are 0; rows of weight 0 may hold anything."""
    total = jnp.sum(weights)
    kept = jnp.where(weights > 0, values, 0.0)
    return jnp.sum(kept * weights) / jnp.where(total > 0, total, 1.0)


def make_loss(apply: Callable, method: Any, *, label_smoothing: float = 0.0) -> LossFunction:
    """The loss of a classifier `apply(params, input_ids, attention_mask) -> logits` under `method`.

    Raises `RequestError` if `label_smoothing` is not in [0, 1).
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise RequestError(
            f"train.label_smoothing={label_smoothing!r} must be at least 0 and below 1"
        )
    logits_of = make_logits(apply, method)

    def loss(trainable, frozen, batch, key):
        logits = logits_of(trainable, frozen, batch, key)
        losses = cross_entropy(logits, batch["labels"], smoothing=label_smoothing)
        weights = batch["weights"]
        correct = jnp.sum(weights * (jnp.argmax(logits, -1) == batch["labels"]))
        return weighted_mean(losses, weights), {"correct": correct, "weight": jnp.sum(weights)}

    return loss


def make_logits(apply: Callable, method: Any) -> Callable:
    """`(trainable, frozen, batch, key=None) -> logits (B, classes)`; a key turns dropout on."""
    lifted = lift(apply)

    def logits(trainable, frozen, batch, key=None):
        params = method.bind(trainable, frozen, key=key)
        return lifted(params, batch["input_ids"], batch["attention_mask"])

    return logits
