"""Llama and its relatives (Mistral, Qwen2, SmolLM2): a pre-norm decoder, in Flax NNX.

Touvron et al. 2023, arXiv:2302.13971: RMSNorm before each part, SwiGLU, rotary positions; grouped
queries as in Llama 2 (arXiv:2307.09288). The relatives differ in fields of the config alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

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
from lora_jax.models.config_fields import Fields
from lora_jax.models.decoder import check_tokens, make_layers, masks_and_positions, run_layers
from lora_jax.models.layers import ACTIVATIONS, Embedding, Linear, RMSNorm, at_least_float32
from lora_jax.models.pooling import last_token

MODEL_TYPES = ("llama", "mistral", "qwen2")
_ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes and constants of one model; field names are those of its `config.json`.

    `rope_scaling` is None or {"rope_type", …} (see `rope_frequencies`), as sorted pairs so that the
    config is hashable; `scan_layers` stacks the layers' parameters and is ours alone.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, Any], ...] | None = None
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    initializer_range: float = 0.02
    model_type: str = "llama"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    scan_layers: bool = False

    @classmethod
    def from_json(cls, raw: dict[str, Any], place: str) -> LlamaConfig:
        """Checks the fields of a `config.json`; `RequestError` names the field and `place`."""
        fields = Fields(raw, place)
        model_type = fields.choice("model_type", MODEL_TYPES)
        hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        if raw.get("head_dim") is None and hidden % heads:
            raise fields.error(
                "hidden_size", hidden, f"a multiple of num_attention_heads = {heads}"
            )
        key_heads = fields.integer("num_key_value_heads", heads)
        if heads % key_heads:
            wanted = f"a divisor of num_attention_heads = {heads}"
            raise fields.error("num_key_value_heads", key_heads, wanted)
        head_dim = fields.integer("head_dim", hidden // heads)
        if head_dim % 2:
            raise fields.error("head_dim", head_dim, "even: rotary positions turn pairs")
        theta, scaling = _read_rope(fields)
        has_bias = fields.choice("attention_bias", [False, True], False)
        vocab_size = fields.integer("vocab_size")
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_hidden_layers=fields.integer("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            head_dim=head_dim,
            max_position_embeddings=fields.integer("max_position_embeddings"),
            rms_norm_eps=fields.positive("rms_norm_eps", cls.rms_norm_eps),
            rope_theta=theta,
            rope_scaling=scaling,
            hidden_act=fields.choice("hidden_act", ACTIVATIONS, cls.hidden_act),
            tie_word_embeddings=fields.choice("tie_word_embeddings", [False, True], False),
            qkv_bias=has_bias or model_type == "qwen2",
            o_bias=has_bias and model_type == "llama",
            mlp_bias=fields.choice("mlp_bias", [False, True], False),
            sliding_window=_read_window(fields, model_type),
            initializer_range=fields.positive("initializer_range", cls.initializer_range),
            model_type=model_type,
            **fields.special_tokens(vocab_size),
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the object that transformers (4 and 5) and `from_json` read."""
        raw = dataclasses.asdict(self)
        for name in ("qkv_bias", "o_bias", "scan_layers"):
            del raw[name]
        if self.model_type == "llama":
            raw["attention_bias"] = self.qkv_bias
        if self.model_type == "qwen2":
            raw["use_sliding_window"] = False
        scaling = dict(self.rope_scaling) if self.rope_scaling else None
        rope = {"rope_theta": self.rope_theta, "rope_type": "default", **(scaling or {})}
        return {
            **raw,
            "architectures": [f"{class_name(self)}ForCausalLM"],
            "rope_scaling": scaling,
            "rope_parameters": rope,
        }


