"""Two adapters, or an adapter and its base, matrix by matrix: what `lora-jax analyze` shows."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.analysis.factors import delta_svd, kernel_svd
from lora_jax.analysis.kernels import Amplification, amplification_of
from lora_jax.analysis.shared import shared_where_possible
from lora_jax.analysis.spectra import energy_rank, entropy_rank, intruders_of, stable_rank
from lora_jax.analysis.subspaces import basis_similarity, expected_similarity, sample_similarity
from lora_jax.core import trees
from lora_jax.core.errors import RequestError
from lora_jax.core.values import is_adapted
from lora_jax.methods.base import Method, PyTree, Trainable
from lora_jax.methods.intrinsic import IntrinsicDimension
from lora_jax.methods.sites import Site, path_of
from lora_jax.methods.sums import Changes
from lora_jax.methods.uni_lora import UniLoRA
from lora_jax.peft.factors import AdapterFactors, Factors
from lora_jax.quant.weight import NF4Weight

# φ is shown of so many directions at most: the grid of r = 256 has 65,536 cells.
NUM_DIRECTIONS = 64
NUM_SAMPLES = 32
# Shuttleworth et al. 2024: k and ε.
NUM_INTRUDERS, INTRUDER_COSINE = 10, 0.5

Progress = Callable[[str], None]
# W `(d_in, d_out)` of one matrix of an adapter.
Kernels = Callable[[AdapterFactors, str], Any]


@dataclasses.dataclass(frozen=True)
class MatrixProfile:
    """What an adapter learned in one matrix `(d_in, d_out)`.

    `s (r,)` are ΔW's singular values and the three ranks are theirs (see `spectra`). Where the base
    is known, `amplification` is Table 7 for all r directions, `kernel_similarity (n, k)` φ of W's
    first n directions of inputs and ΔW's first k (Figure 8), `intruders` the number among the first
    `NUM_INTRUDERS` of W + ΔW's.
    """

    module: str
    shape: tuple[int, int]
    rank: int
    s: np.ndarray
    stable_rank: float
    entropy_rank: float
    energy_rank: int
    amplification: Amplification | None = None
    kernel_similarity: np.ndarray | None = None
    intruders: int | None = None

    @property
    def delta_norm(self) -> float:
        """‖ΔW‖_F."""
        return float(np.sqrt(np.sum(np.square(self.s))))


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


def factors_of(
    method: Method, trainable: Trainable, params: PyTree, *, name: str = "adapter"
) -> AdapterFactors:
    """The matrices that a method of this project changes, by path, as `Factors`.

    Stacked layers come apart, `path[0]`, `path[1]`, …; several axes of inputs or outputs count as
    one. Parameters that train in full are left out.

    Args:
      method, trainable: what `method.init` gave, or what it became in training.
      params: the base's parameters.
      name: what the adapter is called in results.

    Raises:
      RequestError: the method's change is not low-rank (DoRA, full fine-tuning: take
        `lj.analysis.kernel_svd` of the difference), or nothing is adapted.

    >>> import lora_jax as lj
    >>> params = {"w": jax.numpy.ones((6, 4))}
    >>> method = lj.LoRA(targets="w", rank=2, alpha=4)
    >>> factors_of(method, method.init(jax.random.key(0), params)[0], params).factors["w"].shape
    (6, 4)
    """
    found = {}
    for entry_name, part in _parts_of(method, trainable, params):
        site = part.site
        a = np.asarray(part.a).reshape(site.size("s"), site.size("i"), -1)
        b = np.asarray(part.b).reshape(site.size("s"), -1, site.size("o"))
        for layer, own in enumerate(_names_of(entry_name, site)):
            found[own] = Factors(a[layer], b[layer], 1.0)
    if not found:
        raise RequestError(
            f"{type(method).__name__} adapts no matrix here; there is nothing to analyse"
        )
    return AdapterFactors(name=name, factors=found)


def kernels_of(method: Method, trainable: Trainable, params: PyTree) -> Kernels:
    """W of the matrices that `factors_of` names, for `profile_adapter`. Raises as that does.

    >>> import lora_jax as lj
    >>> params = {"w": jax.numpy.ones((6, 4))}
    >>> method = lj.LoRA(targets="w", rank=2, alpha=4)
    >>> trainable = method.init(jax.random.key(0), params)[0]
    >>> adapter = factors_of(method, trainable, params)
    >>> kernels_of(method, trainable, params)(adapter, "w").shape
    (6, 4)
    """
    flat = dict(trees.flatten(params, is_leaf=is_adapted).items())
    places = {
        own: (part.site, layer)
        for name, part in _parts_of(method, trainable, params)
        for layer, own in enumerate(_names_of(name, part.site))
    }

    def kernel(adapter: AdapterFactors, module: str) -> np.ndarray:
        if module not in places:
            raise RequestError(
                f"the base has no matrix {module!r}; {trees.nearest(module, places)}"
            )
        site, layer = places[module]
        kernel = flat[site.path]
        kernel = kernel.dequantize() if isinstance(kernel, NF4Weight) else kernel
        whole = np.asarray(site.cut(kernel), np.float32)
        order = [n for role in "sio" for n, own in enumerate(site.roles) if own == role]
        sizes = tuple(site.size(role) for role in "sio")
        return whole.transpose(order).reshape(sizes)[layer]

    return kernel


def _parts_of(method: Method, trainable: Trainable, params: PyTree):
    """`(name, LowRank)` of every adapter. Raises `RequestError` where one is not low-rank."""
    if isinstance(method, UniLoRA):
        method, trainable = method.to_lora(trainable, params)
    if isinstance(method, IntrinsicDimension):
        raise RequestError(
            "what a random subspace changes is not low-rank; take lj.analysis.kernel_svd of the "
            "merged parameters' differences"
        )
    flat = dict(trees.flatten(params, is_leaf=is_adapted).items())
    changes = Changes(flat)
    for name, entry in trainable.items():
        if path_of(name) not in flat:
            raise RequestError(
                f"the adapter is of {name!r}, which the parameters do not have; give the params "
                "it was trained on"
            )
        changes.add(method, name, entry, 1.0)
    for name, parts in changes.low_rank.items():
        yield from ((name, part) for part in parts)


def _names_of(name: str, site: Site) -> list[str]:
    """A name for each matrix of an adapter: of stacked ones with the layer."""
    return [f"{name}[{n}]" for n in range(site.size("s"))] if site.sizes("s") else [name]


def select(adapter: AdapterFactors, pattern: str) -> AdapterFactors:
    """The matrices whose name contains a match of the regular expression. Raises `RequestError`."""
    try:
        expression = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise RequestError(f"{pattern!r} is no regular expression: {error}") from error
    kept = {name: one for name, one in adapter.factors.items() if expression.search(name)}
    if not kept:
        near = trees.nearest(pattern, adapter.factors)
        raise RequestError(f"no matrix of {adapter.name} matches {pattern!r}; {near}")
    return dataclasses.replace(adapter, factors=kept)


def profile_adapter(
    adapter: AdapterFactors,
    kernel: Kernels | None = None,
    *,
    on_progress: Progress | None = None,
) -> list[MatrixProfile]:
    """Each matrix of an adapter, in the file's order, compared with its base where that is given.

    Args:
      adapter: the factors of its matrices.
      kernel: `kernel(adapter, module)` is W: `BaseKernels.kernel`, or what `kernels_of` gives. What
        it raises is raised.
      on_progress: called with the name of each matrix after it.
    """
    found = []
    for module, factors in adapter.factors.items():
        weight = None if kernel is None else np.asarray(kernel(adapter, module), np.float32)
        found.append(_profile(module, factors, weight))
        if on_progress:
            on_progress(module)
    return found


def _profile(module: str, factors: Factors, weight: np.ndarray | None) -> MatrixProfile:
    a, b = _float(factors.a), _float(factors.b)
    delta = delta_svd(a, b, factors.scale)
    with_base: dict[str, Any] = {}
    if weight is not None:
        k, base = min(factors.rank, *factors.shape), kernel_svd(weight)
        table7 = amplification_of(delta, jnp.asarray(weight), k, kernel_s=base.s)
        bases = (svd.basis("input")[:, :NUM_DIRECTIONS] for svd in (base, delta))
        tuned = kernel_svd(weight + factors.scale * a @ b)
        intruders = intruders_of(base, tuned, INTRUDER_COSINE, NUM_INTRUDERS, "output")
        with_base = {
            "amplification": jax.tree.map(float, table7),
            "kernel_similarity": np.asarray(basis_similarity(*bases)),
            "intruders": int(intruders.count),
        }
    return MatrixProfile(
        module=module,
        shape=factors.shape,
        rank=factors.rank,
        s=np.asarray(delta.s),
        stable_rank=float(stable_rank(delta.s)),
        entropy_rank=float(entropy_rank(delta.s)),
        energy_rank=int(energy_rank(delta.s)),
        **with_base,
    )


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
    if num_directions < 1:
        raise RequestError(f"num_directions is {num_directions}; give at least 1")
    found, unlike = [], []
    for module in filter(other.factors.__contains__, one.factors):
        first, second = one.factors[module], other.factors[module]
        if first.shape != second.shape:
            unlike.append(module)
        else:
            found.append(_compare(module, first, second, num_directions))
        if on_progress:
            on_progress(module)
    alone = sorted(one.factors.keys() ^ other.factors.keys())
    return Pair(one.name, other.name, tuple(found), tuple(alone), tuple(unlike))


def _compare(module: str, one: Factors, other: Factors, num_directions: int) -> PairProfile:
    svds = [delta_svd(_float(x.a), _float(x.b), x.scale) for x in (one, other)]
    spaces = ("input", "output")
    bases = {space: [svd.basis(space)[:, :num_directions] for svd in svds] for space in spaces}
    grids = {space: np.asarray(basis_similarity(*some)) for space, some in bases.items()}
    inputs, outputs = (shared_where_possible(*some) for some in bases.values())
    (r1, r2), (d_in, d_out) = grids["input"].shape, one.shape
    return PairProfile(
        module=module,
        shape=one.shape,
        **grids,
        expected=np.asarray(expected_similarity(r1, r2, d_in)),
        expected_output=np.asarray(expected_similarity(r1, r2, d_out)),
        highest=np.maximum(_highest(r1, r2, d_in), _highest(r1, r2, d_out)),
        shared=(inputs[0], outputs[0]),
        shared_above=(inputs[1], outputs[1]),
    )


@functools.cache
def _highest(num1: int, num2: int, dimension: int) -> np.ndarray:
    key = jax.random.key(0)
    samples = sample_similarity(key, num1, num2, dimension, num_samples=NUM_SAMPLES)
    return np.asarray(samples.max(axis=0))


def _float(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float64 if array.dtype == np.float64 else np.float32)
