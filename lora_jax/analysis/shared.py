"""How many directions two subspaces have in common, and what a shared start explains of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.analysis.angles import LEVEL, count_shared
from lora_jax.analysis.angles import SharedDirections as SharedDirections
from lora_jax.analysis.factors import wide
from lora_jax.core.errors import RequestError


def shared_directions(
    u1: jax.Array | np.ndarray,
    u2: jax.Array | np.ndarray,
    *,
    level: float = LEVEL,
    num_removed: int = 0,
) -> SharedDirections:
    """How many directions two subspaces have in common beyond what random ones have.

    A sequential test of the principal angles, cos²θ₁ ≥ cos²θ₂ ≥ … (the squared singular values of
    U₁ᵀU₂). The k-th direction is shared if the k - 1 before it are and cos²θₖ exceeds the 1 - level
    quantile of the largest cos²θ of random subspaces of r1 - k + 1 and r2 - k + 1 directions in
    d - k + 1 dimensions, which is what is left without k - 1 shared ones. The quantile is exact for
    a single direction. Otherwise it is Johnstone's approximation. In simulations 0.2% to 1.6% of
    random pairs exceed the 1% quantile, the fewest where r1 or r2 is below 8.

    A shared direction is visible only if its cos² exceeds `thresholds[..., 0]`: 0.58 for 64 and 64
    directions in 384 dimensions, 0.11 for 8 and 8. Compare the first few directions to find weaker
    ones. Of planted directions among 64 in 384 dimensions (cos² 0.5 to 1), 97% to 100% of the
    counts are right. The number of peaks of `marginal_similarity` is no estimator: it is right only
    if the shared direction is a singular vector of both. If it is a mixture of several, one
    direction among 64 counts as 0 and eight as 14.

    The function runs on the host; it does not compile a program per shape.

    Args:
      u1, u2: orthonormal columns `(…, d, r1)` and `(…, d, r2)`, such as `SVD.basis` or
        `column_basis` return. Columns of zeros are no directions.
      level: how often random subspaces share a direction, above 0 and at most 0.1.
      num_removed: dimensions that `remove_directions` took out of both spaces.

    Returns:
      `SharedDirections` with p = min(r1, r2). `thresholds` are those of the tests in order, 1 where
      there is no direction.

    Raises:
      RequestError: shapes that do not fit, columns that are not orthonormal, a level out of range,
        or r1 + r2 > d - num_removed: such spaces always meet, and the test cannot tell this from
        what they share.

    Source: Johnstone 2008, "Multivariate analysis and Jacobi ensembles: largest eigenvalue,
    Tracy-Widom limits and rates of convergence" (arXiv:0803.3408), Theorem 1.

    Example:
      >>> basis = np.linalg.qr(np.random.default_rng(0).normal(size=(100, 15)))[0]
      >>> shared_directions(basis[:, :8], basis[:, 7:]).count.item()
      1
    """
    u1, u2 = np.asarray(wide(jnp.asarray(u1))), np.asarray(wide(jnp.asarray(u2)))
    if u1.shape[:-1] != u2.shape[:-1]:
        raise RequestError(
            f"the spaces are {u1.shape} and {u2.shape}; give (…, d, r1) and (…, d, r2)"
        )
    _check_orthonormal(u1)
    _check_orthonormal(u2)
    return count_shared(u1, u2, level=level, num_removed=num_removed)


def marginal_similarity(phi: jax.Array) -> jax.Array:
    """What the k-th direction of both spaces adds: k·φ(k, k) - (k - 1)·φ(k - 1, k - 1).

    φ(k, k) is cumulative: after a single shared direction it stays above its null for many k. The
    gain is large only at the k that completes the direction. Of random subspaces it is (2k - 1)/d.

    Args:
      phi: `(…, r1, r2)`, of `basis_similarity`, or the null of `expected_similarity`.

    Returns:
      `(…, min(r1, r2))`, [k - 1] for the k-th direction. Their sum is Σ cos²θ.

    Example:
      >>> from lora_jax.analysis import expected_similarity
      >>> marginal_similarity(expected_similarity(3, 3, 8)) * 8
      Array([1., 3., 5.], dtype=float32)
    """
    diagonal = jnp.diagonal(wide(phi), axis1=-2, axis2=-1)
    sums = diagonal * jnp.arange(1, diagonal.shape[-1] + 1, dtype=diagonal.dtype)
    return jnp.diff(sums, axis=-1, prepend=jnp.zeros_like(sums[..., :1]))


@jax.jit
def remove_directions(a: jax.Array, start: jax.Array) -> jax.Array:
    """`a` without its part in the space that the columns of `start` span: (I - P) a.

    It takes a shared initialisation out of a comparison. Two adapters that begin with the same
    columns a₀ have a = a₀ + δa, and share a₀'s space even if they learned nothing in common. Remove
    a₀ from both; what is left, (I - P)·δa·b, is what each learned to read outside of it. If they
    learned independently, these are independent subspaces of the d - rank(a₀) dimensions that are
    left: pass that rank to `shared_directions` as `num_removed`. What both learned to read within
    a₀'s space (through `b` alone) is not seen: it looks like the start. Adapters that also
    saw the same batches in the same order did not learn independently: columns that begin alike
    move alike at first. For nested starts, compare with the columns that the other has not:
    `a[:, k:]` and `b[k:]` of the wider one have a start of their own.

    Args:
      a: `(…, d, r)`, the trained `a`.
      start: `(…, d, k)`, the columns that both adapters began with: for nested initialisation those
        of the smaller one.

    Returns:
      `(…, d, r)`, float32 or wider. Directions that are left by rounding alone are 0: an `a` that
      was not trained has none.

    Raises:
      RequestError: d differs.

    Example:
      >>> a = jnp.eye(4)[:, :2]
      >>> float(jnp.abs(remove_directions(a, a)).max())
      0.0
      >>> remove_directions(a, a[:, :1]).sum().item()
      1.0
    """
    a, start = wide(a), wide(start)
    if a.shape[:-1] != start.shape[:-1]:
        raise RequestError(f"a is {a.shape}, the start {start.shape}; give those of one kernel")
    basis = _basis(start)
    rest = a
    for _ in range(2):  # the second time takes out the rounding of the first
        rest = rest - basis @ (jnp.swapaxes(basis, -1, -2) @ rest)
    u, s, vh = jnp.linalg.svd(rest, full_matrices=False)
    norm = jnp.linalg.norm(a, axis=(-2, -1))[..., None]
    s = jnp.where(s > norm * a.shape[-2] * jnp.finfo(s.dtype).eps, s, 0)
    return (u * s[..., None, :]) @ vh


def _basis(start: jax.Array) -> jax.Array:
    u, s, _ = jnp.linalg.svd(start, full_matrices=False)
    is_there = s > s[..., :1] * start.shape[-2] * jnp.finfo(s.dtype).eps
    return jnp.where(is_there[..., None, :], u, 0)


def _check_orthonormal(u: np.ndarray) -> None:
    gram = np.swapaxes(u, -1, -2) @ u
    present = np.any(u != 0, axis=-2)
    wanted = np.eye(u.shape[-1]) * present[..., None, :]
    if not np.all(np.abs(gram - wanted) < 1e-3):
        raise RequestError(
            f"the columns of {u.shape} are not orthonormal; take column_basis(a), or the basis of "
            "delta_svd(a, b)"
        )
