"""BERT (Devlin et al., 2019, arXiv:1810.04805): a post-norm bidirectional encoder, in Flax NNX.

The computation follows the released weights: learned absolute positions counted from the first
column of the batch, exact (erf) GELU, layer norm after each residual sum.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from lora_jax.core.errors import RequestError
from lora_jax.models.attention import attend, mask_bias
from lora_jax.models.config_fields import MOST_LAYERS, Fields
from lora_jax.models.layers import (
    ACTIVATIONS,
    Embedding,
    LayerNorm,
    Linear,
    at_least_float32,
    dropout,
    fold_key,
)
from lora_jax.models.pooling import FAMILY, POOLINGS
from lora_jax.models.remat import rematerialised

_LAYER = r"encoder/layers/\d+"
ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "q": rf"{_LAYER}/attention/query/kernel",
        "k": rf"{_LAYER}/attention/key/kernel",
        "v": rf"{_LAYER}/attention/value/kernel",
        "o": rf"{_LAYER}/attention/output/kernel",
        "up": rf"{_LAYER}/mlp/intermediate/kernel",
        "down": rf"{_LAYER}/mlp/output/kernel",
        "embed": r"embeddings/word/embedding",
        "head": r"head/kernel",
        "all-linear": rf"{_LAYER}/(attention/(query|key|value|output)|mlp/(intermediate|output))"
        r"/kernel",
    }
)


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The sizes and constants of one BERT; field names are those of its `config.json`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    pad_token_id: int = 0

    @classmethod
    def from_json(cls, raw: dict[str, Any], place: str) -> "BertConfig":
        """Checks the fields of a `config.json`; `RequestError` names the field and `place`."""
        fields = Fields(raw, place)
        fields.choice("position_embedding_type", ["absolute"], "absolute")
        fields.choice("is_decoder", [False], False)
        fields.choice("add_cross_attention", [False], False)
        config = cls(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            num_hidden_layers=fields.integer("num_hidden_layers", maximum=MOST_LAYERS),
            num_attention_heads=fields.integer("num_attention_heads"),
            intermediate_size=fields.integer("intermediate_size"),
            max_position_embeddings=fields.integer("max_position_embeddings"),
            type_vocab_size=fields.integer("type_vocab_size", cls.type_vocab_size),
            hidden_act=fields.choice("hidden_act", ACTIVATIONS, cls.hidden_act),
            layer_norm_eps=fields.positive("layer_norm_eps", cls.layer_norm_eps),
            hidden_dropout_prob=fields.probability("hidden_dropout_prob", cls.hidden_dropout_prob),
            attention_probs_dropout_prob=fields.probability(
                "attention_probs_dropout_prob", cls.attention_probs_dropout_prob
            ),
            initializer_range=fields.positive("initializer_range", cls.initializer_range),
            pad_token_id=fields.integer("pad_token_id", cls.pad_token_id, minimum=0),
        )
        if config.hidden_size % config.num_attention_heads:
            raise fields.error(
                "hidden_size",
                config.hidden_size,
                f"a multiple of num_attention_heads = {config.num_attention_heads}",
            )
        if config.pad_token_id >= config.vocab_size:
            wanted = f"below vocab_size = {config.vocab_size}"
            raise fields.error("pad_token_id", config.pad_token_id, wanted)
        return config

    def to_json(self) -> dict[str, Any]:
        """Returns the object that transformers and `from_json` read."""
        return {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "position_embedding_type": "absolute",
            **dataclasses.asdict(self),
        }


class Bert(nnx.Module):
    """The encoder, and with `num_labels` a linear head on its pooled output.

    `pooling="family"` is BERT's own: tanh of a linear layer (`pooler`) on the first token.
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        num_labels: int | None = None,
        pooling: str = "cls",
        rngs: nnx.Rngs,
    ):
        size = config.hidden_size
        self.embeddings = Embeddings(config, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)
        std = config.initializer_range
        self.head = None if num_labels is None else Linear(size, num_labels, std=0.02, rngs=rngs)
        # There without a head, too: it is the encoder's, and files of encoders hold it.
        self.pooler = Linear(size, size, std=std, rngs=rngs) if pooling == FAMILY else None
        self.pooling = pooling
        self.config = config

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        *,
        output_hidden_states: bool = False,
        dropout_key: jax.Array | None = None,
        remat: str = "",
        constrain: Callable | None = None,
    ):
        """Last hidden state (B, T, D), or float32 logits (B, num_labels) with a head.

        `input_ids`, `attention_mask` (1 to attend, 0 padding; all 1 by default) and
        `token_type_ids` are (B, T) integers. `output_hidden_states=True` returns `(output,
        (embeddings, layer 0, …))`. Dropout acts only with a `dropout_key`; `remat` is a policy of
        `models.remat`. Raises `RequestError` for shapes that do not fit.
        """
        attention_mask = check_inputs(
            "BERT", input_ids, attention_mask, token_type_ids,
            longest=self.config.max_position_embeddings,
        )  # fmt: skip
        h_BTD = self.embeddings(input_ids, token_type_ids, fold_key(dropout_key, 0))
        key = fold_key(dropout_key, 1)
        states = self.encoder(h_BTD, mask_bias(attention_mask), key, remat, constrain)
        output = states[-1]
        if self.head is not None:
            if self.pooler is None:
                pooled_BD = POOLINGS[self.pooling](at_least_float32(output), attention_mask)
            else:
                pooled_BD = jnp.tanh(self.pooler(at_least_float32(output[:, 0])))
            rate = self.config.hidden_dropout_prob
            output = self.head(dropout(pooled_BD, rate, fold_key(dropout_key, 2)))
        return (output, states) if output_hidden_states else output


