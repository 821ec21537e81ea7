"""GPT-2 (Radford et al. 2019) and the shapes of GPT-3: a pre-norm decoder, in Flax NNX.

The computation follows the released weights: learned absolute positions, layer norm before each
part, tanh GELU, one fused kernel for queries, keys and values, and a head tied to the embedding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from flax import nnx

from lora_jax.core.rules import Part
from lora_jax.models.attention import split_heads
from lora_jax.models.config_fields import (
    Activation,
    Depth,
    Fields,
    Flag,
    Positive,
    Probability,
    Size,
)
from lora_jax.models.decoder import Decoder, Layer, Step, attend_with_past
from lora_jax.models.layers import ACTIVATIONS, Embedding, LayerNorm, Linear, dropout, fold_key


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The sizes and constants of one GPT-2; field names are those of its `config.json`.

    `scan_layers` stacks the layers' parameters and is ours alone.
    """

    vocab_size: Size
    n_embd: Size
    n_layer: Depth
    n_head: Size
    n_positions: Size
    n_inner: int
    activation_function: Activation = "gelu_new"
    layer_norm_epsilon: Positive = 1e-5
    embd_pdrop: Probability = 0.1
    attn_pdrop: Probability = 0.1
    resid_pdrop: Probability = 0.1
    initializer_range: Positive = 0.02
    tie_word_embeddings: Flag = True
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
    def num_key_value_heads(self) -> int:
        return self.n_head

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def max_position_embeddings(self) -> int:
        return self.n_positions

    @classmethod
    def from_json(cls, raw: dict[str, Any], place: str) -> GPT2Config:
        """Checks the fields of a `config.json`; `RequestError` names the field and `place`."""
        fields = Fields(raw, place)
        fields.only(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
        fields.only(add_cross_attention=False)
        # Changes nothing but the order of roundings in half precision.
        fields.choice("reorder_and_upcast_attn", [False, True], False)
        width, heads = fields.integer("n_embd"), fields.integer("n_head")
        if width % heads:
            raise fields.error("n_embd", width, f"a multiple of n_head = {heads}")
        inner = fields.integer("n_inner", 4 * width)
        special = fields.special_tokens(fields.integer("vocab_size"))
        return fields.config(cls, n_inner=inner, **special)

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
    return {
        **thirds,
        "c_attn": fused,
        "o": rf"{layer}/attention/o/kernel",
        "up": rf"{layer}/mlp/up/kernel",
        "down": rf"{layer}/mlp/down/kernel",
        "embed": "embed/embedding",
        "head": "head/kernel",
        "all-linear": rf"{layer}/(attention/(qkv|o)|mlp/(up|down))/kernel",
    }


class GPT2(Decoder):
    """The decoder with learned positions; see `Decoder`."""

    name = "GPT-2"

    def __init__(self, config: GPT2Config, *, num_labels: int | None = None, rngs, **_):
        make_norm = functools.partial(LayerNorm, config.n_embd, eps=config.layer_norm_epsilon)

        def make_layer(rngs):
            return Layer(make_norm, _Attention(config, rngs=rngs), _Mlp(config, rngs=rngs))

        super().__init__(config, make_layer, make_norm(), num_labels=num_labels, rngs=rngs)
        std, self.longest = config.initializer_range, config.n_positions
        self.position = Embedding(config.n_positions, config.n_embd, std=std, rngs=rngs)

    def embedded(self, input_ids, positions_BT, dropout_key):
        h_BTD = self.embed(input_ids) + self.position(positions_BT)
        h_BTD = dropout(h_BTD, self.config.embd_pdrop, fold_key(dropout_key, 0))
        return h_BTD, fold_key(dropout_key, 1)


class _Attention(nnx.Module):
    def __init__(self, config: GPT2Config, *, rngs):
        width, std = config.n_embd, config.initializer_range
        self.qkv = Linear(width, 3 * width, std=std, rngs=rngs)
        self.o = Linear(width, width, std=std, rngs=rngs)
        self.config = config

    def __call__(self, h_BTD, step: Step, past, key):
        config, width = self.config, self.config.n_embd
        fused = self.qkv(h_BTD)
        q, k, v = (
            split_heads(fused[..., n * width : (n + 1) * width], config.n_head) for n in range(3)
        )
        q, k, v = step.placed("heads", q, k, v)
        rate, own_key = config.attn_pdrop, fold_key(key, 0)
        mixed_BTD, new = attend_with_past(
            q, k, v, step, past, dropout_rate=rate, dropout_key=own_key
        )
        return dropout(self.o(mixed_BTD), config.resid_pdrop, fold_key(key, 1)), new


class _Mlp(nnx.Module):
    def __init__(self, config: GPT2Config, *, rngs):
        width, std = config.n_embd, config.initializer_range
        self.up = Linear(width, config.n_inner, std=std, rngs=rngs)
        self.down = Linear(config.n_inner, width, std=std, rngs=rngs)
        self.config = config

    def __call__(self, h_BTD, step: Step, key):
        inner = ACTIVATIONS[self.config.activation_function](self.up(h_BTD))
        out_BTD = self.down(*step.placed("inner", inner))
        return dropout(out_BTD, self.config.resid_pdrop, key)
