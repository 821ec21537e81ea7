"""Random maps from d numbers to D: the subspaces that intrinsic dimension is measured in.

θ = θ₀ + P θ_d with P (D, d) fixed and θ_d trained (Li et al. 2018, arXiv:1804.08838). P has columns
of unit norm, exactly or in expectation, that are nearly orthogonal: a step in θ_d is one of the
same length in θ, whatever d.

Fastfood (Le et al. 2013, arXiv:1408.3060; Li et al., Section S7) is P = c · (H G Π H B) cut to its
first D rows and d columns, with n = 2^⌈log₂ D⌉, H the n × n matrix of Walsh and Hadamard, B random
signs, Π a permutation, G Gaussian, and c = 1 / √(D Σg²). P is never formed: a product costs
O(n log n) operations and O(n) memory, forwards and back. Columns beyond d play no part, so that the
subspace of d lies in that of every larger d of the same key.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lora_jax.core.draws import partitionable
from lora_jax.core.dtypes import float32_or_wider
from lora_jax.core.errors import RequestError

# The transform works on axes of at most this size: a product with a small matrix for every seven
# doublings passes over memory less often than seven sums and differences.
_MOST = 128
# Those whose subspace of d lies in that of every larger d of the same key, at no cost: a dense P of
# the larger d would be formed.
NESTED = ("fastfood",)
# Signs are drawn so many at a time.
_BLOCK = 1024


@functools.partial(jax.jit, static_argnames="size")
def fastfood(theta: jax.Array, size: int, key: jax.Array) -> jax.Array:
    """P θ of a Fastfood projection, `theta (d,)` to `(size,)`, in float32 or theta's wider dtype.

    `key` draws B, Π and G, the same for every d, dtype and setting of x64. Differentiable in theta
    in reverse mode (`jax.grad`, `jax.vjp`): the adjoint is computed as fast as the product, and is
    its transpose. Raises `RequestError` for a d above the power of 2 that holds `size`.

    >>> fastfood(jnp.ones(3), 10, jax.random.key(0)).shape
    (10,)
    """
    theta, width = _wide(theta), _width(size)
    if not 1 <= theta.shape[0] <= width:
        raise RequestError(
            f"d is {theta.shape[0]}; a subspace of {size} parameters has 1 to {width} dimensions"
        )
    return _fastfood(size, theta.shape[0])(theta, key)


@functools.partial(jax.jit, static_argnames="size")
@partitionable()
def dense(theta: jax.Array, size: int, key: jax.Array) -> jax.Array:
    """P θ of a Gaussian P (size, d) with columns of norm 1, which is formed: for small networks.

    As in the code of Li et al. 2018 (uber-research/intrinsic-dimension), normalised over the whole
    network. Column k depends on the key and k alone.
    """
    theta = _wide(theta)
    _width(size)
    draw = lambda k: jax.random.normal(jax.random.fold_in(key, k), (size,), jnp.float32)  # noqa: E731
    rows = jax.vmap(draw)(jnp.arange(theta.shape[0], dtype=jnp.uint32)).astype(theta.dtype)
    return theta @ (rows / jnp.linalg.norm(rows, axis=1, keepdims=True))


@functools.partial(jax.jit, static_argnames="size")
@partitionable()
def grouped(theta: jax.Array, size: int, key: jax.Array) -> jax.Array:
    """P θ where each of the `size` rows of P has one entry that is not 0, in a random column.

    Column j holds 1/√n_j in its n_j rows, so that PᵀP is the identity: d groups of parameters move
    by one number each. O(size). Source: Li et al. 2025, "Uni-LoRA" (arXiv:2506.00799), Section 3.
    Unlike the others' its subspaces are not nested in d. Raises `RequestError` for a d above
    `size`, which would leave columns empty.

    >>> grouped(jnp.ones(2), 6, jax.random.key(0)).shape
    (6,)
    """
    theta, num = _wide(theta), theta.shape[0]
    if not 1 <= num <= size:
        raise RequestError(f"d is {num}; {size} parameters make 1 to {size} groups")
    # A random order, dealt out in turn: no group has two members more than another.
    column = _Order(key, _width(size)).among(size) % jnp.uint32(num)
    counts = (jnp.uint32(size - 1) - column) // jnp.uint32(num) + 1
    return theta[column] / jnp.sqrt(counts.astype(theta.dtype))


@jax.jit
def walsh_hadamard(x: jax.Array) -> jax.Array:
    """H @ x along the last axis, whose size is a power of 2; H is of ±1, not normalised.

    H is symmetric with H @ H = n. Sylvester's order.

    >>> walsh_hadamard(jnp.array([1.0, 2.0]))
    Array([ 3., -1.], dtype=float32)
    """
    width = x.shape[-1]
    if width < 1 or width & (width - 1):
        raise RequestError(f"the last axis of {x.shape} is {width}; it must be a power of 2")
    shape, done = x.shape, 1
    while done < width:
        own = min(_MOST, width // done)
        # H of a product of sizes is the Kronecker product of theirs: the last axis is transformed
        # and becomes the first, until each has been last once and all stand as they stood.
        x = x.reshape(*shape[:-1], width // own, own)
        x = jnp.matmul(x, _hadamard(own, x.dtype), precision=jax.lax.Precision.HIGHEST)
        x = jnp.swapaxes(x, -1, -2)
        done *= own
    return x.reshape(shape)


@functools.cache
def _fastfood(size: int, num: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The product as a function with a transpose of its own: a gather's own one is a scatter.

    θ has d numbers and then zeros, and row i of H's first m columns, m a power of 2, is row i mod m
    of the m × m matrix: the inner transform is one of m ≥ d numbers, read again and again.
    """
    width, inner = _width(size), _width(num)

    # The adjoint is traced outside the caller's settings, so `draw` states its own.
    @partitionable()
    def draw(key, dtype):
        of_signs, of_order, of_gains = jax.random.split(key, 3)
        signs = _signs(of_signs, num).astype(dtype)
        # Drawn in a type of its own: JAX's default, and what is drawn, change with x64.
        gains = jax.random.normal(of_gains, (width,), jnp.float32).astype(dtype)
        # c, so that a column has norm 1 in expectation over its rows.
        return signs, _Order(of_order, width), gains / jnp.sqrt(size * jnp.sum(gains**2))

    @jax.custom_vjp
    def forward(theta, key):
        signs, order, gains = draw(key, theta.dtype)
        x = walsh_hadamard(jnp.pad(theta * signs, (0, inner - num)))
        return walsh_hadamard(order.take(x) * gains)[:size]

    def backward(key, cotangent):
        signs, order, gains = draw(key, cotangent.dtype)
        x = walsh_hadamard(jnp.pad(cotangent, (0, width - size))) * gains
        x = jnp.sum(order.put(x).reshape(-1, inner), axis=0)
        return walsh_hadamard(x)[:num] * signs, None

    forward.defvjp(lambda theta, key: (forward(theta, key), key), backward)
    return forward


