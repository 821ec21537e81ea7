"""Choosing the next token: what may not come, what is kept, and a draw that is each row's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def kept_logits(
    logits_RV: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
    """Logits / temperature, -inf for what top-k and then top-p leave out; (R, V) float.

    Top-k keeps the `top_k` largest and whatever equals the last of them (0 keeps all). Of what is
    left, renormalised, top-p (Holtzman et al. 2020, arXiv:1904.09751) drops tokens from the least
    probable up while those dropped have at most 1 - `top_p` in all; the most probable stays. The
    order and the comparisons are those of transformers' warpers.

    >>> jax.jit(kept_logits)(jnp.array([[3.0, 1.0, 2.0]]), 1.0, 2, 1.0).tolist()
    [[3.0, -inf, 2.0]]
    """
    num_tokens = logits_RV.shape[-1]
    scaled_RV = logits_RV / jnp.asarray(temperature, logits_RV.dtype)
    rows = jnp.arange(logits_RV.shape[0])[:, None]
    numbers = lax.broadcasted_iota(jnp.int32, scaled_RV.shape, 1)
    rising_RV, order_RV = lax.sort((scaled_RV, numbers), dimension=1, num_keys=1, is_stable=True)
    last = jnp.where(top_k > 0, jnp.clip(num_tokens - top_k, 0, num_tokens - 1), 0)
    smallest_R1 = lax.dynamic_slice_in_dim(rising_RV, last, 1, axis=1)
    rising_RV = jnp.where(rising_RV < smallest_R1, -jnp.inf, rising_RV)
    below_RV = jnp.cumsum(jax.nn.softmax(rising_RV, axis=-1), axis=-1)
    dropped_RV = (below_RV <= 1 - jnp.asarray(top_p, below_RV.dtype)).at[:, -1].set(False)
    rising_RV = jnp.where(dropped_RV, -jnp.inf, rising_RV)
    return scaled_RV.at[rows, order_RV].set(rising_RV, unique_indices=True)


def draw(key_R: jax.Array, step: jax.Array, logits_RV: jax.Array) -> jax.Array:
    """(R,) int32 tokens drawn from softmax(logits).

    Each row draws with its own key, folded with the step alone: neither its neighbours nor the
    padding before it change what it draws.
    """
    fold = jax.vmap(jax.random.fold_in, (0, None))
    return jax.vmap(jax.random.categorical)(fold(key_R, step), logits_RV).astype(jnp.int32)


def without_repeats(
    scores_RV: jax.Array, seen_RL: jax.Array, *, size: int, first: jax.Array, filled: jax.Array
) -> jax.Array:
    """Scores with -inf for each token that would complete, a second time, a run of `size` tokens.

    `seen_RL` are token ids, of which the columns from `first` up to `filled` count; both are ()
    int32. Runs are looked for in all of them, padding included (see `generate_tokens`). Paulus et
    al. 2018, arXiv:1705.04304, section 2.5.
    """
    num_tokens, num_windows = scores_RV.shape[-1], seen_RL.shape[1] - size + 1
    if num_windows < 1:
        return scores_RV
    recent_Rm = lax.dynamic_slice_in_dim(seen_RL, filled - (size - 1), size - 1, axis=1)
    start_W = jnp.arange(num_windows)
    matches_RW = jnp.broadcast_to(
        (start_W >= first) & (start_W + size <= filled), (len(seen_RL), num_windows)
    )
    for place in range(size - 1):
        matches_RW &= seen_RL[:, place : place + num_windows] == recent_Rm[:, place, None]
    # What does not match is sent past the vocabulary, where it is dropped.
    banned_RW = jnp.where(matches_RW, seen_RL[:, size - 1 :], num_tokens)
    rows = jnp.arange(len(seen_RL))[:, None]
    return scores_RV.at[rows, banned_RW].set(-jnp.inf, mode="drop")
