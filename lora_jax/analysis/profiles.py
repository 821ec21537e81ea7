"""What an adapter learned, matrix by matrix, and against its base: `lora-jax analyze`.

NumPy alone: neither reading factors nor looking at them needs JAX, whose import takes longer than
the work. Factors are multiplied out in float64, and what is below the rounding of their own dtype
(float32 or wider) counts as 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from lora_jax.analysis import formulas
from lora_jax.analysis.formulas import SVD, Amplification
from lora_jax.peft.factors import AdapterFactors, Factors

# φ is shown of so many directions at most: the grid of r = 256 has 65,536 cells.
NUM_DIRECTIONS = 64
# Shuttleworth et al. 2024: k and ε.
NUM_INTRUDERS, INTRUDER_COSINE = 10, 0.5

Progress = Callable[[str], None]
# W `(d_in, d_out)` of one matrix of an adapter.
Kernels = Callable[[AdapterFactors, str], Any]


@dataclasses.dataclass(frozen=True)
class MatrixProfile:
    """What an adapter learned in one matrix `(d_in, d_out)`.

    `s (r,)` are ΔW's singular values and the ranks are theirs (see `spectra`; `energy_rank` is of
    90%). Where the base is known, `amplification` is Table 7 for all r directions,
    `kernel_similarity (n, k)` φ of W's first n directions of inputs and ΔW's first k (Figure 8),
    `intruders` the number among the first `NUM_INTRUDERS` of W + ΔW's, and `dora_gain` the
    smallest, median and largest gain by which DoRA scales the columns of W + ΔW.
    """

    module: str
    shape: tuple[int, int]
    rank: int
    s: np.ndarray
    stable_rank: float
    entropy_rank: float
    energy_rank: int
    energy_rank_99: int
    amplification: Amplification | None = None
    kernel_similarity: np.ndarray | None = None
    intruders: int | None = None
    dora_gain: tuple[float, float, float] | None = None

    @property
    def delta_norm(self) -> float:
        """‖ΔW‖_F."""
        return float(np.sqrt(np.sum(np.square(self.s))))


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


def with_gains(adapter: AdapterFactors, kernel: Kernels) -> AdapterFactors:
    """DoRA's factors with the gain m / ‖W + ΔW‖ of each output in `b`: ΔW as the model has it.

    The gain scales W's columns, too; that part is no low-rank change and is left out. Adapters
    without magnitudes are returned as they are. Raises as `kernel` does.
    """
    if all(one.magnitude is None for one in adapter.factors.values()):
        return adapter
    gained = {
        module: _gained(one, None if one.magnitude is None else kernel(adapter, module))
        for module, one in adapter.factors.items()
    }
    return dataclasses.replace(adapter, factors=gained)


def _gained(factors: Factors, weight: np.ndarray | None) -> Factors:
    if factors.magnitude is None or weight is None:
        return factors
    tuned = np.asarray(weight, np.float32) + _product(factors)
    norms = np.linalg.norm(tuned.astype(np.float64), axis=0)
    magnitude = np.asarray(factors.magnitude, np.float64)
    gain = np.divide(magnitude, norms, out=np.zeros_like(norms), where=norms > 0)
    return dataclasses.replace(factors, b=factors.b * gain, magnitude=None, gain=gain)


def _product(factors: Factors) -> np.ndarray:
    """ΔW in float32."""
    a, b = np.asarray(factors.a, np.float32), np.asarray(factors.b, np.float32)
    return np.float32(factors.scale) * (a @ b)


def _profile(module: str, factors: Factors, weight: np.ndarray | None) -> MatrixProfile:
    factors = _gained(factors, weight)
    a, b, eps = _wide(factors)
    s = formulas.product_singular_values(a, b, factors.scale, eps)
    return MatrixProfile(
        module=module,
        shape=factors.shape,
        rank=factors.rank,
        s=s,
        stable_rank=float(formulas.stable_rank(s)),
        entropy_rank=float(formulas.entropy_rank(s)),
        energy_rank=int(formulas.energy_rank(s, 0.9)),
        energy_rank_99=int(formulas.energy_rank(s, 0.99)),
        **({} if weight is None else _against(factors, weight)),
    )


def _against(factors: Factors, weight: np.ndarray) -> dict[str, Any]:
    """What a profile says of ΔW and W, in float32: W is a large matrix."""
    delta = SVD(*(one.astype(np.float32) for one in delta_of(factors)))
    k, base = min(factors.rank, *factors.shape), formulas.thin_svd(weight)
    rng = np.random.default_rng(0)
    first, second = (
        np.linalg.qr(rng.standard_normal((d, k), np.float32))[0] for d in factors.shape
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        table7 = formulas.amplification_between(delta, weight, k, base.s, (first, second))
    bases = (svd.basis("input")[:, :NUM_DIRECTIONS] for svd in (base, delta))
    own, other = (np.asarray(basis, np.float64) for basis in bases)
    gain = factors.gain
    tuned = (weight if gain is None else weight * gain.astype(np.float32)) + _product(factors)
    intruders = formulas.intruders_between(
        base, formulas.thin_svd(tuned), INTRUDER_COSINE, NUM_INTRUDERS, "output"
    )
    return {
        "amplification": Amplification(*map(float, table7)),
        "kernel_similarity": formulas.similarity(own.T @ other),
        "intruders": int(intruders.count),
        "dora_gain": None if gain is None else tuple(map(float, np.quantile(gain, [0, 0.5, 1]))),
    }


def delta_of(factors: Factors) -> SVD:
    """The SVD of ΔW in float64; directions that are rounding of the factors' dtype are zeros.

    >>> delta_of(Factors(np.array([[3.0], [4.0]]), np.array([[0.0, 2.0]]), 1.0)).s.round(4)
    array([10.])
    """
    a, b, eps = _wide(factors)
    svd = formulas.product_svd(a, b, factors.scale, eps)
    return SVD(svd.basis("input", eps=eps), svd.s, svd.basis("output", eps=eps))


def _wide(factors: Factors) -> tuple[np.ndarray, np.ndarray, float]:
    """`a` and `b` in float64, and the rounding of what they were stored in."""
    is_double = factors.a.dtype == factors.b.dtype == np.float64
    eps = float(np.finfo(np.float64 if is_double else np.float32).eps)
    return np.asarray(factors.a, np.float64), np.asarray(factors.b, np.float64), eps
