"""Principal angles of two subspaces against those of random ones; NumPy and SciPy alone."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from lora_jax.core.errors import RequestError

# 1%: how often two random subspaces seem to share a direction.
LEVEL = 0.01
# Tracy-Widom's law of order 1 is close to a shifted gamma distribution (99% quantile: 2.01, exactly
# 2.02): shape, scale, shift (Chiani 2014, arXiv:1209.3394).
_TRACY_WIDOM = (46.446, 0.186054, 9.84801)


class SharedDirections(NamedTuple):
    """`count (…)` int and, of each principal angle, cos² and what it must exceed, `(…, p)` each."""

    count: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride] tuple.count
    cosines: np.ndarray
    thresholds: np.ndarray


def count_shared(
    u1: np.ndarray, u2: np.ndarray, *, level: float = LEVEL, num_removed: int = 0
) -> SharedDirections:
    """`shared_directions` of arrays known to be orthonormal. Raises as that does for the rest."""
    if not 0.0 < level <= 0.1:
        raise RequestError(f"level is {level!r}; it must be above 0 and at most 0.1")
    dimension = u1.shape[-2] - num_removed
    if num_removed < 0 or dimension < 1:
        raise RequestError(f"num_removed is {num_removed} of {u1.shape[-2]} dimensions")
    inner = np.linalg.svd(np.swapaxes(u1, -1, -2) @ u2, compute_uv=False)
    numbers = [np.any(u != 0, axis=-2).sum(axis=-1) for u in (u1, u2)]
    cosines = np.clip(np.square(inner), 0.0, 1.0)
    return count_angles(cosines, np.stack(numbers, axis=-1), dimension, level)


def count_angles(
    cosines: np.ndarray, numbers: np.ndarray, dimension: int, level: float
) -> SharedDirections:
    """The sequential test from cos² `(…, p)`, descending, and how many directions each space has.

    `numbers (…, 2)` are int. Raises `RequestError` for spaces that always meet.
    """
    kinds, kind_of = np.unique(numbers.reshape(-1, 2), axis=0, return_inverse=True)
    of_kinds = np.ones((len(kinds), cosines.shape[-1]))
    for place, (num1, num2) in enumerate(kinds):
        own = _thresholds(int(num1), int(num2), dimension, level)
        of_kinds[place, : len(own)] = own
    limits = of_kinds[kind_of.reshape(-1)].reshape(cosines.shape)
    count = np.cumprod(cosines > limits, axis=-1).sum(axis=-1)
    return SharedDirections(count, cosines, limits)


@functools.lru_cache(maxsize=256)
def _thresholds(num1: int, num2: int, dimension: int, level: float) -> np.ndarray:
    """`(min(num1, num2),)`: the quantile of the largest cos² for each test in order."""
    if num1 + num2 > dimension:
        raise RequestError(
            f"spaces of {num1} and {num2} directions in {dimension} dimensions always meet; "
            f"compare at most {dimension} directions together"
        )
    left = min(num1, num2)
    return np.array(
        [_largest_cosine(num1 - k, num2 - k, dimension - k, level) for k in range(left)]
    )


def _largest_cosine(num1: int, num2: int, dimension: int, level: float) -> float:
    """The 1 - level quantile of the largest cos² of random subspaces of these sizes."""
    from scipy import special  # jax depends on it

    few, many, others = min(num1, num2), max(num1, num2), dimension - 1.0
    if few == 1:
        return float(special.betaincinv(many / 2, (dimension - many) / 2, 1 - level))
    if num1 + num2 == dimension:  # they nearly meet
        return 1.0
    shape, scale, shift = _TRACY_WIDOM
    quantile = scale * special.gammaincinv(shape, 1 - level) - shift
    small, large = (2 * np.arcsin(np.sqrt((n - 0.5) / others)) for n in (few, many))
    centre = 2 * np.log(np.tan((small + large) / 2))
    cube = 16 / (others * np.sin(small + large)) ** 2 / (np.sin(small) * np.sin(large))
    return float(special.expit(centre + np.cbrt(cube) * quantile))
