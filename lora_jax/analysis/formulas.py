"""The formulas of this folder, for NumPy's arrays and JAX's alike; JAX is not imported here.

Each takes the functions of the arrays it is given (`__array_namespace__`, NEP 47), so what `lj`
computes in a compiled program and what `lora-jax analyze` computes of files is one piece of code.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from lora_jax.core.errors import RequestError

Array = Any  # jax.Array or np.ndarray: what comes in goes out
SPACES = ("input", "output")


class SVD(NamedTuple):
    """`u (…, d_in, k)`, `s (…, k)` descending, `v (…, d_out, k)`: kernel = u @ diag(s) @ v^T."""

    u: Array
    s: Array
    v: Array

    def basis(self, space: str, *, eps: float | None = None) -> Array:
        """`u` for "input", `v` for "output"; directions of singular value 0 are zero.

        They are arbitrary: what has not been learned shares nothing with anything. A value is 0 if
        it is below the rounding of the largest, eps · max(d_in, d_out) · s[0]. `eps` is that of
        the singular values' dtype unless it is given.
        """
        if space not in SPACES:
            raise RequestError(f"space is {space!r}; choose one of {', '.join(SPACES)}")
        vectors = self.u if space == "input" else self.v
        size = max(self.u.shape[-2], self.v.shape[-2])
        xp = vectors.__array_namespace__()
        return xp.where(is_there(self.s, size, eps)[..., None, :], vectors, 0)


class Amplification(NamedTuple):
    """One row of Table 7, each `(…)`: ‖UᵀWV‖_F with U and V from three places, and two norms.

    `from_delta`, `from_kernel` and `from_random` are what W does between the first r singular
    vectors of ΔW, those of W itself (the most that r directions can hold), and random ones.
    `factor` is ΔW's own norm in its first r directions, ‖ΔW‖_F in the paper, where r is its rank,
    over `from_delta`: how much stronger ΔW is in its own directions than W was.

    The null is a ΔW of random directions and the same norm. `expected` = ‖W‖_F r / √(d_in d_out) is
    the root mean square of ‖UᵀWV‖_F over random U and V, `random_factor` the amplification that it
    gives. `over_random` = factor / random_factor = expected / from_delta is the amplification over
    random: 1 for random directions, below 1 where W is strong in ΔW's directions, above 1 where it
    is weak. `factor` falls as 1/r for random directions of the same norm, so compare `over_random`
    between ranks. At r = 1, ‖UᵀWV‖ of random directions varies as much as its mean.
    """

    from_delta: Array
    from_kernel: Array
    from_random: Array
    delta_norm: Array
    kernel_norm: Array
    factor: Array
    expected: Array
    random_factor: Array
    over_random: Array


class Intruders(NamedTuple):
    """`count (…)` int32 of the first k directions; `cosines (…, k)`, each one's nearest in W."""

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride] tuple.count
    cosines: Array


def is_there(s: Any, size: int, eps: float | None = None) -> Any:
    """Which of `s (…, k)`, descending, are not 0 to the rounding of a matrix of `size` rows."""
    least: Any = s.__array_namespace__().finfo(s.dtype).eps if eps is None else eps
    return (s > s[..., :1] * size * least) & (s > 0)


def thin_svd(kernel: Any) -> SVD:
    """The thin SVD of `kernel (…, d_in, d_out)`."""
    xp = kernel.__array_namespace__()
    u, s, vh = xp.linalg.svd(kernel, full_matrices=False)
    return SVD(u, s, xp.swapaxes(vh, -1, -2))


def product_svd(a: Any, b: Any, scale: Any, eps: float | None = None) -> SVD:
    """The thin SVD of `scale * a @ b` by QR of both factors; see `factors.delta_svd`."""
    xp = a.__array_namespace__()
    q_a, r_a = _qr(a)
    q_b, r_b = _qr(xp.swapaxes(b, -1, -2))
    u, s, vh = xp.linalg.svd(r_a @ xp.swapaxes(r_b, -1, -2), full_matrices=False)
    s = _without_rounding(s, r_a, r_b, a.shape[-1], eps)
    scale = xp.asarray(scale, dtype=s.dtype)[..., None]
    scale = scale.reshape((1,) * (s.ndim - scale.ndim) + scale.shape)
    v = q_b @ xp.swapaxes(vh, -1, -2)
    return SVD(q_a @ u, s * xp.abs(scale), v * xp.where(scale < 0, -1, 1)[..., None, :])


def product_singular_values(a: Any, b: Any, scale: float, eps: float | None = None) -> Any:
    """`product_svd(…).s` in a fraction of its time: the Q of neither factor is formed."""
    xp = a.__array_namespace__()
    r_a, r_b = (_qr(one, mode="r") for one in (a, xp.swapaxes(b, -1, -2)))
    s = xp.linalg.svd(r_a @ xp.swapaxes(r_b, -1, -2), compute_uv=False)
    return _without_rounding(s, r_a, r_b, a.shape[-1], eps) * abs(scale)


def _qr(matrices: Any, mode: str = "reduced") -> Any:
    qr = functools.partial(matrices.__array_namespace__().linalg.qr, mode=mode)
    if isinstance(matrices, np.ndarray):
        return qr(matrices)
    from lora_jax.core.stacks import one_by_one  # of JAX's arrays: files need none of it

    return one_by_one(qr, matrices)


