"""Loss and accuracy of a classifier over batches, with what each example contributed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.train.loss import cross_entropy, make_logits


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Weighted means over N examples and the examples themselves, in the order of the batches.

    `losses` (N,) float32, `correct` (N,) bool, `labels` (N,) int32, `index` (N,) int64: the
    example's place in its split.
    """

    loss: float
    accuracy: float
    losses: np.ndarray
    correct: np.ndarray
    labels: np.ndarray
    index: np.ndarray

    @property
    def num_examples(self) -> int:
        return len(self.losses)


# (trainable, frozen, batch) -> (losses (B,) float32, correct (B,) bool)
ScoreFunction = Callable[[Any, Any, Any], tuple[jax.Array, jax.Array]]


def make_scores(apply: Callable, method: Any) -> ScoreFunction:
    """The jitted scores of one batch: plain cross-entropy without dropout or label smoothing."""
    logits_of = make_logits(apply, method)

    @jax.jit
    def scores(trainable, frozen, batch):
        logits = logits_of(trainable, frozen, batch)
        losses = cross_entropy(logits, batch["labels"]).astype(jnp.float32)
        return losses, jnp.argmax(logits, -1) == batch["labels"]

    return scores


def evaluate(
    scores: ScoreFunction, trainable: Any, frozen: Any, batches: Iterable[dict[str, np.ndarray]]
) -> Evaluation:
    """Scores every example of weight above 0; the means are taken in float64.

    Raises `RequestError` if there is no such example.
    """
    return _as_evaluation(*_scored(scores, trainable, frozen, batches))


def evaluate_stacked(
    scores: ScoreFunction, trainable: Any, frozen: Any, batches: Iterable[dict[str, np.ndarray]]
) -> list[Evaluation]:
    """`evaluate` for K trainables at once: `trainable` and what `scores` gives have an axis K."""
    losses, correct, *examples = _scored(scores, trainable, frozen, batches)
    return [_as_evaluation(*own, *examples) for own in zip(losses, correct, strict=True)]


def _scored(scores, trainable, frozen, batches):
    """Losses and correct (…, N) of the examples that count; their labels, index, weights (N,)."""
    device_scores, rows = [], []
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key not in ("index", "weights")}
        # Nothing is fetched here: the device works on while the next batch is made.
        device_scores.append(scores(trainable, frozen, inputs))
        rows.append((batch["labels"], batch["index"], batch["weights"]))
    labels, index, weights = (
        np.concatenate([row[i] for row in rows] or [np.zeros(0)]) for i in range(3)
    )
    kept = weights > 0
    if not kept.any():
        raise RequestError("nothing to evaluate: the split holds no example")
    fetched = jax.device_get(device_scores)
    of_examples = (np.concatenate([pair[i] for pair in fetched], axis=-1) for i in (0, 1))
    return (*(array[..., kept] for array in of_examples), labels[kept], index[kept], weights[kept])


def _as_evaluation(losses, correct, labels, index, weights) -> Evaluation:
    weights = weights.astype(np.float64)
    return Evaluation(
        loss=float(np.average(losses.astype(np.float64), weights=weights)),
        accuracy=float(np.average(correct.astype(np.float64), weights=weights)),
        losses=losses,
        correct=correct,
        labels=labels.astype(np.int32),
        index=index.astype(np.int64),
    )
