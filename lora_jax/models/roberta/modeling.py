"""RoBERTa (Liu et al. 2019, arXiv:1907.11692): BERT's encoder with other positions and head.

Positions count the tokens that are no padding, from `pad_token_id` + 1 on; there is one token type;
the classifier is a linear layer, tanh, and a linear layer on the first token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.models.bert.modeling import ALIASES as BERT_ALIASES
from lora_jax.models.bert.modeling import Bert, BertConfig
from lora_jax.models.config_fields import Index
from lora_jax.models.layers import Linear, at_least_float32, dropout, fold_key
from lora_jax.models.pooling import FAMILY

ALIASES: Mapping[str, str] = {**BERT_ALIASES, "head": r"head(/dense|/out_proj)?/kernel"}


@dataclasses.dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """The sizes and constants of one RoBERTa; the fields are BERT's."""

    pad_token_id: Index = 1

    def to_json(self) -> dict[str, Any]:
        """Returns the object that transformers and `from_json` read."""
        raw = super().to_json()
        return {**raw, "architectures": ["RobertaModel"], "model_type": "roberta"}


class Roberta(Bert):
    """The encoder, and with `num_labels` RoBERTa's own head, or a linear one on another pooling."""

    name = "RoBERTa"
    has_pooler = False

    def __init__(self, config, *, num_labels: int | None = None, pooling: str = FAMILY, rngs):
        super().__init__(config, num_labels=num_labels, pooling=pooling, rngs=rngs)

    def make_head(self, num_labels: int, rngs: nnx.Rngs) -> nnx.Module:
        if self.pooling != FAMILY:
            return super().make_head(num_labels, rngs)
        return Head(self.config, num_labels, rngs=rngs)

    @property
    def longest(self) -> int:
        return self.config.max_position_embeddings - self.config.pad_token_id - 1

    def positions(self, input_ids: jax.Array) -> jax.Array:
        """Counted by which `input_ids` are padding, whatever the mask says, as in the released
        code."""
        padding = self.config.pad_token_id
        real_BT = (input_ids != padding).astype(jnp.int32)
        return jnp.cumsum(real_BT, axis=1) * real_BT + padding

    def classified(self, h_BTD: jax.Array, mask_BT: jax.Array, key: jax.Array | None) -> jax.Array:
        if isinstance(self.head, Head):
            return self.head(at_least_float32(h_BTD)[:, 0], key)
        return super().classified(h_BTD, mask_BT, key)


class Head(nnx.Module):
    """out_proj(tanh(dense(h))): (B, D) -> (B, num_labels)."""

    def __init__(self, config: BertConfig, num_labels: int, *, rngs: nnx.Rngs):
        size, std = config.hidden_size, config.initializer_range
        self.dense = Linear(size, size, std=std, rngs=rngs)
        self.out_proj = Linear(size, num_labels, std=std, rngs=rngs)
        self.rate = config.hidden_dropout_prob

    def __call__(self, h_BD: jax.Array, key: jax.Array | None) -> jax.Array:
        h_BD = jnp.tanh(self.dense(dropout(h_BD, self.rate, fold_key(key, 0))))
        return self.out_proj(dropout(h_BD, self.rate, fold_key(key, 1)))
