"""How much two adapters' subspaces have in common: φ of Hu et al. 2021, Section 7.2 and Appendix G.

φ(i, j) = ‖U₁ⁱᵀ U₂ʲ‖²_F / min(i, j), where Uⁱ are the first i singular vectors: the mean squared
cosine of the principal angles, 1 where the smaller space lies in the larger one, 0 where they are
orthogonal. With p = min(i, j) and the projection metric d(U₁ⁱ, U₂ʲ) = √(p − Σ cos²θ) (Ham & Lee
2008) it is φ = 1 − d²/p; the paper's Appendix G prints (1 − d²)/p.

Two random subspaces of R^d have E[φ] = max(i, j)/d, so that a figure of φ without that baseline
shows nothing: at d = 64 two random spaces of 32 directions already have 0.5 in common.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from lora_jax.analysis import formulas
from lora_jax.analysis.factors import delta_svd, is_there, kernel_svd, wide
from lora_jax.core.errors import RequestError


@jax.jit
def subspace_similarity(a1: jax.Array, a2: jax.Array) -> jax.Array:
    """φ(i, j) of the spaces that the columns of two matrices span, for all i and j at once.

    Singular values of 0 span nothing, so that there φ stays below 1. Source: Hu et al. 2021, (4).

    Args:
      a1, a2: `(…, d, r1)` and `(…, d, r2)`: LoRA's `a` (the spaces of inputs that are read), or `b`
        transposed (of outputs that are written).

    Returns:
      `(…, r1, r2)`, float32 or wider: [i - 1, j - 1] for the first i and j singular vectors.

    Raises:
      RequestError: d differs.

    >>> a = jnp.eye(4)[:, :2] * jnp.array([2.0, 1.0])
    >>> subspace_similarity(a, a)
    Array([[1., 1.],
           [1., 1.]], dtype=float32)
    >>> subspace_similarity(a, jnp.eye(4)[:, 2:])
    Array([[0., 0.],
           [0., 0.]], dtype=float32)
    """
    return basis_similarity(column_basis(a1), column_basis(a2))


@functools.partial(jax.jit, static_argnames="space")
def delta_subspace_similarity(
    a1: jax.Array, b1: jax.Array, a2: jax.Array, b2: jax.Array, *, space: str = "input"
) -> jax.Array:
    """φ(i, j) of the singular vectors of ΔW₁ = a₁b₁ and ΔW₂ = a₂b₂.

    Unlike `a` alone, ΔW does not change when (a, b) becomes (a·M, M⁻¹·b).

    Args:
      a1, b1, a2, b2: `a (…, d_in, r)` and `b (…, r, d_out)` of each adapter.
      space: "input" (left vectors of a·b, the paper's right ones of B·A) or "output".

    Returns:
      `(…, r1, r2)`, as `subspace_similarity` does.

    Raises:
      RequestError: the shapes do not fit, or another `space`.

    >>> key = jax.random.key(0)
    >>> a, b = jax.random.normal(key, (6, 2)), jax.random.normal(key, (2, 5))
    >>> mixed = a @ jnp.array([[1.0, 2.0], [0.0, 1.0]])
    >>> unmixed = jnp.array([[1.0, -2.0], [0.0, 1.0]]) @ b
    >>> phi = delta_subspace_similarity(a, b, mixed, unmixed)
    >>> round(float(phi[0, 0]), 4), round(float(phi[1, 1]), 4)
    (1.0, 1.0)
    """
    return basis_similarity(delta_svd(a1, b1).basis(space), delta_svd(a2, b2).basis(space))


@functools.partial(jax.jit, static_argnames=("space", "num_directions"))
def kernel_subspace_similarity(
    kernel1: jax.Array, kernel2: jax.Array, *, space: str = "input", num_directions: int = 64
) -> jax.Array:
    """φ(i, j) of the first singular vectors of two dense kernels `(…, d_in, d_out)`.

    With W and ΔW it is Figure 8 of Hu et al. 2021 (numbered 7 in their first version): whether what
    was learned lies in directions that W has already.

    Args:
      kernel1, kernel2: of the same width in `space`.
      space: "input" or "output".
      num_directions: φ of at most so many directions of each.

    Returns:
      `(…, n1, n2)`, as `subspace_similarity` does.

    Raises:
      RequestError: widths that differ, another `space`, or a number below 1.
    """
    if num_directions < 1:
        raise RequestError(f"num_directions is {num_directions!r}; give at least 1")
    bases = (kernel_svd(kernel).basis(space) for kernel in (kernel1, kernel2))
    return basis_similarity(*(basis[..., :num_directions] for basis in bases))


@jax.jit
def basis_similarity(u1: jax.Array, u2: jax.Array) -> jax.Array:
    """φ(i, j) `(…, r1, r2)` of orthonormal columns `u1 (…, d, r1)`, `u2 (…, d, r2)`."""
    u1, u2 = wide(u1), wide(u2)
    if u1.shape[-2] != u2.shape[-2]:
        raise RequestError(
            f"the spaces are of {u1.shape[-2]} and {u2.shape[-2]} dimensions ({u1.shape}, "
            f"{u2.shape}); compare adapters of the same kernel, or of kernels of the same width"
        )
    return formulas.similarity(jnp.einsum("...di,...dj->...ij", u1, u2))


def expected_similarity(num1: int, num2: int, dimension: int) -> jax.Array:
    """E[φ(i, j)] = max(i, j) / d of independent random subspaces, as the grid `(num1, num2)`.

    E‖U₁ⁱᵀU₂ʲ‖² = ij/d, since each of the ij squared cosines of random directions has mean 1/d.
    Raises `RequestError` for more directions than dimensions.

    >>> expected_similarity(1, 2, 8)
    Array([[0.125, 0.25 ]], dtype=float32)
    """
    _check_numbers(num1, num2, dimension)
    return jnp.asarray(formulas.expected_similarity(num1, num2, dimension), float)


@functools.partial(jax.jit, static_argnames=("num1", "num2", "dimension", "num_samples"))
def sample_similarity(
    key: jax.Array, num1: int, num2: int, dimension: int, *, num_samples: int = 32
) -> jax.Array:
    """φ of `num_samples` pairs of random subspaces, `(num_samples, num1, num2)`: their spread.

    The spaces are those of Gaussian matrices. The first may as well be the first axes, so that what
    counts of the second are the first `num1` rows of its Q = G R⁻¹: these rows of G, and R from
    GᵀG, whose other part is Wishart and drawn as such (Bartlett 1933): the cost does not grow with
    `dimension`.

    Args:
      key: a JAX key.
      num1, num2: directions of the two spaces of each pair.
      dimension: d of the space that both lie in.
      num_samples: pairs that are drawn.

    Raises:
      RequestError: more directions than dimensions, or none.
    """
    _check_numbers(num1, num2, dimension)
    others = dimension - num1  # rows of G that are not looked at

    def one(key):
        of_rows, of_rest, of_squares = jax.random.split(key, 3)
        rows = jax.random.normal(of_rows, (num1, num2))
        if others >= num2:
            lower = jnp.tril(jax.random.normal(of_rest, (num2, num2)), -1)
            freedom = others - jnp.arange(num2, dtype=lower.dtype)
            root = lower + jnp.diag(jnp.sqrt(jax.random.chisquare(of_squares, freedom)))
            rest = root @ root.T
        else:
            g = jax.random.normal(of_rest, (others, num2))
            rest = g.T @ g
        r = jnp.linalg.cholesky(rows.T @ rows + rest).T
        q = jax.scipy.linalg.solve_triangular(r.T, rows.T, lower=True).T
        return formulas.similarity(q)

    return jax.lax.map(one, jax.random.split(key, num_samples))


def column_basis(a: jax.Array) -> jax.Array:
    """Orthonormal columns `(…, d, r)` of `a`'s space by its singular values; zeros where it has
    none."""
    a = wide(a)
    u, s, _ = jnp.linalg.svd(a, full_matrices=False)
    return jnp.where(is_there(s, a.shape[-2])[..., None, :], u, 0)


def _check_numbers(num1: int, num2: int, dimension: int) -> None:
    if min(num1, num2) < 1 or max(num1, num2) > dimension:
        raise RequestError(
            f"{num1} and {num2} directions in {dimension} dimensions; give at least 1 and at most "
            "the dimension"
        )
