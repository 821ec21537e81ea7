"""The training loss: the task's losses of the examples, averaged by their weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.lift import lift
from lora_jax.settings import TrainSettings, check
from lora_jax.train.task import CLASSIFICATION, Task
from lora_jax.train.task import cross_entropy as cross_entropy

# (trainable, frozen, batch, key) -> (mean loss, {"correct": (), "weight": ()})
LossFunction = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]

# What a model is called with, in its order, as far as a batch has it.
INPUTS = ("input_ids", "attention_mask", "token_type_ids")

# Apart from what adapters fold their keys with, hashes of their paths.
_OF_THE_MODEL = 2106_09685


def loss_settings(settings: TrainSettings) -> dict[str, Any]:
    """The arguments of `make_loss` that a config's `train` section holds."""
    names = ("label_smoothing", "model_dropout", "loss_chunk", "remat")
    return {name: settings[name] for name in names}


def weighted_mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """`sum(w * v) / sum(w)`, 0 where all weights are 0; rows of weight 0 may hold anything."""
    total = jnp.sum(weights)
    counted = jnp.where(weights > 0, values, 0.0)
    return jnp.sum(counted * weights) / jnp.where(total > 0, total, 1.0)


def make_loss(
    apply: Callable,
    method: Any,
    *,
    label_smoothing: float = 0.0,
    model_dropout: bool = False,
    loss_chunk: int = 0,
    remat: str = "",
    constrain: Callable | None = None,
    task: Task = CLASSIFICATION,
) -> LossFunction:
    """The loss of a model `apply(params, input_ids, attention_mask) -> logits` under `method`.

    With `model_dropout` the model's own dropout is on, with the adapters'. `loss_chunk` is how
    many positions' logits a language model makes at a time (see `readout_tokens`), `remat` what
    layers keep for the backward pass (a policy of `models.remat`; "": all),
    `constrain(states)` where states between layers lie on a mesh. Raises `RequestError`
    if `label_smoothing` is not in [0, 1), or the task has none, for a negative chunk, or an unknown
    policy.
    """
    task.check_smoothing(label_smoothing)
    check("train.loss_chunk", loss_chunk)
    check("train.remat", remat)
    score = make_scorer(
        apply, method, task=task, model_dropout=model_dropout, smoothing=label_smoothing,
        chunk=loss_chunk, remat=remat, constrain=constrain,
    )  # fmt: skip

    def loss(trainable, frozen, batch, key):
        losses, right, _ = score(trainable, frozen, batch, key)
        weights = batch["weights"]
        correct = jnp.sum(weights * right.astype(weights.dtype))
        return weighted_mean(losses, weights), {"correct": correct, "weight": jnp.sum(weights)}

    return loss


def make_scorer(
    apply: Callable,
    method: Any,
    *,
    task: Task,
    model_dropout: bool = False,
    smoothing: float = 0.0,
    chunk: int = 0,
    remat: str = "",
    constrain: Callable | None = None,
) -> Callable:
    """`(trainable, frozen, batch, key=None) -> ExampleScores`; a key turns dropout on.

    That is the adapters', and with `model_dropout` the model's own, by its config's rates.
    """
    lifted = lift(apply)

    def scores(trainable, frozen, batch, key=None):
        params = method.bind(trainable, frozen, key=key)
        inputs = [batch[name] for name in INPUTS if name in batch]
        options: dict[str, Any] = {"remat": remat} if remat else {}
        if constrain is not None:
            options["constrain"] = constrain
        if model_dropout and key is not None:
            options["dropout_key"] = jax.random.fold_in(key, _OF_THE_MODEL)
        if task.readout is None:
            return task.score(lifted(params, *inputs, **options), batch, smoothing=smoothing)
        readout = functools.partial(task.readout, batch=batch, smoothing=smoothing, chunk=chunk)
        return lifted(params, *inputs, readout=readout, **options)

    return scores
