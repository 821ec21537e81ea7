"""The model families by `model_type`: one folder each (modules, names), one line here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from flax import nnx

from lora_jax.core.errors import RequestError
from lora_jax.core.lift import lift
from lora_jax.models.bert.hf import BERT
from lora_jax.models.family import CAUSAL_LM as CAUSAL_LM
from lora_jax.models.family import ENCODER as ENCODER
from lora_jax.models.family import Family
from lora_jax.models.functional import functional
from lora_jax.models.gpt2.hf import GPT_2
from lora_jax.models.llama.config import MODEL_TYPES
from lora_jax.models.llama.hf import LLAMA
from lora_jax.models.pooling import FAMILY
from lora_jax.models.roberta.hf import ROBERTA

FAMILIES: Mapping[str, Family] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "gpt2": GPT_2,
    **dict.fromkeys(MODEL_TYPES, LLAMA),
}


def find_family(model_type: Any, place: str) -> Family:
    """Returns the family of a `config.json`'s model_type; `RequestError` lists the known ones."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise RequestError(f"{place}: model_type is {model_type!r}; known model types: {known}")
    return FAMILIES[model_type]


def family_of(config: Any) -> Family:
    """Returns the family that a config object belongs to."""
    return next(f for f in FAMILIES.values() if type(config) is f.config)


@functools.lru_cache(maxsize=64)
def functional_model(
    config: Any, num_labels: int | None = None, pooling: str = FAMILY
) -> tuple[Mapping[str, Any], Callable]:
    """`functional` of a config's module, lifted, and traced once: models alike share what is
    compiled."""
    family = family_of(config)
    make = lambda: family.module(  # noqa: E731
        config, num_labels=num_labels, pooling=pooling, rngs=nnx.Rngs(0)
    )
    shapes, call = functional(make)
    return MappingProxyType(shapes), lift(call)
