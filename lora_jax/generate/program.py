"""The compiled program: the prompt at once, then a loop of one token a row and step.

A `Plan` is what the program is compiled for, with the shapes; `Data` and the parameters are its
arguments, so another adapter of the same shapes, temperature or length penalty compiles nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.lift import lift
from lora_jax.generate.beams import Beams, Rules, extend, goes_on, init_beams
from lora_jax.generate.memory import WithCache, WithoutCache
from lora_jax.generate.sampling import draw, kept_logits, without_repeats
from lora_jax.models.functional import flatten


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static. `apply` and `config` are the model's, `num_new` the width of the answer."""

    apply: Callable[..., Any]
    config: Any
    num_new: int
    num_beams: int
    num_return: int
    repeat_size: int
    is_sampled: bool
    is_filtered: bool
    use_cache: bool


class Data(NamedTuple):
    """What is not: prompts `tokens_BP`, `mask_BP` (padded on the left) and the settings.

    `first` () int32 is the first column whose tokens may not be repeated: the first that the caller
    gave (those before are the program's own padding), or the first new one. `row_R` are the numbers
    that the rows' keys are folded with. `key` is None where nothing is drawn.
    """

    tokens_BP: jax.Array
    mask_BP: jax.Array
    first: jax.Array
    pad: jax.Array
    rules: Rules
    key: Any
    row_R: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array


class Rows(NamedTuple):
    """Greedy and sampled decoding: `seen_RL` holds the prompt and what was chosen so far."""

    step: jax.Array
    memory: Any
    seen_RL: jax.Array
    token_R: jax.Array
    is_done_R: jax.Array
    lengths_R: jax.Array
    log_probs_R: jax.Array


class Search(NamedTuple):
    """Beam search: rows of `memory` are beams, those of a prompt side by side."""

    step: jax.Array
    memory: Any
    token_R: jax.Array
    beams: Beams