def _without_rounding(s: Any, r_a: Any, r_b: Any, rank: int, eps: float | None) -> Any:
    """0 for what is left where large factors cancel, up to eps · r · ‖a‖ ‖b‖."""
    xp = s.__array_namespace__()
    least: Any = xp.finfo(s.dtype).eps if eps is None else eps
    norms = xp.linalg.norm(r_a, axis=(-2, -1)) * xp.linalg.norm(r_b, axis=(-2, -1))
    return xp.where(s > least * rank * norms[..., None], s, 0)


def similarity(inner: Any) -> Any:
    """φ(i, j) `(…, r1, r2)` from `u1ᵀ @ u2`, the cosines of orthonormal columns."""
    xp = inner.__array_namespace__()
    total = xp.cumsum(xp.cumsum(inner * inner, axis=-2), axis=-1)
    i, j = xp.arange(1, inner.shape[-2] + 1), xp.arange(1, inner.shape[-1] + 1)
    smaller = xp.minimum(i[:, None], j[None]).astype(total.dtype)
    return total / smaller.reshape((1,) * (total.ndim - 2) + smaller.shape)


def expected_similarity(num1: int, num2: int, dimension: int) -> np.ndarray:
    """E[φ(i, j)] = max(i, j) / d of independent random subspaces, `(num1, num2)`."""
    i, j = np.arange(1.0, num1 + 1)[:, None], np.arange(1.0, num2 + 1)[None]
    return np.maximum(i, j) / dimension


def stable_rank(s: Any) -> Any:
    """‖ΔW‖²_F / ‖ΔW‖²₂ from `s (…, k)`; 0 for a change of 0."""
    squares = s * s
    return _share(squares.sum(-1), squares.max(-1, initial=0.0))


def entropy_rank(s: Any) -> Any:
    """exp(H(p)), p = s / Σs, from `s (…, k)`; 0 for a change of 0."""
    xp = s.__array_namespace__()
    total = s.sum(-1)
    p = _share(s, total[..., None])
    entropy = -xp.sum(xp.where(p > 0, p * xp.log(xp.where(p > 0, p, 1.0)), 0.0), axis=-1)
    return xp.where(total > 0, xp.exp(entropy), 0.0)


def energy_rank(s: Any, share: float) -> Any:
    """The fewest of `s (…, k)`, descending, that hold `share` of Σs²; int32."""
    xp = s.__array_namespace__()
    squares = s * s
    total = squares.sum(-1, keepdims=True)
    # What is left below a place, not what is reached at it: a sum of small squares onto a large one
    # may never reach the total in float32.
    left = xp.cumsum(squares[..., ::-1], axis=-1)[..., ::-1]
    return xp.sum((left > (1.0 - share) * total) & (squares > 0), axis=-1).astype("int32")


def amplification_between(
    delta: SVD, kernel: Any, rank: int, kernel_s: Any, random: tuple[Any, Any]
) -> Amplification:
    """`Amplification` of ΔW's first `rank` directions; `random` are bases of random ones."""
    xp = kernel.__array_namespace__()
    d_in, d_out = kernel.shape[-2:]
    own = [delta.basis(space)[..., :rank] for space in SPACES]
    from_delta = projected_norm(kernel, *own)
    delta_norm, inside = norm(delta.s, -1), norm(delta.s[..., :rank], -1)
    kernel_norm = norm(kernel)
    # E‖UᵀWV‖²_F = Σ E(uᵢᵀWvⱼ)², r² terms of ‖W‖²_F / (d_in d_out) each.
    expected = kernel_norm * rank / math.sqrt(d_in * d_out)
    return Amplification(
        from_delta=from_delta,
        from_kernel=norm(kernel_s[..., :rank], -1),
        from_random=projected_norm(kernel, *random),
        delta_norm=delta_norm,
        kernel_norm=kernel_norm,
        # A ΔW where W is 0 amplifies beyond all bounds; no ΔW amplifies nothing.
        factor=xp.where(inside > 0, inside / from_delta, 0.0),
        expected=expected,
        random_factor=xp.where(inside > 0, inside / expected, 0.0),
        over_random=xp.where(inside > 0, expected / from_delta, 0.0),
    )


def projected_norm(kernel: Any, u: Any, v: Any) -> Any:
    """‖uᵀ @ kernel @ v‖_F `(…)`."""
    xp = kernel.__array_namespace__()
    return norm(xp.swapaxes(u, -1, -2) @ kernel @ v)


def intruders_between(
    base: SVD, tuned: SVD, threshold: float, number: int, space: str
) -> Intruders:
    """Those of the first `number` directions of `tuned` that are like none of `base`'s."""
    x, y = base.basis(space), tuned.basis(space)[..., :number]
    xp = x.__array_namespace__()
    cosines = xp.max(xp.abs(xp.swapaxes(y, -1, -2) @ x), axis=-1)
    count = xp.sum((cosines < threshold) & xp.any(y != 0, axis=-2), axis=-1)
    return Intruders(count.astype("int32"), cosines)


def norm(array: Any, axis: int | tuple[int, ...] = (-2, -1)) -> Any:
    """√Σx² over the axes."""
    xp = array.__array_namespace__()
    return xp.sqrt(xp.sum(array * array, axis=axis))


def _share(part: Any, whole: Any) -> Any:
    xp = whole.__array_namespace__()
    return xp.where(whole > 0, part / xp.where(whole > 0, whole, 1.0), 0.0)
