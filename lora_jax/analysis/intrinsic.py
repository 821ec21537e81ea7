"""d₉₀: the dimension of the smallest random subspace in which a task is nearly solved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lora_jax.core.errors import RequestError


class Dimension(NamedTuple):
    """`dimension`, from the mean over seeds, and `per_seed`; None where none tried was enough.

    `threshold` is the score to reach. The true value lies between `below`, the largest dimension
    tried under `dimension` (0 if it was the smallest), and `dimension`.
    """

    dimension: int | None
    below: int
    per_seed: tuple[int | None, ...]
    threshold: float


def intrinsic_dimension(
    dims: Sequence[int], scores, full_score: float, *, share: float = 0.9
) -> Dimension:
    """The smallest of `dims` whose score reaches `share` of what all parameters reach: d₉₀.

    As Li et al. 2018, Section 2.2, and Aghajanyan et al. 2020, Section 3.2, define it: of the score
    itself, chance not subtracted.

    Args:
      dims: (n,) ascending.
      scores: (n, seeds), the larger the better (accuracies, not losses).
      full_score: the score of training all parameters.
      share: the part of it to reach, in (0, 1].

    Raises:
      RequestError: dimensions out of order, scores of another shape, or a share out of range.

    >>> scores = [[0.2, 0.3], [0.7, 0.95], [0.95, 0.97]]
    >>> intrinsic_dimension([10, 50, 200], scores, 1.0)
    Dimension(dimension=200, below=50, per_seed=(200, 50), threshold=0.9)
    """
    dims, scores = list(dims), np.asarray(scores, np.float64)
    if not dims or any(b <= a for a, b in zip(dims, dims[1:], strict=False)) or dims[0] < 1:
        raise RequestError(f"dims are {dims}; give whole numbers from 1 on, in ascending order")
    if scores.ndim != 2 or len(scores) != len(dims) or not scores.shape[1]:
        raise RequestError(
            f"scores are {scores.shape} for {len(dims)} dimensions; give (dimensions, seeds)"
        )
    if np.isnan(scores).any():
        raise RequestError("scores hold NaN; give 0 for a run that diverged, or leave its seed out")
    if not 0.0 < share <= 1.0 or not np.isfinite(full_score) or full_score <= 0:
        raise RequestError(
            f"share is {share!r} of a full score of {full_score!r}; both must be above 0, the "
            "share at most 1"
        )
    threshold = share * full_score

    def first(column) -> int | None:
        return next((d for d, score in zip(dims, column, strict=True) if score >= threshold), None)

    found = first(scores.mean(axis=1))
    place = len(dims) if found is None else dims.index(found)
    return Dimension(
        dimension=found,
        below=dims[place - 1] if place else 0,
        per_seed=tuple(map(first, scores.T)),
        threshold=float(threshold),
    )
