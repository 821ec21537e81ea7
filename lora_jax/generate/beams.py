"""Beam search over many prompts at once; the rules are those of `transformers.generate`.

A search holds, for each prompt, `num_beams` texts that go on and the `num_beams` best that have
ended. At each step every beam is extended by every token; the best candidates that end, if they are
among the first `num_beams`, are weighed against those that ended before, and the best that do not
end go on. Enough candidates are looked at for `num_beams` to go on whatever ends.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Below every score of a text, and finite: there the difference of two is not NaN.
FAR = -1e9


class Rules(NamedTuple):
    """What decides when a text ends and how those that ended are weighed. All of it is data.

    `eos_E` token ids; `limit` () tokens at most; `divisor_N` float32, of a text's score by its
    number of tokens less 1; `is_early`, `is_never` () bool: `early_stopping` True or "never", the
    latter only where longer texts may gain by the division.
    """

    eos_E: jax.Array
    limit: jax.Array
    divisor_N: jax.Array
    is_early: jax.Array
    is_never: jax.Array


class Beams(NamedTuple):
    """The state of a search for B prompts with K beams of at most N new tokens.

    `open_BKN` texts that go on, best first, and `open_scores_BK`, the sums of their tokens'
    log-probabilities; `ended_BKN`, `ended_scores_BK` (divided), `lengths_BK` and `is_ended_BK` of
    those that ended, best first, and whether there is one in that place yet; `may_improve_B`
    whether texts that end later can still be better.
    """

    open_BKN: jax.Array
    open_scores_BK: jax.Array
    ended_BKN: jax.Array
    ended_scores_BK: jax.Array
    lengths_BK: jax.Array
    is_ended_BK: jax.Array
    may_improve_B: jax.Array


def init_beams(num_prompts: int, num_beams: int, num_new: int, *, pad: jax.Array, dtype) -> Beams:
    """No token yet. Only the first beam counts, or all of them would be extended alike."""
    shape = (num_prompts, num_beams)
    empty_BKN = jnp.full((*shape, num_new), pad, jnp.int32)
    scores_BK = jnp.full(shape, FAR, dtype)
    return Beams(
        open_BKN=empty_BKN,
        open_scores_BK=scores_BK.at[:, 0].set(0.0),
        ended_BKN=empty_BKN,
        ended_scores_BK=scores_BK,
        lengths_BK=jnp.zeros(shape, jnp.int32),
        is_ended_BK=jnp.zeros(shape, bool),
        may_improve_B=jnp.ones(num_prompts, bool),
    )


def goes_on(beams: Beams, rules: Rules) -> jax.Array:
    """() bool: whether another step can change what any of the searches finds."""
    return jnp.any(beams.may_improve_B) & ~(rules.is_early & jnp.all(beams.is_ended_BK))


def extend(
    beams: Beams, log_probs_BKV: jax.Array, step: jax.Array, rules: Rules
) -> tuple[Beams, jax.Array, jax.Array]:
    """`(beams, parent_BK, token_BK)`: each beam that goes on, the one it was, its new token.

    `log_probs_BKV` are the log-probabilities of each next token, -inf for what may not come; `step`
    is the number of new tokens so far.
    """
    num_prompts, num_beams, num_tokens = log_probs_BKV.shape
    num_candidates = max(2, 1 + len(rules.eos_E)) * num_beams
    total_BKV = beams.open_scores_BK[..., None] + log_probs_BKV
    scores_BC, index_BC = lax.top_k(total_BKV.reshape(num_prompts, -1), num_candidates)
    parent_BC, token_BC = index_BC // num_tokens, index_BC % num_tokens
    texts_BCN = jnp.take_along_axis(beams.open_BKN, parent_BC[..., None], axis=1)
    texts_BCN = lax.dynamic_update_slice_in_dim(texts_BCN, token_BC[..., None], step, axis=2)
    ends_BC = jnp.isin(token_BC, rules.eos_E) | (step + 1 == rules.limit)

    open_scores_BK, chosen_BK = lax.top_k(jnp.where(ends_BC, scores_BC + FAR, scores_BC), num_beams)
    open_BKN = jnp.take_along_axis(texts_BCN, chosen_BK[..., None], axis=1)

    is_full_B = rules.is_early & jnp.all(beams.is_ended_BK, axis=1)
    counts_BC = ends_BC & (beams.may_improve_B & ~is_full_B)[:, None]
    counts_BC &= (jnp.arange(num_candidates) < num_beams)[None]
    divided_BC = jnp.where(counts_BC, scores_BC / rules.divisor_N[step], FAR)
    # Those that ended before come first: of two that are equal, the earlier one is kept.
    both = lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], axis=1)  # noqa: E731
    ended_scores_BK, best_BK = lax.top_k(both(beams.ended_scores_BK, divided_BC), num_beams)
    kept = lambda old, new: jnp.take_along_axis(both(old, new), best_BK, axis=1)  # noqa: E731
    texts = jnp.concatenate([beams.ended_BKN, texts_BCN], axis=1)
    is_ended_BK = kept(beams.is_ended_BK, counts_BC)

    # The most that a beam can come to: its sum so far falls with each token, its divisor may grow.
    reached = jnp.where(rules.is_never, rules.divisor_N[rules.limit - 1], rules.divisor_N[step])
    most_B1 = open_scores_BK[:, :1] / reached
    worst_BK = jnp.where(is_ended_BK, ended_scores_BK.min(axis=1, keepdims=True), FAR)
    new = Beams(
        open_BKN=open_BKN,
        open_scores_BK=open_scores_BK,
        ended_BKN=jnp.take_along_axis(texts, best_BK[..., None], axis=1),
        ended_scores_BK=ended_scores_BK,
        lengths_BK=kept(beams.lengths_BK, jnp.full_like(token_BC, step + 1)),
        is_ended_BK=is_ended_BK,
        may_improve_B=beams.may_improve_B & jnp.any(most_B1 > worst_BK, axis=1),
    )
    parent_BK, token_BK = (jnp.take_along_axis(x, chosen_BK, axis=1) for x in (parent_BC, token_BC))
    return new, parent_BK, token_BK