def _signs(key: jax.Array, num: int) -> jax.Array:
    """(num,) int32 of ±1, the first ones the same for every `num`."""
    blocks = jnp.arange(-(-num // _BLOCK), dtype=jnp.uint32)
    draw = lambda n: jax.random.bits(jax.random.fold_in(key, n), (_BLOCK,), jnp.uint32)  # noqa: E731
    return 1 - 2 * (jax.vmap(draw)(blocks).reshape(-1)[:num] & 1).astype(jnp.int32)


class _Order:
    """A permutation of 2^k places by arithmetic: no table of n indices, none to sort or keep.

    i becomes i · odd, then i ^ (i >> k/2), three times, with odd numbers from the key: each is a
    bijection of k bits, so the inverse is known too. (Mixing as hash functions do, "xorshift-
    multiply".)
    """

    ROUNDS = 3

    def __init__(self, key: jax.Array, width: int):
        self.width = width
        self._bits = max(1, width.bit_length() - 1)
        self._mask = jnp.uint32(width - 1)
        drawn = jax.random.bits(key, (self.ROUNDS, 2), jnp.uint32)
        self._odd, self._plus = drawn[:, 0] | jnp.uint32(1), drawn[:, 1]

    def take(self, x: jax.Array) -> jax.Array:
        """y[i] = x[order(i)], of an x of `width` numbers, or of a power of 2 that repeats."""
        order = self.of(jnp.arange(self.width, dtype=jnp.uint32))
        return x[order & jnp.uint32(x.shape[0] - 1)]

    def put(self, x: jax.Array) -> jax.Array:
        """The inverse and transpose of `take` of `width` numbers: y[order(i)] = x[i]."""
        return x[self._inverse(jnp.arange(self.width, dtype=jnp.uint32))]

    def among(self, size: int) -> jax.Array:
        """A permutation of the first `size` places, uint32: what leads out of them goes on until it
        is back among them, which it must be, since a permutation is made of cycles."""
        return jax.lax.while_loop(
            lambda i: jnp.any(i >= size),
            lambda i: jnp.where(i >= size, self.of(i), i),
            self.of(jnp.arange(size, dtype=jnp.uint32)),
        )

    def of(self, i: jax.Array) -> jax.Array:
        """order(i) of uint32 places."""
        for n in range(self.ROUNDS):
            i = (i * self._odd[n] + self._plus[n]) & self._mask
            i = i ^ (i >> self._shift)
        return i

    def _inverse(self, i):
        for n in reversed(range(self.ROUNDS)):
            # x ^ (x >> s) is undone by x ^ (x >> s) ^ (x >> 2s) …; with 2s >= k, by itself.
            i = i ^ (i >> self._shift)
            i = ((i - self._plus[n]) * _inverse_of_odd(self._odd[n])) & self._mask
        return i

    @property
    def _shift(self) -> int:
        return (self._bits + 1) // 2


def _inverse_of_odd(odd: jax.Array) -> jax.Array:
    """The inverse modulo 2^32, by Newton's method: each round doubles the right bits, from 3."""
    x = odd
    for _ in range(4):
        x = x * (jnp.uint32(2) - odd * x)
    return x


def _hadamard(size: int, dtype) -> jax.Array:
    i = jnp.arange(size)
    ones = jax.lax.population_count(i[:, None] & i[None])
    return (1 - 2 * (ones & 1)).astype(dtype)


def _wide(theta: jax.Array) -> jax.Array:
    theta = jnp.asarray(theta)
    if theta.ndim != 1 or not jnp.issubdtype(theta.dtype, jnp.floating):
        raise RequestError(f"theta is {theta.dtype} {theta.shape}; give floating point (d,)")
    return theta.astype(float32_or_wider(theta.dtype))


def _width(size: int) -> int:
    if size < 1:
        raise RequestError(f"there are {size} parameters to move; give at least 1")
    return 1 << math.ceil(math.log2(size)) if size > 1 else 1