class Embeddings(nnx.Module):
    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        size, std = config.hidden_size, config.initializer_range
        self.word = Embedding(config.vocab_size, size, std=std, rngs=rngs)
        self.position = Embedding(config.max_position_embeddings, size, std=std, rngs=rngs)
        self.token_type = Embedding(config.type_vocab_size, size, std=std, rngs=rngs)
        self.norm = LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout_rate = config.hidden_dropout_prob

    def __call__(self, input_ids, token_type_ids, key, positions_BT=None):
        # A slice and a row where indices are known: no gather, and no scatter-add in its gradient.
        if positions_BT is None:
            position = self.position.embedding[...][: input_ids.shape[1]]
        else:
            position = self.position(positions_BT)
        if token_type_ids is None:
            token_type = self.token_type.embedding[...][0]
        else:
            token_type = self.token_type(token_type_ids)
        word_BTD = self.word(input_ids)
        token_type, position = (
            lax.broadcast_to_rank(x, word_BTD.ndim) for x in (token_type, position)
        )
        h_BTD = self.norm(word_BTD + token_type + position)
        return dropout(h_BTD, self.dropout_rate, key)


class Encoder(nnx.Module):
    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.layers = nnx.List([_Layer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, h_BTD, bias, key, remat: str = "", constrain: Callable | None = None):
        """The states (B, T, D) before, between and after the layers."""
        constrain = constrain or (lambda h: h)
        states = [constrain(h_BTD)]
        call = rematerialised(lambda layer, *arrays: layer(*arrays), remat)
        for number, layer in enumerate(self.layers):
            states.append(constrain(call(layer, states[-1], bias, fold_key(key, number))))
        return tuple(states)


class _Layer(nnx.Module):
    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.attention = _Attention(config, rngs=rngs)
        self.mlp = _Mlp(config, rngs=rngs)

    def __call__(self, h_BTD, bias, key):
        h_BTD = self.attention(h_BTD, bias, fold_key(key, 0))
        return self.mlp(h_BTD, fold_key(key, 1))


class _Attention(nnx.Module):
    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        size, std = config.hidden_size, config.initializer_range
        self.query = Linear(size, size, std=std, rngs=rngs)
        self.key = Linear(size, size, std=std, rngs=rngs)
        self.value = Linear(size, size, std=std, rngs=rngs)
        self.output = Linear(size, size, std=std, rngs=rngs)
        self.norm = LayerNorm(size, eps=config.layer_norm_eps)
        self.config = config

    def __call__(self, h_BTD, bias, key):
        mixed_BTD = attend(
            self.query(h_BTD),
            self.key(h_BTD),
            self.value(h_BTD),
            bias,
            num_heads=self.config.num_attention_heads,
            dropout_rate=self.config.attention_probs_dropout_prob,
            dropout_key=fold_key(key, 0),
        )
        out_BTD = dropout(self.output(mixed_BTD), self.config.hidden_dropout_prob, fold_key(key, 1))
        return self.norm(h_BTD + out_BTD)


class _Mlp(nnx.Module):
    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        size, inner, std = config.hidden_size, config.intermediate_size, config.initializer_range
        self.intermediate = Linear(size, inner, std=std, rngs=rngs)
        self.output = Linear(inner, size, std=std, rngs=rngs)
        self.norm = LayerNorm(size, eps=config.layer_norm_eps)
        self.config = config

    def __call__(self, h_BTD, key):
        inner_BTF = ACTIVATIONS[self.config.hidden_act](self.intermediate(h_BTD))
        out_BTD = dropout(self.output(inner_BTF), self.config.hidden_dropout_prob, key)
        return self.norm(h_BTD + out_BTD)


def check_inputs(name, input_ids, attention_mask, token_type_ids, *, longest: int) -> jax.Array:
    """The attention mask, ones if None. Raises `RequestError` for inputs that do not fit."""
    shape = jnp.shape(input_ids)
    if len(shape) != 2 or not jnp.issubdtype(jnp.result_type(input_ids), jnp.integer):
        kind = f"{jnp.result_type(input_ids)} {shape}"
        raise RequestError(f"input_ids are {kind}; {name} takes integers of shape (batch, time)")
    for what, value in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
        if value is not None and jnp.shape(value) != shape:
            raise RequestError(f"{what} has shape {jnp.shape(value)}, input_ids have {shape}")
    if shape[1] > longest:
        raise RequestError(
            f"a sequence of {shape[1]} tokens is longer than the model's {longest} positions; "
            "truncate the texts (data.max_length)"
        )
    return jnp.ones(shape, jnp.int32) if attention_mask is None else attention_mask
