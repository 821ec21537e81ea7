"""Loss and accuracy of a model over batches, with what each example contributed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.train.loss import make_scorer
from lora_jax.train.task import CLASSIFICATION, Task


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Weighted means over N examples and the examples themselves, in the order of the batches.

    `losses` (N,) float32; `correct` (N,) bool, of texts the share of tokens that are right,
    float32; `labels` (N,) int32, numbers float32; `index` (N,) int64: the example's place in its
    split; `weights` (N,) float32, of texts their numbers of tokens; `predictions` (N,) like the
    labels, None where the task does not keep them.
    """

    loss: float
    accuracy: float
    losses: np.ndarray
    correct: np.ndarray
    labels: np.ndarray
    index: np.ndarray
    weights: np.ndarray
    predictions: np.ndarray | None = None

    @property
    def num_examples(self) -> int:
        return len(self.losses)


# (trainable, frozen, batch) -> (losses (B,) float32, correct (B,) bool or float32), and the
# predictions (B,) where the task keeps them
ScoreFunction = Callable[[Any, Any, Any], tuple[jax.Array, ...]]


def make_scores(
    apply: Callable,
    method: Any,
    *,
    task: Task = CLASSIFICATION,
    constrain: Callable | None = None,
) -> ScoreFunction:
    """The jitted scores of one batch, as `task` scores, without dropout or label smoothing;
    `constrain` as in `make_loss`."""
    score = make_scorer(apply, method, task=task, constrain=constrain)

    @jax.jit
    def scores(trainable, frozen, batch):
        losses, correct, predictions = score(trainable, frozen, batch)
        more = (predictions,) if task.keeps_predictions else ()
        return losses.astype(jnp.float32), correct, *more

    return scores


def evaluate(
    scores: ScoreFunction, trainable: Any, frozen: Any, batches: Iterable[dict[str, np.ndarray]]
) -> Evaluation:
    """Scores every example of weight above 0; the means are taken in float64.

    Raises `RequestError` if there is no such example.
    """
    return evaluate_stacked(scores, trainable, frozen, batches)[0]


def evaluate_stacked(
    scores: ScoreFunction, trainable: Any, frozen: Any, batches: Iterable[dict[str, np.ndarray]]
) -> list[Evaluation]:
    """`evaluate` for K trainables at once: `trainable` and what `scores` gives have an axis K.

    Without that axis it is one.
    """
    device_scores, rows = [], []
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key not in ("index", "weights")}
        # Nothing is fetched here: the device works on while the next batch is made.
        device_scores.append(scores(trainable, frozen, inputs))
        rows.append((batch["labels"], batch["index"], batch["weights"]))
    labels, index, weights = (
        np.concatenate([row[i] for row in rows] or [np.zeros(0)]) for i in range(3)
    )
    counts = weights > 0
    if not counts.any():
        raise RequestError("nothing to evaluate: the split holds no example")
    fetched = zip(*jax.device_get(device_scores), strict=True)
    scored = [np.atleast_2d(np.concatenate(parts, axis=-1)[..., counts]) for parts in fetched]
    labels, index, weights = labels[counts], index[counts], weights[counts]
    in_float64 = weights.astype(np.float64)
    dtype = np.float32 if np.issubdtype(labels.dtype, np.floating) else np.int32
    return [
        Evaluation(
            loss=float(np.average(losses.astype(np.float64), weights=in_float64)),
            accuracy=float(np.average(correct.astype(np.float64), weights=in_float64)),
            losses=losses,
            correct=correct,
            labels=labels.astype(dtype),
            index=index.astype(np.int64),
            weights=weights.astype(np.float32),
            predictions=predictions[0] if predictions else None,
        )
        for losses, correct, *predictions in zip(*scored, strict=True)
    ]
