"""How many directions a change of a kernel really has, and which of them the kernel had not."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from lora_jax.analysis import formulas
from lora_jax.analysis.factors import SVD, kernel_svd
from lora_jax.analysis.formulas import Intruders as Intruders
from lora_jax.core.dtypes import float32_or_wider
from lora_jax.core.errors import RequestError


@jax.jit
def stable_rank(s: jax.Array) -> jax.Array:
    """‖ΔW‖²_F / ‖ΔW‖²₂ from singular values `s (…, k)`; `(…)`, 0 for a change of 0.

    Between 1 and the rank; small singular values hardly count. Source: Rudelson & Vershynin 2007
    (arXiv:math/0503442), "numerical rank".

    >>> stable_rank(jnp.array([2.0, 2.0, 0.0])).item()
    2.0
    """
    return formulas.stable_rank(_checked(s))


@jax.jit
def entropy_rank(s: jax.Array) -> jax.Array:
    """exp(H(p)), p = s / Σs, from singular values `s (…, k)`; `(…)`, 0 for a change of 0.

    Source: Roy & Vetterli 2007, "The effective rank", EUSIPCO.

    >>> round(entropy_rank(jnp.array([1.0, 1.0, 1.0, 0.0])).item(), 4)
    3.0
    """
    return formulas.entropy_rank(_checked(s))


@functools.partial(jax.jit, static_argnames="share")
def energy_rank(s: jax.Array, share: float = 0.9) -> jax.Array:
    """The fewest singular values that hold `share` of Σs², from `s (…, k)` descending; int32.

    0 for a change of 0. Source: Biderman et al. 2024, "LoRA Learns Less and Forgets Less"
    (arXiv:2405.09673), Section 4.6, with 90%. Raises `RequestError` for a share outside (0, 1].

    >>> energy_rank(jnp.array([4.0, 1.0, 0.1])).item(), energy_rank(jnp.array([1.0, 1.0])).item()
    (1, 2)
    """
    if not 0.0 < share <= 1.0:
        raise RequestError(f"share is {share!r}; it must be above 0 and at most 1")
    return formulas.energy_rank(_checked(s), share)


@functools.partial(jax.jit, static_argnames=("threshold", "num_directions", "space"))
def intruder_dimensions(
    kernel: jax.Array,
    tuned: jax.Array,
    *,
    threshold: float = 0.5,
    num_directions: int = 10,
    space: str = "output",
) -> Intruders:
    """Singular vectors of the tuned kernel that are like none of the kernel's own.

    Of the first `num_directions` singular vectors y of `tuned` those are intruders whose largest
    |cos(y, x)| over all singular vectors x of `kernel` is below `threshold`. Source: Shuttleworth
    et al. 2024 (arXiv:2410.21228), Algorithm 1, k = 10, ε = 0.5.

    Args:
      kernel, tuned: `(…, d_in, d_out)` before and after training.
      threshold: ε, above 0 and at most 1.
      num_directions: k, at least 1.
      space: "output" as in the source (left vectors of (out, in) matrices), or "input".

    Returns:
      `Intruders` of their number and the cosines.

    Raises:
      RequestError: shapes that differ, or a value out of range.

    >>> kernel = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
    >>> intruder_dimensions(kernel, kernel).count.item()
    0
    """
    if jnp.shape(kernel) != jnp.shape(tuned):
        raise RequestError(
            f"the kernel is {jnp.shape(kernel)}, tuned it is {jnp.shape(tuned)}; give the same "
            "kernel before and after"
        )
    return intruders_of(kernel_svd(kernel), kernel_svd(tuned), threshold, num_directions, space)


def intruders_of(
    base: SVD, tuned: SVD, threshold: float, num_directions: int, space: str
) -> Intruders:
    """`intruder_dimensions` of SVDs that are there already."""
    if num_directions < 1 or not 0.0 < threshold <= 1.0:
        raise RequestError(
            f"num_directions is {num_directions!r}, threshold {threshold!r}; give at least 1 "
            "direction and a cosine above 0, at most 1"
        )
    return formulas.intruders_between(base, tuned, threshold, num_directions, space)


def _checked(s: jax.Array) -> jax.Array:
    s = jnp.asarray(s)
    if not s.ndim or not jnp.issubdtype(s.dtype, jnp.floating):
        raise RequestError(f"got {s.dtype} of shape {s.shape}; give singular values (…, k)")
    return s.astype(float32_or_wider(s.dtype))