def _read_rope(fields: Fields) -> tuple[float, tuple[tuple[str, Any], ...] | None]:
    """`(theta, scaling)`: transformers 4 has two fields for it, transformers 5 one."""
    both = fields.mapping("rope_scaling") or {}
    newer = fields.mapping("rope_parameters") or {}
    rope = {**both, **newer}
    inner = fields.inner("rope_parameters" if newer else "rope_scaling", rope)
    theta = fields.positive("rope_theta", LlamaConfig.rope_theta)
    theta = inner.positive("rope_theta", theta)
    kind = inner.choice("rope_type", _ROPE_NUMBERS, rope.get("type", "default"))
    if kind == "default":
        return theta, None
    # The last one counts tokens: transformers warns of anything but an integer.
    numbers: dict[str, Any] = {
        name: inner.integer(name) if name.startswith("original") else inner.positive(name)
        for name in _ROPE_NUMBERS[kind]
    }
    if kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        wanted = f"above low_freq_factor = {numbers['low_freq_factor']}"
        raise inner.error("high_freq_factor", numbers["high_freq_factor"], wanted)
    return theta, (("rope_type", kind), *numbers.items())


def _read_window(fields: Fields, model_type: str) -> int | None:
    if model_type == "llama":
        return None
    if model_type == "qwen2":
        # With it, only some of the layers have a window.
        fields.choice("use_sliding_window", [False], False)
        return None
    return fields.integer("sliding_window", None)


def class_name(config: LlamaConfig) -> str:
    """What transformers' classes of this model begin with."""
    return {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[config.model_type]


def llama_aliases(config: LlamaConfig) -> Mapping[str, str]:
    """Regexes of parameter paths by short name."""
    layer = "layers" if config.scan_layers else r"layers/\d+"
    of_attention = {name: rf"{layer}/attention/{name}/kernel" for name in "qkvo"}
    of_mlp = {name: rf"{layer}/mlp/{name}/kernel" for name in ("gate", "up", "down")}
    return {
        **of_attention,
        **of_mlp,
        "embed": "embed/embedding",
        "head": "head/kernel",
        "all-linear": rf"{layer}/(attention/[qkvo]|mlp/(gate|up|down))/kernel",
    }


class Llama(nnx.Module):
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
    ):
        """Logits (B, T, vocab) in float32 or wider; (B, num_labels) of a classifier.

        `input_ids` and `attention_mask` (1 real, 0 padding; all real by default) are (B, T)
        integers; `position_ids` (B, T) default to the column. With a `cache` the tokens follow what
        it holds, and `(logits, cache)` is returned. `output_hidden_states=True` returns `(output,
        (embeddings, after layer 0, …, after the last norm))`. There is no dropout in this family.
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
            return layer(h, bias, positions_BT, past, start)

        h_BTD, states, (keys, values) = run_layers(
            self.layers,
            self.embed(input_ids),
            call,
            past=cache,
            key=None,
            keep_states=output_hidden_states,
        )
        h_BTD = self.norm(h_BTD)
        output = self._output(h_BTD, mask_BS)
        if cache is not None:
            return output, Cache(keys, values, mask_BS, start + input_ids.shape[1])
        return (output, (*states, h_BTD)) if output_hidden_states else output

    def _output(self, h_BTD, mask_BS):
        if self.num_labels is not None:
            h_BTD = last_token(h_BTD, mask_BS)
        scores = self.embed.attend(h_BTD) if self.head is None else self.head(h_BTD)
        return at_least_float32(scores)


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

    def __call__(self, h_BTD, bias, positions_BT, past, start):
        mixed, new = self.attention(self.attention_norm(h_BTD), bias, positions_BT, past, start)
        h_BTD = h_BTD + mixed
        return h_BTD + self.mlp(self.mlp_norm(h_BTD)), new


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

    def __call__(self, h_BTD, bias, positions_BT, past, start):
        config = self.config
        scaling = dict(config.rope_scaling) if config.rope_scaling else None
        frequencies = rope_frequencies(config.head_dim, config.rope_theta, scaling)
        q_BTNH = split_heads(self.q(h_BTD), config.num_attention_heads)
        k_BTKH = split_heads(self.k(h_BTD), config.num_key_value_heads)
        v_BTKH = split_heads(self.v(h_BTD), config.num_key_value_heads)
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

    def __call__(self, h_BTD):
        gate = ACTIVATIONS[self.activation](self.gate(h_BTD))
        return self.down(gate * self.up(h_BTD))
