"""NF4: four-bit codes of 64 neighbours at a time, by QLoRA's table (arXiv:2305.14314).

Each block of 64 numbers is divided by its largest absolute value, its *scale*, and each quotient
becomes the nearest of the 16 values in `CODEBOOK`; two codes lie in a byte, the first in its upper
half. *Double quantisation* keeps the scales in 8 bits, too: their mean is subtracted and blocks of
256 are quantised to the nearest of `SCALE_CODES` times the block's largest. As `bitsandbytes` has
it, so the same numbers give the same bytes (`tests/parity`).

Everything here is of a flat last axis, whose length is a multiple of the block (zeros fill it up).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLOCK, SCALE_BLOCK = 64, 256
# Quantiles of the normal distribution, divided by the largest (QLoRA, Appendix E).
CODEBOOK = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def _scale_codes() -> np.ndarray:
    """The 256 values of a signed "dynamic" 8-bit number (Dettmers 2015, arXiv:1511.04561).

    The more leading zeros, the smaller the power of ten and the fewer bits of fraction: 2^i values
    between 10^(i - 7) and 10^(i - 6) for i from 0 to 6, both signs, with 0 and 1.
    """
    positive = []
    for power in range(7):
        edges = _evenly_spaced(2**power)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        positive.append(np.float32(10.0 ** (power - 6)) * means)
    values = np.concatenate(positive)
    return np.sort(np.concatenate([-values, values, [0, 1]])).astype(np.float32)


def _evenly_spaced(count: int) -> np.ndarray:
    """`count` + 1 numbers from 0.1 to 1, rounded as torch.linspace rounds: from both ends."""
    first, last, places = np.float32(0.1), np.float32(1), np.arange(count + 1)
    step = np.float64((last - first) / np.float32(count))
    near_first = places < (count + 1) // 2
    return np.where(near_first, first + step * places, last - step * places[::-1]).astype(
        np.float32
    )


SCALE_CODES = _scale_codes()


def encode(x: Any, table: np.ndarray = CODEBOOK, block: int = BLOCK) -> tuple[Any, Any]:
    """`x (…, n)` as codes, uint8 (…, n), places in `table`, and scales, float32 (…, n / block).

    Raises `ValueError` where n is no multiple of the block.

    >>> codes, scales = encode(jnp.linspace(-2, 2, 64))
    >>> int(codes[0]), int(codes[-1]), float(scales[0])
    (0, 15, 2.0)
    """
    if x.shape[-1] % block:
        raise ValueError(f"{x.shape[-1]} numbers are no whole blocks of {block}; pad with zeros")
    xp = np if isinstance(x, np.ndarray) else jnp
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, block)
    scales = xp.max(xp.abs(blocks), axis=-1)
    # Times the reciprocal, as bitsandbytes has it; a block of zeros stays one.
    smallest = np.finfo(np.float32).tiny
    quotients = xp.clip(blocks * (1 / xp.maximum(scales, smallest))[..., None], -1, 1)
    middles = (table[:-1] + table[1:]) / np.float32(2)
    if xp is np:
        codes = np.searchsorted(middles, quotients)
    else:
        codes = jnp.searchsorted(middles, quotients, method="compare_all")
    return codes.astype(np.uint8).reshape(x.shape), scales


def pack(codes: jax.Array) -> jax.Array:
    """Codes (…, n), n even, two per byte: (…, n / 2), the first of two in the upper four bits.

    >>> pack(jnp.array([1, 2, 15, 0], jnp.uint8)).tolist()
    [18, 240]
    """
    return (codes[..., ::2] << 4) | codes[..., 1::2]


def unpack(packed: jax.Array) -> jax.Array:
    """The codes (…, 2 m) in bytes (…, m).

    >>> unpack(jnp.array([18, 240], jnp.uint8)).tolist()
    [1, 2, 15, 0]
    """
    both = jnp.stack([packed >> 4, packed & 15], axis=-1)
    return both.reshape(*packed.shape[:-1], -1)


def decode(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """`CODEBOOK[code] · scale`, float32 (…, n), of codes (…, n) and scales (…, n / 64).

    >>> float(decode(jnp.full((64,), 15, jnp.uint8), jnp.array([0.5]))[0])
    0.5
    """
    values = _look_up(codes).reshape(*scales.shape, BLOCK) * scales[..., None]
    return values.reshape(codes.shape)


def _look_up(codes):
    """`CODEBOOK[codes]` by a tree of selects on the four bits: fused, while a gather is not."""
    values: list[Any] = list(CODEBOOK)
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        values = [
            jnp.where(is_set, high, low)
            for low, high in zip(values[::2], values[1::2], strict=True)
        ]
    return values[0]


def encode_scales(scales: Any) -> tuple[Any, Any, Any]:
    """Scales (…, m) in 8 bits: codes uint8 (…, m), the blocks' own scales (…, ⌈m / 256⌉), mean (…).

    The last two float32; the last block may be short. NumPy arrays give NumPy arrays, with the same
    bits on every machine: a compiled program may round the mean later, and a hash is of bits.
    """
    xp = np if isinstance(scales, np.ndarray) else jnp
    mean = _sum(scales, xp) / np.float32(scales.shape[-1])
    rest = scales - mean[..., None]
    short = -rest.shape[-1] % SCALE_BLOCK
    padded = xp.pad(rest, [*[(0, 0)] * (rest.ndim - 1), (0, short)])
    codes, block_scales = encode(padded, SCALE_CODES, SCALE_BLOCK)
    return codes[..., : scales.shape[-1]], block_scales, mean


def _sum(x: Any, xp: Any) -> Any:
    """The sum over the last axis, halves added to halves: in one order everywhere."""
    while x.shape[-1] > 1:
        x = xp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, x.shape[-1] % 2)])
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def decode_scales(codes: jax.Array, block_scales: jax.Array, mean: jax.Array) -> jax.Array:
    """The scales, float32 (…, m), that `encode_scales` made these of."""
    values = jnp.asarray(SCALE_CODES)[codes]
    by_block = jnp.repeat(block_scales, SCALE_BLOCK, axis=-1)[..., : codes.shape[-1]]
    return values * by_block + mean[..., None]


def bits_per_param(*, double_quant: bool) -> float:
    """4.5 bits with float32 scales; 4.127 with double quantisation (QLoRA, Section 3).

    >>> bits_per_param(double_quant=False), round(bits_per_param(double_quant=True), 3)
    (4.5, 4.127)
    """
    scale = 8 + 32 / SCALE_BLOCK if double_quant else 32
    return 4 + scale / BLOCK
