"""Llama and its relatives (Mistral, Qwen2, SmolLM2): a pre-norm decoder, in Flax NNX.

Touvron et al. 2023, arXiv:2302.13971: RMSNorm before each part, SwiGLU, rotary positions; grouped
queries as in Llama 2 (arXiv:2307.09288). The relatives differ in fields of the config alone.
"""

from __future__ import annotations

import functools

from flax import nnx

from lora_jax.models.attention import rope_frequencies, rotate, split_heads
from lora_jax.models.decoder import Decoder, Layer, Step, attend_with_past
from lora_jax.models.layers import ACTIVATIONS, Linear, RMSNorm
from lora_jax.models.llama.config import LlamaConfig


class Llama(Decoder):
    """The decoder with rotary positions and without dropout; see `Decoder`."""

    def __init__(self, config: LlamaConfig, *, num_labels: int | None = None, rngs, **_):
        make_norm = functools.partial(RMSNorm, config.hidden_size, eps=config.rms_norm_eps)

        def make_layer(rngs):
            return Layer(make_norm, _Attention(config, rngs=rngs), _Mlp(config, rngs=rngs))

        super().__init__(config, make_layer, make_norm(), num_labels=num_labels, rngs=rngs)
        self.name, self.window = config.model_type, config.sliding_window


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

    def __call__(self, h_BTD, step: Step, past, key):
        config = self.config
        scaling = dict(config.rope_scaling) if config.rope_scaling else None
        frequencies = rope_frequencies(config.head_dim, config.rope_theta, scaling)
        q_BTNH, k_BTKH, v_BTKH = step.placed(
            "heads",
            split_heads(self.q(h_BTD), config.num_attention_heads),
            split_heads(self.k(h_BTD), config.num_key_value_heads),
            split_heads(self.v(h_BTD), config.num_key_value_heads),
        )
        q_BTNH = rotate(q_BTNH, step.positions_BT, frequencies)
        k_BTKH = rotate(k_BTKH, step.positions_BT, frequencies)
        mixed, new = attend_with_past(q_BTNH, k_BTKH, v_BTKH, step, past)
        return self.o(mixed), new


class _Mlp(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs):
        size, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        make = lambda n, m: Linear(n, m, std=std, rngs=rngs, use_bias=config.mlp_bias)  # noqa: E731
        self.gate, self.up, self.down = make(size, inner), make(size, inner), make(inner, size)
        self.activation = config.hidden_act

    def __call__(self, h_BTD, step: Step, key):
        inner = ACTIVATIONS[self.activation](self.gate(h_BTD)) * self.up(h_BTD)
        return self.down(*step.placed("inner", inner))
