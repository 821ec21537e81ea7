"""What all decoders share: embedding, layers in a list or stacked, head and cache.

A layer is an NNX module `layer(h_BTD, step, past, key) -> (h_BTD, (keys, values))`, where `step` is
the same for all layers and `past` is None or that layer's part of a cache. Stacked layers are one
module whose parameters have a leading axis of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from lora_jax.core.errors import RequestError
from lora_jax.models.attention import Cache, attend_heads, causal_bias, check_tokens, put_columns
from lora_jax.models.layers import Embedding, Linear, at_least_float32, fold_key
from lora_jax.models.pooling import last_token
from lora_jax.models.remat import rematerialised


class Step(NamedTuple):
    """What all layers of one call share.

    `bias` is `causal_bias`'s; `positions_BT` are the new tokens', the first of which stands in
    column `start`; `constrain(x, what)` says where arrays lie on a mesh.
    """

    bias: jax.Array
    positions_BT: jax.Array
    start: Any
    constrain: Callable | None

    def placed(self, what: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """The arrays where the mesh has what they are ("heads", "inner")."""
        if self.constrain is None:
            return arrays
        return tuple(self.constrain(x, what) for x in arrays)


class Decoder(nnx.Module):
    """A pre-norm decoder and its head: the embedding's own table where tied, or `head/kernel`.

    With `num_labels` the head is a classifier on the last token that is no padding. `name` is for
    errors; a decoder with learned positions has `longest` of them, one with a sliding window sees
    that many columns.
    """

    name: str
    longest: int | None = None
    window: int | None = None

    def __init__(
        self,
        config: Any,
        make_layer: Callable[[nnx.Rngs], nnx.Module],
        norm: nnx.Module,
        *,
        num_labels: int | None,
        rngs: nnx.Rngs,
    ):
        std, width = config.initializer_range, config.hidden_size
        self.embed = Embedding(config.vocab_size, width, std=std, rngs=rngs)
        self.layers = make_layers(
            make_layer, config.num_hidden_layers, stacked=config.scan_layers, rngs=rngs
        )
        self.norm = norm
        is_tied = num_labels is None and config.tie_word_embeddings
        size = config.vocab_size if num_labels is None else num_labels
        self.head = None if is_tied else Linear(width, size, std=std, rngs=rngs, use_bias=False)
        self.num_labels = num_labels
        self.config = config

    def embedded(
        self, input_ids: jax.Array, positions_BT: jax.Array, dropout_key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """`(h_BTD, key)` before the first layer; the layers' dropout draws from `key`."""
        return self.embed(input_ids), None

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        position_ids: jax.Array | None = None,
        cache: Cache | None = None,
        output_hidden_states: bool = False,
        dropout_key: jax.Array | None = None,
        readout: Callable | None = None,
        remat: str = "",
        constrain: Callable | None = None,
    ):
        """Logits (B, T, vocab) in float32 or wider; (B, num_labels) of a classifier.

        Args:
          input_ids: (B, T) integers.
          attention_mask: (B, T), 1 real, 0 padding; all real by default.
          position_ids: (B, T); by default the column, padding or not.
          cache: what the tokens follow; `(logits, cache)` is returned.
          output_hidden_states: returns `(output, (embeddings, after layer 0, …, after the last
            norm))`.
          dropout_key: without one, and in families without dropout, nothing is dropped.
          readout: returns `readout(logits_of, h_BTD)` in place of the logits, whose first argument
            gives the logits (…, vocab) of states (…, D): a loss need not have them all at once.
          remat: a policy of `models.remat`.
          constrain: says where states lie on a mesh.

        Raises:
          RequestError: shapes that do not fit.
        """
        columns = None if cache is None else cache.mask.shape[1]
        check_tokens(
            self.name, input_ids, self.longest, columns=columns, attention_mask=attention_mask
        )
        _check_rows(cache, len(input_ids))
        mask_BS, positions_BT, start = masks_and_positions(
            input_ids, attention_mask, position_ids, cache
        )
        bias = causal_bias(mask_BS, input_ids.shape[1], start=start, window=self.window)
        step = Step(bias, positions_BT, start, constrain)
        h_BTD, key = self.embedded(input_ids, positions_BT, dropout_key)
        h_BTD, states, new = run_layers(
            self.layers,
            h_BTD,
            lambda layer, h, past, key: layer(h, step, past, key),
            past=cache,
            key=key,
            keep_states=output_hidden_states,
            remat=remat,
            constrain=constrain,
        )
        h_BTD = pooled_BD = self.norm(h_BTD)
        if self.num_labels is not None:
            pooled_BD = last_token(h_BTD, mask_BS)

        def logits_of(h):
            return at_least_float32(self.embed.attend(h) if self.head is None else self.head(h))

        output = logits_of(pooled_BD) if readout is None else readout(logits_of, pooled_BD)
        if cache is not None:
            return output, Cache(*new, mask_BS, cache.length + input_ids.shape[1])
        return (output, (*states, h_BTD)) if output_hidden_states else output


class Layer(nnx.Module):
    """Attention and an MLP, each behind a norm and added to the stream."""

    attention: Any
    mlp: Any

    def __init__(self, make_norm: Callable[[], nnx.Module], attention, mlp):
        self.attention_norm, self.attention = make_norm(), attention
        self.mlp_norm, self.mlp = make_norm(), mlp

    def __call__(self, h_BTD, step: Step, past, key):
        normed_BTD = self.attention_norm(h_BTD)
        mixed_BTD, new = self.attention(normed_BTD, step, past, fold_key(key, 0))
        h_BTD = h_BTD + mixed_BTD
        return h_BTD + self.mlp(self.mlp_norm(h_BTD), step, fold_key(key, 1)), new


def attend_with_past(
    q_BTNH, k_BTKH, v_BTKH, step: Step, past, *, dropout_rate=0.0, dropout_key=None
):
    """`(mixed (B, T, N · H), (keys, values))` of the new tokens behind those that `past` holds.

    Without a cache nobody reads keys and values: they are None.
    """
    new = (None, None)
    if past is not None:
        new = k_BTKH, v_BTKH = tuple(
            put_columns(kept, x, step.start) for kept, x in zip(past, (k_BTKH, v_BTKH), strict=True)
        )
    k, v = k_BTKH.astype(q_BTNH.dtype), v_BTKH.astype(q_BTNH.dtype)
    mixed = attend_heads(
        q_BTNH, k, v, step.bias, dropout_rate=dropout_rate, dropout_key=dropout_key
    )
    return mixed.reshape(*mixed.shape[:2], -1), new


def make_cache(config: Any, *, batch_size: int, length: int, dtype: Any) -> Cache:
    """An empty cache for `length` columns of a decoder with this config."""
    shape = (batch_size, length, config.num_key_value_heads, config.head_dim)
    layers = config.num_hidden_layers

    def empty():
        if config.scan_layers:
            return jnp.zeros((layers, *shape), dtype)
        return tuple(jnp.zeros(shape, dtype) for _ in range(layers))

    return Cache(empty(), empty(), jnp.zeros(shape[:2], jnp.int32), jnp.zeros((), jnp.int32))


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


def _check_rows(cache: Cache | None, rows: int) -> None:
    if cache is not None and cache.mask.shape[0] != rows:
        raise RequestError(
            f"the cache is for {cache.mask.shape[0]} rows, input_ids have {rows}; make one "
            f"with model.make_cache(batch_size={rows}, length=…)"
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
