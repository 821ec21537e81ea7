"""What all decoders share: the run through layers, in a list or stacked, and what follows it.

A layer is an NNX module `layer(h_BTD, inputs, past) -> (h_BTD, (keys, values))`, where `inputs` is
what is the same for all layers and `past` is None or that layer's part of a cache. Stacked layers
are one module whose parameters have a leading axis of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from lora_jax.core.errors import RequestError
from lora_jax.models.attention import Cache
from lora_jax.models.layers import at_least_float32, fold_key
from lora_jax.models.pooling import last_token
from lora_jax.models.remat import rematerialised


class Decoder(nnx.Module):
    """A decoder's end; `embed`, `norm`, `head` (None: tied) and `num_labels` are its own."""

    embed: Any
    norm: Any
    head: Any
    num_labels: int | None

    def finish(self, h_BTD, mask_BS, cache: Cache | None, states: tuple | None, readout=None):
        """The output from what the layers gave: with the cache, or the states, where there are.

        With a `readout` it is `readout(logits_of, h_BTD)`, whose first argument gives the logits
        (…, vocab) of states (…, D): a loss need not have them all at once.
        """
        h_BTD = pooled_BD = self.norm(h_BTD)
        if self.num_labels is not None:
            pooled_BD = last_token(h_BTD, mask_BS)

        def logits_of(h):
            return at_least_float32(self.embed.attend(h) if self.head is None else self.head(h))

        output = logits_of(pooled_BD) if readout is None else readout(logits_of, pooled_BD)
        if cache is not None:
            return output, cache
        return output if states is None else (output, (*states, h_BTD))


def make_layers(make: Callable[[nnx.Rngs], nnx.Module], number: int, *, stacked: bool, rngs):
    """`number` layers as an `nnx.List`, or as one module with a leading axis on every parameter."""
    if not stacked:
        return nnx.List([make(rngs) for _ in range(number)])
    keys = jax.random.split(rngs.params(), number)
    return nnx.vmap(lambda key: make(nnx.Rngs(key)))(keys)


def run_layers(
    layers: Any,
    h_BTD: jax.Array,
    call: Callable[..., Any],
    *,
    past: Cache | None,
    key: jax.Array | None,
    keep_states: bool,
    remat: str = "",
    constrain: Callable | None = None,
) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[Any, Any]]:
    """`(h, states, (keys, values))` after all layers.

    `call(layer, h, past, key)` runs one layer. `states` are the inputs of each layer when
    `keep_states`, else empty; `keys` and `values` are in the form that `Cache` holds them. `remat`
    is a policy of `models.remat`, `constrain(x)` says where states lie on a mesh.
    """
    call = rematerialised(call, remat, in_scan=not isinstance(layers, nnx.List))
    constrain = constrain or (lambda h: h)
    h_BTD = constrain(h_BTD)
    if isinstance(layers, nnx.List):
        states, keys, values = [], [], []
        for number, layer in enumerate(layers):
            states += [h_BTD] if keep_states else []
            own = None if past is None else (past.keys[number], past.values[number])
            h_BTD, (k, v) = call(layer, h_BTD, own, fold_key(key, number))
            h_BTD = constrain(h_BTD)
            keys.append(k)
            values.append(v)
        return h_BTD, tuple(states), (tuple(keys), tuple(values))
    graph, stacked = nnx.split(layers)

    def body(h, inputs):
        state, own, number = inputs
        out, new = call(nnx.merge(graph, state), h, own, fold_key(key, number))
        return constrain(out), (h if keep_states else None, new)

    number = jax.tree.leaves(stacked)[0].shape[0]
    own = None if past is None else (past.keys, past.values)
    h_BTD, (kept, new) = lax.scan(body, h_BTD, (stacked, own, jnp.arange(number)))
    return h_BTD, () if kept is None else tuple(kept), new


def check_tokens(
    name: str, input_ids: jax.Array, attention_mask: Any, *, longest: int | None, cache: Any
) -> None:
    """Raises `RequestError` for inputs that are no (batch, time) integers or do not fit."""
    shape = jnp.shape(input_ids)
    if len(shape) != 2 or not jnp.issubdtype(jnp.result_type(input_ids), jnp.integer):
        kind = f"{jnp.result_type(input_ids)} {shape}"
        raise RequestError(f"input_ids are {kind}; {name} takes integers of shape (batch, time)")
    if attention_mask is not None and jnp.shape(attention_mask) != shape:
        raise RequestError(
            f"attention_mask has shape {jnp.shape(attention_mask)}, input_ids have {shape}"
        )
    columns = shape[1] if cache is None else cache.mask.shape[1]
    if longest is not None and columns > longest:
        raise RequestError(
            f"a sequence of {columns} tokens is longer than the model's {longest} positions; "
            "truncate the texts (data.max_length) or ask for fewer new tokens"
        )
    if cache is not None and cache.mask.shape[0] != shape[0]:
        raise RequestError(
            f"the cache is for {cache.mask.shape[0]} rows, input_ids have {shape[0]}; make one "
            f"with model.make_cache(batch_size={shape[0]}, length=…)"
        )


def masks_and_positions(input_ids, attention_mask, position_ids, cache):
    """`(mask_BS, positions_BT, start)` of the new tokens, behind what the cache holds.

    Positions default to the column, padding or not, as in transformers; left-padded generation
    passes its own.
    """
    batch, time = input_ids.shape
    new_BT = jnp.ones((batch, time), jnp.int32) if attention_mask is None else attention_mask
    new_BT = new_BT.astype(jnp.int32)
    start = 0 if cache is None else cache.length
    if position_ids is None:
        position_ids = jnp.broadcast_to(start + jnp.arange(time), (batch, time))
    if cache is None:
        return new_BT, position_ids, start
    mask_BS = lax.dynamic_update_slice_in_dim(cache.mask, new_BT, start, 1)
    return mask_BS, position_ids, start
