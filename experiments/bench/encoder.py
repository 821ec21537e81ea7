"""A BERT of any size with random weights, as the benchmarks train it."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from lora_jax.models.bert.modeling import Bert, BertConfig
from lora_jax.models.functional import functional, unflatten


def encoder_config(*, layers: int, width: int, vocabulary: int, tokens: int) -> BertConfig:
    """MiniLM's proportions: heads of 32, four times the width in the middle."""
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
        max_position_embeddings=tokens,
    )


def random_encoder(config: BertConfig, key: jax.Array) -> tuple[dict[str, Any], Any]:
    """`(params, apply)` of a two-label classifier; float32, normal weights of deviation 0.02."""
    shapes, apply = functional(lambda: Bert(config, num_labels=2, pooling="mean", rngs=nnx.Rngs(0)))
    flat = {
        path: 0.02 * jax.random.normal(jax.random.fold_in(key, n), leaf.shape)
        + path.endswith("norm/scale")
        for n, (path, leaf) in enumerate(shapes.items())
    }
    return unflatten(flat), apply