@functools.partial(jax.jit, static_argnames=("plan",))
def decode(params: Any, data: Data, *, plan: Plan) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(tokens, lengths, log_probs)` as `generate_tokens` returns them."""
    num_prompts, width = data.tokens_BP.shape
    kind = WithCache if plan.use_cache else WithoutCache
    memories: Any = kind(lift(plan.apply), plan.config)
    # The last new token is never read, so it needs no column.
    length = width + plan.num_new - 1
    dtype = flatten(params)["embed/embedding"].dtype
    memory = memories.start(params, data.tokens_BP, data.mask_BP, length=length, dtype=dtype)
    copies = max(plan.num_beams, plan.num_return)
    if copies > 1:
        memory = memories.take(memory, jnp.repeat(jnp.arange(num_prompts), copies))
    prompt_RP = jnp.repeat(data.tokens_BP, copies, axis=0)
    run = _follow if plan.num_beams == 1 else _search
    return run(plan, memories, params, data, memory, prompt_RP)


def _follow(plan, memories, params, data, memory, prompt_RP):
    num_rows, width = prompt_RP.shape
    logits = jax.eval_shape(memories.advance, params, memory, prompt_RP[:, -1])[0]
    key_R: Any = None
    if plan.is_sampled:
        key_R = jax.vmap(jax.random.fold_in, (None, 0))(data.key, data.row_R)
    rows = Rows(
        step=jnp.zeros((), jnp.int32),
        memory=memory,
        seen_RL=jnp.pad(prompt_RP, ((0, 0), (0, plan.num_new)), constant_values=data.pad),
        token_R=prompt_RP[:, -1],
        is_done_R=jnp.zeros(num_rows, bool),
        lengths_R=jnp.zeros(num_rows, jnp.int32),
        log_probs_R=jnp.zeros(num_rows, logits.dtype),
    )

    def choose(step, logits_RV, seen_RL):
        scores_RV = _without_repeats(plan, data, logits_RV, seen_RL, width + step)
        if not plan.is_sampled:
            return jnp.argmax(scores_RV, axis=-1).astype(jnp.int32)
        if plan.is_filtered:
            scores_RV = kept_logits(scores_RV, data.temperature, data.top_k, data.top_p)
        else:
            scores_RV = scores_RV / data.temperature.astype(scores_RV.dtype)
        return draw(key_R, step, scores_RV)

    def one_more(rows: Rows) -> Rows:
        logits_RV, memory = memories.advance(params, rows.memory, rows.token_R)
        chosen_R = choose(rows.step, logits_RV, rows.seen_RL)
        log_prob_R = jnp.take_along_axis(jax.nn.log_softmax(logits_RV), chosen_R[:, None], 1)[:, 0]
        token_R = jnp.where(rows.is_done_R, data.pad, chosen_R)
        return Rows(
            step=rows.step + 1,
            memory=memory,
            seen_RL=lax.dynamic_update_slice_in_dim(
                rows.seen_RL, token_R[:, None], width + rows.step, axis=1
            ),
            token_R=token_R,
            is_done_R=rows.is_done_R | jnp.isin(token_R, data.rules.eos_E),
            lengths_R=rows.lengths_R + (~rows.is_done_R).astype(rows.lengths_R.dtype),
            log_probs_R=rows.log_probs_R + jnp.where(rows.is_done_R, 0, log_prob_R),
        )

    def is_open(rows: Rows) -> jax.Array:
        return (rows.step < data.rules.limit) & ~jnp.all(rows.is_done_R)

    rows = lax.while_loop(is_open, one_more, rows)
    return rows.seen_RL[:, width:], rows.lengths_R, rows.log_probs_R


def _search(plan, memories, params, data, memory, prompt_RP):
    num_rows, width = prompt_RP.shape
    num_beams, num_prompts = plan.num_beams, num_rows // plan.num_beams
    logits = jax.eval_shape(memories.advance, params, memory, prompt_RP[:, -1])[0]
    start_B1 = num_beams * jnp.arange(num_prompts)[:, None]
    beams = init_beams(num_prompts, num_beams, plan.num_new, pad=data.pad, dtype=logits.dtype)
    search = Search(jnp.zeros((), jnp.int32), memory, prompt_RP[:, -1], beams)

    def one_more(search: Search) -> Search:
        step, beams = search.step, search.beams
        logits_RV, memory = memories.advance(params, search.memory, search.token_R)
        log_probs_RV = jax.nn.log_softmax(logits_RV)
        if plan.repeat_size:
            new_RN = beams.open_BKN.reshape(num_rows, -1)
            seen_RL = jnp.concatenate([prompt_RP, new_RN], axis=1)
            log_probs_RV = _without_repeats(plan, data, log_probs_RV, seen_RL, width + step)
        log_probs_BKV = log_probs_RV.reshape(num_prompts, num_beams, -1)
        beams, parent_BK, token_BK = extend(beams, log_probs_BKV, step, data.rules)
        # The prompt's columns are the same in all beams of a prompt; only what follows moves.
        memory = memories.take(memory, (start_B1 + parent_BK).reshape(-1), since=width - 1)
        return Search(step + 1, memory, token_BK.reshape(-1), beams)

    def is_open(search: Search) -> jax.Array:
        return (search.step < data.rules.limit) & goes_on(search.beams, data.rules)

    beams = lax.while_loop(is_open, one_more, search).beams
    tokens_BKN, lengths_BK, scores_BK = (
        found[:, : plan.num_return]
        for found in (beams.ended_BKN, beams.lengths_BK, beams.ended_scores_BK)
    )
    log_probs_BK = scores_BK * data.rules.divisor_N[jnp.maximum(lengths_BK - 1, 0)]
    return tokens_BKN.reshape(-1, plan.num_new), lengths_BK.reshape(-1), log_probs_BK.reshape(-1)


def _without_repeats(plan: Plan, data: Data, scores_RV, seen_RL, filled) -> jax.Array:
    if not plan.repeat_size:
        return scores_RV
    return without_repeats(
        scores_RV, seen_RL, size=plan.repeat_size, first=data.first, filled=filled
    )
