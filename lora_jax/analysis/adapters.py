"""What two adapters, or many, have in common, matrix by matrix: `lora-jax analyze`. NumPy alone."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_jax.analysis import formulas
from lora_jax.analysis.angles import LEVEL, count_angles
from lora_jax.analysis.profiles import NUM_DIRECTIONS, Progress, delta_of
from lora_jax.analysis.profiles import MatrixProfile as MatrixProfile
from lora_jax.analysis.profiles import profile_adapter as profile_adapter
from lora_jax.core.errors import RequestError
from lora_jax.core.nearest import nearest
from lora_jax.peft.factors import AdapterFactors

NUM_SAMPLES = 32


def __getattr__(name: str) -> Any:
    """Of methods of this project, in a file that imports JAX."""
    if name in ("factors_of", "kernels_of"):
        return getattr(importlib.import_module("lora_jax.analysis.trained"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclasses.dataclass(frozen=True)
class PairProfile:
    """φ(i, j) of two adapters' ΔW in one matrix, `(r1, r2)` each, at most `NUM_DIRECTIONS`.

    `expected` is E[φ] of random spaces of inputs, and `highest` what the largest of `NUM_SAMPLES`
    pairs of them reached, in inputs or in outputs whichever is more. `shared` counts the directions
    of inputs and of outputs in common (`shared_directions`), `shared_above` is the cos² that one
    must exceed; None where such spaces always meet.
    """

    module: str
    shape: tuple[int, int]
    input: np.ndarray
    output: np.ndarray
    expected: np.ndarray
    expected_output: np.ndarray
    highest: np.ndarray
    shared: tuple[int | None, int | None] = (None, None)
    shared_above: tuple[float | None, float | None] = (None, None)

    @property
    def ranks(self) -> tuple[int, int]:
        """Directions of the first and of the second."""
        return self.input.shape


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two adapters: the matrices both change, those of one alone, and those of other shapes."""

    first: str
    second: str
    profiles: tuple[PairProfile, ...]
    alone: tuple[str, ...]
    unlike: tuple[str, ...]


def select(adapter: AdapterFactors, pattern: str) -> AdapterFactors:
    """The matrices whose name contains a match of the regular expression. Raises `RequestError`."""
    try:
        expression = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise RequestError(f"{pattern!r} is no regular expression: {error}") from error
    kept = {name: one for name, one in adapter.factors.items() if expression.search(name)}
    if not kept:
        near = nearest(pattern, adapter.factors)
        raise RequestError(f"no matrix of {adapter.name} matches {pattern!r}; {near}")
    return dataclasses.replace(adapter, factors=kept)


def compare_adapters(
    one: AdapterFactors,
    other: AdapterFactors,
    *,
    num_directions: int = NUM_DIRECTIONS,
    on_progress: Progress | None = None,
) -> Pair:
    """φ of the matrices that both adapters change.

    Args:
      one, other: the adapters.
      num_directions: φ of at most so many directions of each.
      on_progress: called with the name of each matrix after it.

    Returns:
      A `Pair`; one without a common matrix has no profiles: see its `alone` and `unlike`.

    Raises:
      RequestError: a number of directions below 1.
    """
    (pair,) = compare_all([one, other], num_directions=num_directions, on_progress=on_progress)
    return pair


def compare_all(
    adapters: Sequence[AdapterFactors],
    *,
    num_directions: int = NUM_DIRECTIONS,
    on_progress: Progress | None = None,
) -> list[Pair]:
    """`compare_adapters` of every two adapters, in the order of `itertools.combinations`.

    Each ΔW is decomposed once, and the pairs of a matrix are compared together.

    Args:
      adapters: two or more.
      num_directions: φ of at most so many directions of each.
      on_progress: called with the name of a matrix after each pair of it.

    Raises:
      RequestError: a number of directions below 1.
    """
    if num_directions < 1:
        raise RequestError(f"num_directions is {num_directions}; give at least 1")
    couples = list(itertools.combinations(range(len(adapters)), 2))
    found: dict[tuple[int, int], dict[str, PairProfile]] = {couple: {} for couple in couples}
    modules = dict.fromkeys(module for one in adapters for module in one.factors)
    for module in modules:
        for members in _of_one_shape(adapters, module):
            profiles = _compare(module, adapters, members, num_directions)
            for couple, profile in zip(itertools.combinations(members, 2), profiles, strict=True):
                found[couple][module] = profile
                if on_progress:
                    on_progress(module)
    return [_pair(adapters[i], adapters[j], found[i, j]) for i, j in couples]


def _of_one_shape(adapters: Sequence[AdapterFactors], module: str) -> list[list[int]]:
    """The adapters that change this matrix, by its shape."""
    shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, adapter in enumerate(adapters):
        if module in adapter.factors:
            shapes[adapter.factors[module].shape].append(place)
    return [members for members in shapes.values() if len(members) > 1]


