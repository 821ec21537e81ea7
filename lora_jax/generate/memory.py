"""What a decoder remembers between two tokens: keys and values, or nothing but the tokens.

Both kinds have the same three verbs, so that greedy decoding, sampling and beam search are written
once. `WithoutCache` is the plain reference: it runs the model over the whole text at each step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.models.attention import Cache
from lora_jax.models.decoder import make_cache


@dataclasses.dataclass(frozen=True)
class WithCache:
    """Keys and values of all columns so far: a step runs the model on one token a row."""

    apply: Callable[..., Any]
    config: Any

    def start(self, params, tokens_BP, mask_BP, *, length: int, dtype) -> Cache:
        """All of the prompt but its last column, in a cache of `length` columns.

        The logits of this pass are not used, so XLA leaves the head out of it.
        """
        cache = make_cache(self.config, batch_size=len(tokens_BP), length=length, dtype=dtype)
        if tokens_BP.shape[1] == 1:
            return cache
        tokens_BT, mask_BT = tokens_BP[:, :-1], mask_BP[:, :-1]
        positions = positions_of(mask_BT)
        _, cache = self.apply(params, tokens_BT, mask_BT, position_ids=positions, cache=cache)
        return cache

    def advance(self, params, cache: Cache, token_R) -> tuple[jax.Array, Cache]:
        """`(logits_RV, cache)` after one more token in each row."""
        position_R1 = cache.mask.sum(axis=1, dtype=jnp.int32)[:, None]
        logits_R1V, cache = self.apply(
            params, token_R[:, None], position_ids=position_R1, cache=cache
        )
        return logits_R1V[:, -1], cache

    def take(self, cache: Cache, rows_R, *, since: int = 0) -> Cache:
        """The cache of these rows in this order; columns before `since` stay where they are."""
        axis = 0 if isinstance(cache.keys, tuple) else 1  # stacked layers have an axis before rows
        move = lambda kept: _take_rows(kept, rows_R, axis, since)  # noqa: E731
        return cache._replace(
            keys=jax.tree.map(move, cache.keys),
            values=jax.tree.map(move, cache.values),
            mask=_take_rows(cache.mask, rows_R, 0, since),
        )


class Text(NamedTuple):
    """Tokens (R, L) int32, their mask, 1 in all columns to come, and how many are there."""

    tokens: jax.Array
    mask: jax.Array
    filled: jax.Array


@dataclasses.dataclass(frozen=True)
class WithoutCache:
    """The tokens alone: a step runs the model over all `length` columns, those to come included.

    A causal model does not see the columns to come; they are there so that one shape does for all
    steps.
    """

    apply: Callable[..., Any]
    config: Any

    def start(self, params, tokens_BP, mask_BP, *, length: int, dtype) -> Text:
        """The prompt without its last column."""
        more = ((0, 0), (0, length - tokens_BP.shape[1]))
        tokens_BL = jnp.pad(tokens_BP, more)
        mask_BL = jnp.pad(mask_BP, more, constant_values=1)
        return Text(tokens_BL, mask_BL, jnp.array(tokens_BP.shape[1] - 1, jnp.int32))

    def advance(self, params, text: Text, token_R) -> tuple[jax.Array, Text]:
        """`(logits_RV, text)` after one more token in each row."""
        tokens_RL = lax.dynamic_update_slice_in_dim(text.tokens, token_R[:, None], text.filled, 1)
        positions = positions_of(text.mask)
        logits_RLV = self.apply(params, tokens_RL, text.mask, position_ids=positions)
        logits_RV = lax.dynamic_index_in_dim(logits_RLV, text.filled, axis=1, keepdims=False)
        return logits_RV, Text(tokens_RL, text.mask, text.filled + 1)

    def take(self, text: Text, rows_R, *, since: int = 0) -> Text:
        """The texts of these rows in this order."""
        return text._replace(tokens=text.tokens[rows_R], mask=text.mask[rows_R])


def positions_of(mask_BT: jax.Array) -> jax.Array:
    """Each token's place among those that are no padding, from 0; 0 in padding before the first.

    >>> positions_of(jnp.array([[0, 0, 1, 1]])).tolist()
    [[0, 0, 0, 1]]
    """
    return jnp.maximum(jnp.cumsum(mask_BT, axis=1, dtype=jnp.int32) - 1, 0)


def _take_rows(kept: jax.Array, rows_R: jax.Array, axis: int, since: int) -> jax.Array:
    taken = jnp.take(lax.slice_in_dim(kept, since, None, axis=axis + 1), rows_R, axis=axis)
    if since == 0:
        return taken
    return lax.dynamic_update_slice_in_dim(kept, taken, since, axis + 1)
