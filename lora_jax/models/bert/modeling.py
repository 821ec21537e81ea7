"""BERT (Devlin et al., 2019, arXiv:1810.04805): a post-norm bidirectional encoder, in Flax NNX.

The computation follows the released weights: learned absolute positions counted from the first
column of the batch, exact (erf) GELU, layer norm after each residual sum.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from lora_jax.models.attention import attend_heads, check_tokens, mask_bias, split_heads
from lora_jax.models.config_fields import (
    Activation,
    Depth,
    Fields,
    Index,
    Positive,
    Probability,
    Size,
)
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
ALIASES: Mapping[str, str] = {
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


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The sizes and constants of one BERT; field names are those of its `config.json`."""

    vocab_size: Size
    hidden_size: Size
    num_hidden_layers: Depth
    num_attention_heads: Size
    intermediate_size: Size
    max_position_embeddings: Size
    type_vocab_size: Size = 2
    hidden_act: Activation = "gelu"
    layer_norm_eps: Positive = 1e-12
    hidden_dropout_prob: Probability = 0.1
    attention_probs_dropout_prob: Probability = 0.1
    initializer_range: Positive = 0.02
    pad_token_id: Index = 0

    @classmethod
    def from_json(cls, raw: dict[str, Any], place: str) -> "BertConfig":
        """Checks the fields of a `config.json`; `RequestError` names the field and `place`."""
        fields = Fields(raw, place)
        fields.only(position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
        config = fields.config(cls)
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

    name = "BERT"
    has_pooler = True
    head: Any

    def __init__(
        self,
        config: BertConfig,
        *,
        num_labels: int | None = None,
        pooling: str = "cls",
        rngs: nnx.Rngs,
    ):
        size, std = config.hidden_size, config.initializer_range
        self.embeddings = Embeddings(config, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)
        self.pooling = pooling
        self.config = config
        self.head = None if num_labels is None else self.make_head(num_labels, rngs)
        # There without a head, too: it is the encoder's, and files of encoders hold it.
        has_pooler = self.has_pooler and pooling == FAMILY
        self.pooler = Linear(size, size, std=std, rngs=rngs) if has_pooler else None

    def make_head(self, num_labels: int, rngs: nnx.Rngs) -> nnx.Module:
        """The classifier, whose call is `classified`'s."""
        return Linear(self.config.hidden_size, num_labels, std=0.02, rngs=rngs)

    @property
    def longest(self) -> int:
        """The longest sequence, in tokens."""
        return self.config.max_position_embeddings

    def positions(self, input_ids: jax.Array) -> jax.Array | None:
        """(B, T), or None: counted from the first column."""
        return None

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
        check_tokens(
            self.name,
            input_ids,
            self.longest,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
        )
        if attention_mask is None:
            attention_mask = jnp.ones(jnp.shape(input_ids), jnp.int32)
        key = fold_key(dropout_key, 0)
        h_BTD = self.embeddings(input_ids, token_type_ids, key, self.positions(input_ids))
        key = fold_key(dropout_key, 1)
        states = self.encoder(h_BTD, mask_bias(attention_mask), key, remat, constrain)
        output = states[-1]
        if self.head is not None:
            output = self.classified(output, attention_mask, fold_key(dropout_key, 2))
        return (output, states) if output_hidden_states else output

    def classified(self, h_BTD: jax.Array, mask_BT: jax.Array, key: jax.Array | None) -> jax.Array:
        """(B, num_labels) in float32 or wider."""
        if self.pooler is None:
            pooled_BD = POOLINGS[self.pooling](at_least_float32(h_BTD), mask_BT)
        else:
            pooled_BD = jnp.tanh(self.pooler(at_least_float32(h_BTD[:, 0])))
        return self.head(dropout(pooled_BD, self.config.hidden_dropout_prob, key))


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
        config = self.config
        q, k, v = (
            split_heads(part(h_BTD), config.num_attention_heads)
            for part in (self.query, self.key, self.value)
        )
        rate = config.attention_probs_dropout_prob
        mixed = attend_heads(q, k, v, bias, dropout_rate=rate, dropout_key=fold_key(key, 0))
        out_BTD = self.output(mixed.reshape(h_BTD.shape))
        return self.norm(h_BTD + dropout(out_BTD, config.hidden_dropout_prob, fold_key(key, 1)))


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