def _pair(one: AdapterFactors, other: AdapterFactors, found: dict[str, PairProfile]) -> Pair:
    common = [module for module in one.factors if module in other.factors]
    return Pair(
        first=one.name,
        second=other.name,
        profiles=tuple(found[module] for module in common if module in found),
        alone=tuple(sorted(one.factors.keys() ^ other.factors.keys())),
        unlike=tuple(module for module in common if module not in found),
    )


def _compare(
    module: str, adapters: Sequence[AdapterFactors], members: list[int], num_directions: int
) -> list[PairProfile]:
    """A profile of every two of `members` in one matrix."""
    svds = [delta_of(adapters[n].factors[module]) for n in members]
    shape = adapters[members[0]].factors[module].shape
    ranks = [min(svd.s.shape[0], num_directions) for svd in svds]
    # How many directions there are: those of singular value 0 are zeros.
    there = [
        int(np.any(svd.u[:, :r] != 0, axis=0).sum()) for svd, r in zip(svds, ranks, strict=True)
    ]
    couples = np.array(list(itertools.combinations(range(len(members)), 2)))
    spaces = [
        _similarities([vectors[:, :r] for vectors, r in zip(side, ranks, strict=True)], couples)
        for side in ([svd.u for svd in svds], [svd.v for svd in svds])
    ]
    counts = [
        _shared(cosines, np.array(ranks)[couples], np.array(there)[couples], d)
        for (_, cosines), d in zip(spaces, shape, strict=True)
    ]
    profiles = []
    for n, (i, j) in enumerate(couples):
        r1, r2 = ranks[i], ranks[j]
        of_inputs, of_outputs = counts[0][n], counts[1][n]
        profiles.append(
            PairProfile(
                module=module,
                shape=shape,
                input=spaces[0][0][n, :r1, :r2],
                output=spaces[1][0][n, :r1, :r2],
                expected=_expected(r1, r2, shape[0]),
                expected_output=_expected(r1, r2, shape[1]),
                highest=_highest_of_both(r1, r2, shape),
                shared=(of_inputs[0], of_outputs[0]),
                shared_above=(of_inputs[1], of_outputs[1]),
            )
        )
    return profiles


def _similarities(bases: list[np.ndarray], couples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """φ `(pairs, r, r)` and cos² of the principal angles `(pairs, r)`, r the largest rank.

    Smaller spaces are padded with zeros, which share nothing: their part of φ is cut off later, and
    cos² of 0 come last.
    """
    most = max(basis.shape[1] for basis in bases)
    padded = [np.pad(basis, ((0, 0), (0, most - basis.shape[1]))) for basis in bases]
    side_by_side = np.concatenate(padded, axis=1)
    inner = (side_by_side.T @ side_by_side).reshape(len(bases), most, len(bases), most)
    inner = inner[couples[:, 0], :, couples[:, 1]]
    cosines = np.square(np.linalg.svd(inner, compute_uv=False))
    return formulas.similarity(inner), np.clip(cosines, 0.0, 1.0)


def _shared(
    cosines: np.ndarray, ranks: np.ndarray, there: np.ndarray, dimension: int
) -> list[tuple[int | None, float | None]]:
    """How many directions each pair shares, and the cos² that one must exceed.

    None where r1 + r2 > d: such spaces always meet.
    """
    counted = np.flatnonzero(ranks.sum(axis=1) <= dimension)
    found: list[tuple[int | None, float | None]] = [(None, None)] * len(ranks)
    if len(counted):
        shared = count_angles(cosines[counted], there[counted], dimension, LEVEL)
        for n, count, limits in zip(counted, shared.count, shared.thresholds, strict=True):
            found[n] = int(count), float(limits[0])
    return found


@functools.cache
def _expected(num1: int, num2: int, dimension: int) -> np.ndarray:
    return formulas.expected_similarity(num1, num2, dimension)


def _highest_of_both(num1: int, num2: int, shape: tuple[int, int]) -> np.ndarray:
    return np.maximum(*(_highest(num1, num2, dimension) for dimension in shape))


@functools.cache
def _highest(num1: int, num2: int, dimension: int) -> np.ndarray:
    """The largest φ of `NUM_SAMPLES` pairs of random spaces; drawn as `sample_similarity` does."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((NUM_SAMPLES, num1, num2))
    others = dimension - num1
    if others >= num2:
        root = np.tril(rng.standard_normal((NUM_SAMPLES, num2, num2)), -1)
        freedom = others - np.arange(num2)
        diagonal = np.arange(num2)
        root[:, diagonal, diagonal] = np.sqrt(rng.chisquare(freedom, (NUM_SAMPLES, num2)))
    else:
        root = np.swapaxes(rng.standard_normal((NUM_SAMPLES, others, num2)), -1, -2)
    gram = np.swapaxes(rows, -1, -2) @ rows + root @ np.swapaxes(root, -1, -2)
    lower = np.linalg.cholesky(gram)
    inner = np.swapaxes(np.linalg.solve(lower, np.swapaxes(rows, -1, -2)), -1, -2)
    return formulas.similarity(inner).max(axis=0)
