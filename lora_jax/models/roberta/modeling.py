"""RoBERTa (Liu et al. 2019, arXiv:1907.11692): BERT's encoder with other positions and head.

Positions count the tokens that are no padding, from `pad_token_id` + 1 on; there is one token type;
the classifier is a linear layer, tanh, and a linear layer on the first token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.models.attention import mask_bias
from lora_jax.models.bert.modeling import ALIASES as BERT_ALIASES
from lora_jax.models.bert.modeling import BertConfig, Embeddings, Encoder, check_inputs
from lora_jax.models.layers import Linear, at_least_float32, dropout, fold_key
from lora_jax.models.pooling import FAMILY, POOLINGS

ALIASES: Mapping[str, str] = MappingProxyType(
    {**BERT_ALIASES, "head": r"head(/dense|/out_proj)?/kernel"}
)


@dataclasses.dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """The sizes and constants of one RoBERTa; the fields are BERT's."""

    pad_token_id: int = 1

    def to_json(self) -> dict[str, Any]:
        """Returns the object that transformers and `from_json` read."""
        raw = super().to_json()
        return {**raw, "architectures": ["RobertaModel"], "model_type": "roberta"}


class Roberta(nnx.Module):
    """The encoder, and with `num_labels` RoBERTa's own head, or a linear one on another pooling."""

    def __init__(
        self,
        config: RobertaConfig,
        *,
        num_labels: int | None = None,
        pooling: str = FAMILY,
        rngs: nnx.Rngs,
    ):
        self.embeddings = Embeddings(config, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)
        if num_labels is None:
            self.head = None
        elif pooling == FAMILY:
            self.head = Head(config, num_labels, rngs=rngs)
        else:
            self.head = Linear(config.hidden_size, num_labels, std=0.02, rngs=rngs)
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

        As `Bert`; positions are counted by which `input_ids` are padding, whatever the mask says,
        as in the released code.
        """
        config = self.config
        first = config.pad_token_id + 1
        attention_mask = check_inputs(
            "RoBERTa", input_ids, attention_mask, token_type_ids,
            longest=config.max_position_embeddings - first,
        )  # fmt: skip
        real_BT = (input_ids != config.pad_token_id).astype(jnp.int32)
        positions_BT = jnp.cumsum(real_BT, axis=1) * real_BT + config.pad_token_id
        key = fold_key(dropout_key, 0)
        h_BTD = self.embeddings(input_ids, token_type_ids, key, positions_BT)
        key = fold_key(dropout_key, 1)
        states = self.encoder(h_BTD, mask_bias(attention_mask), key, remat, constrain)
        output = states[-1]
        if self.head is not None:
            wide, key = at_least_float32(output), fold_key(dropout_key, 2)
            if isinstance(self.head, Head):
                output = self.head(wide[:, 0], key)
            else:
                pooled_BD = POOLINGS[self.pooling](wide, attention_mask)
                output = self.head(dropout(pooled_BD, config.hidden_dropout_prob, key))
        return (output, states) if output_hidden_states else output


class Head(nnx.Module):
    """out_proj(tanh(dense(h))): (B, D) -> (B, num_labels)."""

    def __init__(self, config: RobertaConfig, num_labels: int, *, rngs: nnx.Rngs):
        size, std = config.hidden_size, config.initializer_range
        self.dense = Linear(size, size, std=std, rngs=rngs)
        self.out_proj = Linear(size, num_labels, std=std, rngs=rngs)
        self.rate = config.hidden_dropout_prob

    def __call__(self, h_BD: jax.Array, key: jax.Array | None) -> jax.Array:
        h_BD = jnp.tanh(self.dense(dropout(h_BD, self.rate, fold_key(key, 0))))
        return self.out_proj(dropout(h_BD, self.rate, fold_key(key, 1)))
