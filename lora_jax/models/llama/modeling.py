"""Llama and its relatives (Mistral, Qwen2, SmolLM2): a pre-norm decoder, in Flax NNX.

Touvron et al. 2023, arXiv:2302.13971: RMSNorm before each part, SwiGLU, rotary positions; grouped
queries as in Llama 2 (arXiv:2307.09288). The relatives differ in fields of the config alone.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx

from lora_jax.models.attention import (
    Cache,
    attend_heads,
    causal_bias,
    make_cache,
    put_columns,
    rope_frequencies,
    rotate,
    split_heads,
)
from lora_jax.models.decoder import (
    Decoder,
    check_tokens,
    make_layers,
    masks_and_positions,
    run_layers,
)
from lora_jax.models.layers import ACTIVATIONS, Embedding, Linear, RMSNorm
from lora_jax.models.llama.config import LlamaConfig


class Llama(Decoder):
    """The decoder and its head: `head/kernel`, or the embedding's own table where tied.

    With `num_labels` the head is a classifier on the last token that is no padding.
    """

    def __init__(self, config: LlamaConfig, *, num_labels: int | None = None, rngs, **_):
        std = config.initializer_range
        self.embed = Embedding(config.vocab_size, config.hidden_size, std=std, rngs=rngs)
        self.layers = make_layers(
            lambda rngs: _Layer(config, rngs=rngs),
            config.num_hidden_layers,
            stacked=config.scan_layers,
            rngs=rngs,
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        is_tied = num_labels is None and config.tie_word_embeddings
        size = config.vocab_size if num_labels is None else num_labels
        self.head = (
            None
            if is_tied
            else Linear(config.hidden_size, size, std=std, rngs=rngs, use_bias=False)
        )
        self.num_labels = num_labels
        self.config = config

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

        `input_ids` and `attention_mask` (1 real, 0 padding; all real by default) are (B, T)
        integers; `position_ids` (B, T) default to the column. With a `cache` the tokens follow what
        it holds, and `(logits, cache)` is returned. `output_hidden_states=True` returns `(output,
        (embeddings, after layer 0, …, after the last norm))`; a `readout` changes the output, see
        `Decoder.finish`. There is no dropout in this family.
        Raises `RequestError` for shapes that do not fit.
        """
        config = self.config
        check_tokens(config.model_type, input_ids, attention_mask, longest=None, cache=cache)
        mask_BS, positions_BT, start = masks_and_positions(
            input_ids, attention_mask, position_ids, cache
        )
        window = config.sliding_window
        bias = causal_bias(mask_BS, input_ids.shape[1], start=start, window=window)

        def call(layer, h, past, _):
            return layer(h, bias, positions_BT, past, start, constrain)

        h_BTD, states, new = run_layers(
            self.layers,
            self.embed(input_ids),
            call,
            past=cache,
            key=None,
            keep_states=output_hidden_states,
            remat=remat,
            constrain=constrain,
        )
        if cache is not None:
            cache = Cache(*new, mask_BS, cache.length + input_ids.shape[1])
        states = states if output_hidden_states else None
        return self.finish(h_BTD, mask_BS, cache, states, readout)


def llama_cache(config: LlamaConfig, *, batch_size: int, length: int, dtype) -> Cache:
    """An empty cache for `length` columns."""
    return make_cache(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_key_value_heads,
        width=config.head_dim,
        batch_size=batch_size,
        length=length,
        dtype=dtype,
        is_stacked=config.scan_layers,
    )


class _Layer(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs):
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = _Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = _Mlp(config, rngs=rngs)

    def __call__(self, h_BTD, bias, positions_BT, past, start, constrain=None):
        mixed, new = self.attention(
            self.attention_norm(h_BTD), bias, positions_BT, past, start, constrain
        )
        h_BTD = h_BTD + mixed
        return h_BTD + self.mlp(self.mlp_norm(h_BTD), constrain), new


class _Attention(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs):
        size, std = config.hidden_size, config.initializer_range
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q = Linear(size, queries, std=std, rngs=rngs, use_bias=config.qkv_bias)
        self.k = Linear(size, keys, std=std, rngs=rngs, use_bias=config.qkv_bias)
        self.v = Linear(size, keys, std=std, rngs=rngs, use_bias=config.qkv_bias)
        self.o = Linear(queries, size, std=std, rngs=rngs, use_bias=config.o_bias)
        self.config = config

    def __call__(self, h_BTD, bias, positions_BT, past, start, constrain=None):
        config = self.config
        scaling = dict(config.rope_scaling) if config.rope_scaling else None
        frequencies = rope_frequencies(config.head_dim, config.rope_theta, scaling)
        q_BTNH = split_heads(self.q(h_BTD), config.num_attention_heads)
        k_BTKH = split_heads(self.k(h_BTD), config.num_key_value_heads)
        v_BTKH = split_heads(self.v(h_BTD), config.num_key_value_heads)
        if constrain is not None:
            q_BTNH, k_BTKH, v_BTKH = (constrain(x, "heads") for x in (q_BTNH, k_BTKH, v_BTKH))
        q_BTNH = rotate(q_BTNH, positions_BT, frequencies)
        k_BTKH = rotate(k_BTKH, positions_BT, frequencies)
        if past is not None:
            k_BTKH, v_BTKH = (
                put_columns(kept, new, start)
                for kept, new in zip(past, (k_BTKH, v_BTKH), strict=True)
            )
        mixed = attend_heads(q_BTNH, k_BTKH.astype(q_BTNH.dtype), v_BTKH.astype(q_BTNH.dtype), bias)
        # Kept only where there is a cache: without one nobody reads them.
        new = (None, None) if past is None else (k_BTKH, v_BTKH)
        return self.o(mixed.reshape(*h_BTD.shape[:-1], -1)), new


class _Mlp(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs):
        size, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        make = lambda n, m: Linear(n, m, std=std, rngs=rngs, use_bias=config.mlp_bias)  # noqa: E731
        self.gate, self.up, self.down = make(size, inner), make(size, inner), make(inner, size)
        self.activation = config.hidden_act

    def __call__(self, h_BTD, constrain=None):
        inner = ACTIVATIONS[self.activation](self.gate(h_BTD)) * self.up(h_BTD)
        return self.down(inner if constrain is None else constrain(inner, "inner"))
