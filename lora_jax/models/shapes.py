"""Models as shapes alone, for counting and planning: no weights, no tokenizer, no memory.

GPT-2: the released configs. GPT-3: Brown et al. 2020, arXiv:2005.14165, Table 2.1, with GPT-2's
vocabulary and tied head. Two rows of that table do not divide, and stand here as their neighbours
do: 1.3B prints 24 heads of 128 for a width of 2048 (here 16), 13B a width of 5140 for 40 heads of
128 (here 5120). RoBERTa: Liu et al. 2019, the released configs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.errors import RequestError
from lora_jax.core.nearest import nearest
from lora_jax.models.families import CAUSAL_LM, family_of, functional_model
from lora_jax.models.functional import unflatten
from lora_jax.models.gpt2.modeling import GPT2Config
from lora_jax.models.llama.config import LlamaConfig
from lora_jax.models.model import NO_HEAD, Model, unstack_layers
from lora_jax.models.pooling import FAMILY
from lora_jax.models.roberta.modeling import RobertaConfig


def _gpt(layers: int, width: int, heads: int, positions: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=50257,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_positions=positions,
        n_inner=4 * width,
        bos_token_id=50256,
        eos_token_id=50256,
    )


def _roberta(layers: int, width: int, heads: int) -> RobertaConfig:
    return RobertaConfig(
        vocab_size=50265,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )


def _llama(
    layers: int, width: int, heads: int, inner: int, *, groups: int = 0, vocab: int = 32000, **more
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups or heads,
        head_dim=width // heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )


_gpt2 = functools.partial(_gpt, positions=1024)
_gpt3 = functools.partial(_gpt, positions=2048)
SHAPES: Mapping[str, Any] = {
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "gpt3-125m": _gpt3(12, 768, 12),
    "gpt3-350m": _gpt3(24, 1024, 16),
    "gpt3-760m": _gpt3(24, 1536, 16),
    "gpt3-1.3b": _gpt3(24, 2048, 16),
    "gpt3-2.7b": _gpt3(32, 2560, 32),
    "gpt3-6.7b": _gpt3(32, 4096, 32),
    "gpt3-13b": _gpt3(40, 5120, 40),
    "gpt3-175b": _gpt3(96, 12288, 96),
    # Touvron et al. 2023 (arXiv:2302.13971, Table 2; 2307.09288); Llama 3 (2407.21783).
    "llama-7b": _llama(32, 4096, 32, 11008),
    "llama-13b": _llama(40, 5120, 40, 13824),
    "llama-33b": _llama(60, 6656, 52, 17920),
    "llama-65b": _llama(80, 8192, 64, 22016),
    "llama-2-7b": _llama(32, 4096, 32, 11008),
    "llama-2-13b": _llama(40, 5120, 40, 13824),
    "llama-2-70b": _llama(80, 8192, 64, 28672, groups=8),
    "llama-3-8b": _llama(32, 4096, 32, 14336, groups=8, vocab=128256, rope_theta=5e5),
    "llama-3-70b": _llama(80, 8192, 64, 28672, groups=8, vocab=128256, rope_theta=5e5),
    "smollm2-135m": _llama(
        30, 576, 9, 1536, groups=3, vocab=49152, tie_word_embeddings=True, rope_theta=1e5
    ),
    "roberta-base": _roberta(12, 768, 12),
    "roberta-large": _roberta(24, 1024, 16),
}


def abstract_model(
    name_or_config: str | Any,
    num_labels: int | None = None,
    *,
    dtype: Any = "float32",
    scan_layers: bool = False,
) -> Model:
    """A `Model` whose params are `jax.ShapeDtypeStruct`s: for tables, plans and `jax.eval_shape`.

    A name of `SHAPES` (hub names' owners are left out: "openai/gpt2" too), or a family's config.
    `num_labels` adds a classifier, `scan_layers` stacks a decoder's layers. Raises `RequestError`
    for an unknown name.

    >>> import lora_jax as lj
    >>> model = abstract_model("gpt2-medium")
    >>> method = lj.LoRA(targets="q,v", rank=4, alpha=32, aliases=model.aliases)
    >>> f"{method.table(model.params).num_trainable:,}"  # 2 · layers · width · 2 · rank
    '393,216'
    """
    config: Any = name_or_config
    name = "abstract"
    if isinstance(name_or_config, str):
        name = name_or_config.rpartition("/")[2].lower()
        if name not in SHAPES:
            raise RequestError(
                f"no shapes of {name_or_config!r} are known; {nearest(name, SHAPES)}"
            )
        config = SHAPES[name]
    family = family_of(config)
    if scan_layers and family.kind == CAUSAL_LM:
        config = dataclasses.replace(config, scan_layers=True)
    if family.kind == CAUSAL_LM and not config.scan_layers:
        # One stacked layer is traced in place of 96.
        stacked = dataclasses.replace(config, scan_layers=True)
        shapes = unstack_layers(stacked, functional_model(stacked, num_labels)[0])
        apply = lambda *args, **kwargs: functional_model(config, num_labels)[1](*args, **kwargs)  # noqa: E731
    else:
        shapes, apply = functional_model(config, num_labels)
    params = {p: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)) for p, x in shapes.items()}
    has_head = num_labels is not None
    return Model(
        name=name,
        config=config,
        params=unflatten(params),
        apply=apply,
        aliases=family.aliases(config),
        pooling=FAMILY,
        head="classification" if has_head else None,
        num_labels=num_labels,
        head_pattern=r"head/.*" if has_head else NO_HEAD,
    )
