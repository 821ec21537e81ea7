"""What data sets are judged by in addition to loss and accuracy, from labels and predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.train.task import NEAR


def matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Matthews' correlation of two classes, `labels` and `predictions` (N,) of 0 and 1.

    `(TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN))`, 0 where that is 0 / 0. Source: Matthews
    1975, Biochim. Biophys. Acta 405; CoLA's measure (Warstadt et al. 2018, arXiv:1805.12471).

    >>> matthews(np.array([1, 1, 0, 0]), np.array([1, 0, 0, 0]))
    0.577350...
    """
    return pearson(labels, predictions)  # which it is, of two variables of two values


def pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Pearson's correlation of `labels` and `predictions` (N,), in float64; 0 if one is constant.

    >>> pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
    1.0
    """
    x, y = (np.asarray(values, np.float64) for values in (labels, predictions))
    x, y = x - x.mean(), y - y.mean()
    norm = np.sqrt(np.sum(x * x) * np.sum(y * y))
    return float(np.sum(x * y) / norm) if norm else 0.0


def describe_scores(test: Mapping[str, Any], head: str | None) -> str:
    """A card's test scores (or `evaluate`'s) in words; `head` is the config's `model.head`.

    >>> describe_scores({"loss": 0.5, "accuracy": 0.75, "n": 8, "matthews": 0.5}, None)
    'loss 0.5000, accuracy 0.7500, matthews 0.5000 (8 examples)'
    """
    share = f"within {NEAR} of the label" if head == "regression" else "accuracy"
    own = "".join(f", {name} {test[name]:.4f}" for name in TASK_METRICS if name in test)
    return f"loss {test['loss']:.4f}, {share} {test['accuracy']:.4f}{own} ({test['n']:,} examples)"


TASK_METRICS = {"matthews": matthews, "pearson": pearson}
