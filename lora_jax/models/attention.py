"""Attention: the product itself, its masks, rotary positions, and the cache of a decoder.

Softmax is computed in float32 at least. Masks are additive biases, 0 or `MASKED`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.dtypes import float32_or_wider
from lora_jax.core.errors import RequestError
from lora_jax.models.layers import dropout

# Large enough that exp(score + bias) is 0.0 exactly; finite, so that a row with nothing to attend
# to gives an average instead of NaN.
MASKED = -1e30


def check_tokens(
    name: str,
    input_ids: jax.Array,
    longest: int | None,
    *,
    columns: int | None = None,
    **others: jax.Array | None,
) -> None:
    """Raises `RequestError` for inputs that are no (batch, time) integers or do not fit.

    `columns` of a cache count against `longest` in place of the tokens; `others` are None or of the
    shape of `input_ids`.
    """
    shape = jnp.shape(input_ids)
    if len(shape) != 2 or not jnp.issubdtype(jnp.result_type(input_ids), jnp.integer):
        kind = f"{jnp.result_type(input_ids)} {shape}"
        raise RequestError(f"input_ids are {kind}; {name} takes integers of shape (batch, time)")
    for what, value in others.items():
        if value is not None and jnp.shape(value) != shape:
            raise RequestError(f"{what} has shape {jnp.shape(value)}, input_ids have {shape}")
    columns = shape[1] if columns is None else columns
    if longest is not None and columns > longest:
        raise RequestError(
            f"a sequence of {columns} tokens is longer than the model's {longest} positions; "
            "truncate the texts (data.max_length), or ask for fewer new tokens"
        )


def mask_bias(attention_mask: jax.Array) -> jax.Array:
    """(B, S) mask of 0/1 -> float32 (B, 1, 1, S) to add to scores: 0 to attend, `MASKED` not to."""
    return bias_where(attention_mask[:, None, None, :] != 0)


def bias_where(visible: jax.Array) -> jax.Array:
    """float32 of the same shape: 0 where `visible`, `MASKED` elsewhere."""
    return jnp.where(visible, 0.0, MASKED).astype(jnp.float32)


def causal_bias(
    mask_BS: jax.Array, num_queries: int, *, start: Any = 0, window: int | None = None
) -> jax.Array:
    """(B, 1, T, S): query t, which stands at column `start + t`, sees columns up to its own.

    `mask_BS` is 0 in padded columns; with a `window` a query sees that many columns, its own the
    last (Mistral's sliding window).
    """
    query_T1 = start + jnp.arange(num_queries)[:, None]
    column_1S = jnp.arange(mask_BS.shape[1])[None, :]
    visible_TS = column_1S <= query_T1
    if window is not None:
        visible_TS &= column_1S > query_T1 - window
    return bias_where(visible_TS[None, None] & (mask_BS[:, None, None, :] != 0))


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """(…, D) -> (…, num_heads, D / num_heads)."""
    return x.reshape(*x.shape[:-1], num_heads, -1)


def attend_heads(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    bias: jax.Array,
    *,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H) + bias) v, (B, T, N, H); each of K key heads serves N / K queries.

    `bias` broadcasts to (B, 1, T, S). On accelerators this is `jax.nn.dot_product_attention`. On
    CPU, and where attention itself has dropout, it is written out: the division by the softmax's
    sum comes after the product with v, where it touches H numbers a query instead of S, which took
    4-10% off the forward and backward pass of an attention block (32 x 64 tokens, 12 heads of 32).
    Grouped queries: Ainslie et al. 2023, arXiv:2305.13245.
    """
    if jax.default_backend() != "cpu" and (dropout_key is None or dropout_rate == 0.0):
        return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, bias=bias)
    num_groups = k_BSKH.shape[2]
    wide = float32_or_wider(q_BTNH.dtype)
    q = q_BTNH * (q_BTNH.shape[-1] ** -0.5)
    if num_groups == q.shape[2]:
        scores = jnp.einsum("btnh,bsnh->bnts", q, k_BSKH, preferred_element_type=wide) + bias
    else:
        q = q.reshape(*q.shape[:2], num_groups, -1, q.shape[-1])
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k_BSKH, preferred_element_type=wide)
        scores = scores + bias[:, :, None]
    # The maximum cancels between numerator and sum, so no gradient flows through it.
    scores = scores - lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores)
    total = weights.sum(-1)
    weights = dropout(weights, dropout_rate, dropout_key).astype(v_BSKH.dtype)
    if num_groups == q_BTNH.shape[2]:
        mixed = jnp.einsum("bnts,bsnh->btnh", weights, v_BSKH, preferred_element_type=wide)
        mixed = mixed / total.swapaxes(1, 2)[..., None]
    else:
        mixed = jnp.einsum("bkgts,bskh->btkgh", weights, v_BSKH, preferred_element_type=wide)
        mixed = mixed / total.transpose(0, 3, 1, 2)[..., None]
    return mixed.astype(q_BTNH.dtype).reshape(q_BTNH.shape)


def rope_frequencies(width: int, theta: float, scaling: dict[str, Any] | None) -> list[float]:
    """The angular frequency of each of `width / 2` pairs, in radians a position.

    Su et al. 2021, arXiv:2104.09864, Eq. 15. `scaling` is None or a config's `rope_scaling`:
    "linear" divides all of them by `factor`; "llama3" divides the slow ones, keeps the fast ones
    and blends between (Grattafiori et al. 2024, arXiv:2407.21783, and the released configs).
    """
    plain = [theta ** (-2 * n / width) for n in range(width // 2)]
    if scaling is None:
        return plain
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return [frequency / factor for frequency in plain]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]

    def scaled(frequency: float) -> float:
        turns = context * frequency / (2 * math.pi)
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        return kept * frequency + (1.0 - kept) * frequency / factor

    return [scaled(frequency) for frequency in plain]


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, frequencies: list[float]) -> jax.Array:
    """Rotary positions: component n turns with component n + H/2, by position times frequency n.

    The order of the halves is that of Hugging Face files (GPT-NeoX's); GGUF files interleave the
    pairs, and `gguf/llama.py` puts them right when it reads. Computed in float32 or wider.
    """
    wide = float32_or_wider(x_BTNH.dtype)
    turns_h = jnp.asarray(frequencies, wide)[None, None, None]
    angle_BT1h = positions_BT[..., None, None].astype(wide) * turns_h
    cos, sin = jnp.cos(angle_BT1h), jnp.sin(angle_BT1h)
    first, second = jnp.split(x_BTNH.astype(wide), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


class Cache(NamedTuple):
    """What a decoder keeps of the tokens it has seen.

    `keys` and `values` hold one (B, S, K, H) a layer (a tuple), or one (layers, B, S, K, H) where
    layers are stacked; `mask` (B, S) int32 is 1 in columns that may be attended; `length` () int32
    is the number of columns filled, the same in every row.
    """

    keys: Any
    values: Any
    mask: jax.Array
    length: jax.Array


def put_columns(kept_BSKH: jax.Array, new_BTKH: jax.Array, start: jax.Array) -> jax.Array:
    """`kept` with `new` in the columns from `start` on."""
    return lax.dynamic_update_slice_in_dim(kept_BSKH, new_BTKH.astype(kept_BSKH.dtype), start, 1)
