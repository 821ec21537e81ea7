"""GPT-2 (Radford et al. 2019) and the shapes of GPT-3: a pre-norm decoder, in Flax NNX.

The computation follows the released weights: learned absolute positions, layer norm before each
part, tanh GELU, one fused kernel for queries, keys and values, and a head tied to the embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
from flax import nnx

from lora_jax.core.rules import Part
from lora_jax.models.attention import (
    Cache,
    attend_heads,
    causal_bias,
    make_cache,
    put_columns,
    split_heads,
)
from lora_jax.models.config_fields import MOST_LAYERS, Fields
from lora_jax.models.decoder import (
    Decoder,
    check_tokens,
    make_layers,
    masks_and_positions,
    run_layers,
)
from lora_jax.models.layers import (
    ACTIVATIONS,
    Embedding,
    LayerNorm,
    Linear,
    dropout,
    fold_key,
)


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The sizes and constants of one GPT-2; field names are those of its `config.json`.

    `scan_layers` stacks the layers' parameters and is ours alone.
    """

    vocab_size: int
    n_embd: int
    n_layer: int
    n_head: int
    n_positions: int
    n_inner: int
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    scan_layers: bool = False

    @property
    def hidden_size(self) -> int:
        return self.n_embd

    @property
    def num_hidden_layers(self) -> int:
        return self.n_layer

    @property
    def max_position_embeddings(self) -> int:
        return self.n_positions

    @classmethod
    def from_json(cls, raw: dict[str, Any], place: str) -> GPT2Config:
        """Checks the fields of a `config.json`; `RequestError` names the field and `place`."""
        fields = Fields(raw, place)
        fields.choice("scale_attn_weights", [True], True)
        fields.choice("scale_attn_by_inverse_layer_idx", [False], False)
        fields.choice("add_cross_attention", [False], False)
        # Changes nothing but the order of roundings in half precision.
        fields.choice("reorder_and_upcast_attn", [False, True], False)
        width, heads = fields.integer("n_embd"), fields.integer("n_head")
        if width % heads:
            raise fields.error("n_embd", width, f"a multiple of n_head = {heads}")
        vocab_size = fields.integer("vocab_size")
        return cls(
            vocab_size=vocab_size,
            n_embd=width,
            n_layer=fields.integer("n_layer", maximum=MOST_LAYERS),
            n_head=heads,
            n_positions=fields.integer("n_positions"),
            n_inner=fields.integer("n_inner", 4 * width),
            activation_function=fields.choice(
                "activation_function", ACTIVATIONS, cls.activation_function
            ),
            layer_norm_epsilon=fields.positive("layer_norm_epsilon", cls.layer_norm_epsilon),
            embd_pdrop=fields.probability("embd_pdrop", cls.embd_pdrop),
            attn_pdrop=fields.probability("attn_pdrop", cls.attn_pdrop),
            resid_pdrop=fields.probability("resid_pdrop", cls.resid_pdrop),
            initializer_range=fields.positive("initializer_range", cls.initializer_range),
            tie_word_embeddings=fields.choice("tie_word_embeddings", [True, False], True),
            **fields.special_tokens(vocab_size),
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the object that transformers and `from_json` read."""
        raw = dataclasses.asdict(self)
        del raw["scan_layers"]
        return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **raw}


def gpt2_aliases(config: GPT2Config) -> Mapping[str, str | Part]:
    """Regexes of parameter paths by short name; q, k and v are thirds of the fused kernel."""
    layer = "layers" if config.scan_layers else r"layers/\d+"
    width, fused = config.n_embd, rf"{layer}/attention/qkv/kernel"
    thirds = {
        name: Part(fused, (-1, place * width, (place + 1) * width))
        for place, name in enumerate("qkv")
    }
    return MappingProxyType(
        {
            **thirds,
            "c_attn": fused,
            "o": rf"{layer}/attention/o/kernel",
            "up": rf"{layer}/mlp/up/kernel",
            "down": rf"{layer}/mlp/down/kernel",
            "embed": "embed/embedding",
            "head": "head/kernel",
            "all-linear": rf"{layer}/(attention/(qkv|o)|mlp/(up|down))/kernel",
        }
    )


class GPT2(Decoder):
    """The decoder and its head: the embedding's own table, or `head/kernel` where untied.

    With `num_labels` the head is a classifier on the last token that is no padding.
    """

    def __init__(self, config: GPT2Config, *, num_labels: int | None = None, rngs, **_):
        std, width = config.initializer_range, config.n_embd
        self.embed = Embedding(config.vocab_size, width, std=std, rngs=rngs)
        self.position = Embedding(config.n_positions, width, std=std, rngs=rngs)
        self.layers = make_layers(
            lambda rngs: _Layer(config, rngs=rngs),
            config.n_layer,
            stacked=config.scan_layers,
            rngs=rngs,
        )
        self.norm = LayerNorm(width, eps=config.layer_norm_epsilon)
        is_tied = num_labels is None and config.tie_word_embeddings
        size = config.vocab_size if num_labels is None else num_labels
        self.head = None if is_tied else Linear(width, size, std=std, rngs=rngs, use_bias=False)
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
        integers; `position_ids` (B, T) default to the column, padding or not. With a `cache` the
        tokens follow what it holds, and `(logits, cache)` is returned. `output_hidden_states=True`
        returns `(output, (embeddings, after layer 0, …, after the last norm))`. Dropout acts only
        with a `dropout_key`. Raises `RequestError` for shapes that do not fit.
        """
        config = self.config
        check_tokens("GPT-2", input_ids, attention_mask, longest=config.n_positions, cache=cache)
        mask_BS, positions_BT, start = masks_and_positions(
            input_ids, attention_mask, position_ids, cache
        )
        bias = causal_bias(mask_BS, input_ids.shape[1], start=start)
        h_BTD = self.embed(input_ids) + self.position(positions_BT)
        h_BTD = dropout(h_BTD, config.embd_pdrop, fold_key(dropout_key, 0))

        def call(layer, h, past, key):
            return layer(h, bias, past, start, key, constrain)

        h_BTD, states, new = run_layers(
            self.layers,
            h_BTD,
            call,
            past=cache,
            key=fold_key(dropout_key, 1),
            keep_states=output_hidden_states,
            remat=remat,
            constrain=constrain,
        )
        if cache is not None:
            cache = Cache(*new, mask_BS, cache.length + input_ids.shape[1])
        states = states if output_hidden_states else None
        return self.finish(h_BTD, mask_BS, cache, states, readout)


def gpt2_cache(config: GPT2Config, *, batch_size: int, length: int, dtype) -> Cache:
    """An empty cache for `length` columns."""
    return make_cache(
        num_layers=config.n_layer,
        num_heads=config.n_head,
        width=config.n_embd // config.n_head,
        batch_size=batch_size,
        length=length,
        dtype=dtype,
        is_stacked=config.scan_layers,
    )


class _Layer(nnx.Module):
    def __init__(self, config: GPT2Config, *, rngs):
        width, eps = config.n_embd, config.layer_norm_epsilon
        self.attention_norm = LayerNorm(width, eps=eps)
        self.attention = _Attention(config, rngs=rngs)
        self.mlp_norm = LayerNorm(width, eps=eps)
        self.mlp = _Mlp(config, rngs=rngs)

    def __call__(self, h_BTD, bias, past, start, key, constrain=None):
        mixed, new = self.attention(
            self.attention_norm(h_BTD), bias, past, start, fold_key(key, 0), constrain
        )
        h_BTD = h_BTD + mixed
        return h_BTD + self.mlp(self.mlp_norm(h_BTD), fold_key(key, 1), constrain), new


class _Attention(nnx.Module):
    def __init__(self, config: GPT2Config, *, rngs):
        width, std = config.n_embd, config.initializer_range
        self.qkv = Linear(width, 3 * width, std=std, rngs=rngs)
        self.o = Linear(width, width, std=std, rngs=rngs)
        self.config = config

    def __call__(self, h_BTD, bias, past, start, key, constrain=None):
        config, width = self.config, self.config.n_embd
        fused = self.qkv(h_BTD)
        q, k, v = (
            split_heads(fused[..., n * width : (n + 1) * width], config.n_head) for n in range(3)
        )
        if constrain is not None:
            q, k, v = (constrain(x, "heads") for x in (q, k, v))
        if past is not None:
            k, v = (put_columns(kept, new, start) for kept, new in zip(past, (k, v), strict=True))
        mixed = attend_heads(
            q,
            k.astype(q.dtype),
            v.astype(q.dtype),
            bias,
            dropout_rate=config.attn_pdrop,
            dropout_key=fold_key(key, 0),
        )
        out_BTD = self.o(mixed.reshape(h_BTD.shape))
        # Kept only where there is a cache: without one nobody reads them.
        new = (None, None) if past is None else (k, v)
        return dropout(out_BTD, config.resid_pdrop, fold_key(key, 1)), new


class _Mlp(nnx.Module):
    def __init__(self, config: GPT2Config, *, rngs):
        width, std = config.n_embd, config.initializer_range
        self.up = Linear(width, config.n_inner, std=std, rngs=rngs)
        self.down = Linear(config.n_inner, width, std=std, rngs=rngs)
        self.config = config

    def __call__(self, h_BTD, key, constrain=None):
        inner = ACTIVATIONS[self.config.activation_function](self.up(h_BTD))
        inner = inner if constrain is None else constrain(inner, "inner")
        return dropout(self.down(inner), self.config.resid_pdrop, key)
